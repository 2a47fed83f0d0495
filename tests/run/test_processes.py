"""Two processes as two hosts: each has rollouts with an engine and a tool of its own, on its own
devices or on those of both together, and both train one adapter."""

import dataclasses
from typing import Annotated

import numpy as np
import pytest
from run import small
from run.several import finish, identities, start

from jaxdeep.agent import record
from jaxdeep.agent.base import Env
from jaxdeep.agent.tool import tool
from jaxdeep.envs.toy import facts
from jaxdeep.metrics import read_metrics
from jaxdeep.tools.bm25 import BM25
from jaxdeep.types import Message

# The verb, which writes a copy of every adapter that an engine is given.
SPY = """
import sys
import jax
import numpy as np
from jaxdeep.parallel import exchange, mesh as meshes
from jaxdeep.run import cli
from jaxdeep.sample.engine import Engine

together = sys.argv.pop() == "together"
meshes.WHOLE_SLICE_CHIPS = ("cpu",) if together else ()
set_adapter, count = Engine.set_adapter, 0

def copied(engine, adapter, *rest, **more):
    global count
    flat = {f"{name}-{key}": x for name, pair in adapter.factors.items() for key, x in pair.items()}
    shared = together and jax.process_count() > 1
    assert all(x.is_fully_addressable != shared for x in flat.values())
    flat = {name: x.addressable_data(0) for name, x in flat.items()}
    np.savez(f"{sys.argv[1]}-{jax.process_index()}-{count}.npz", **flat)
    count += 1
    set_adapter(engine, adapter, *rest, **more)

Engine.set_adapter = copied
sys.exit(cli.main(sys.argv[2:]))
"""
STEPS = 3


class Desk(Env):
    """The librarian that the tiny base was taught to call."""

    def __init__(self, task, index):
        self.task, self.index, self.tools = task, index, [self.Desk]

    async def open(self):
        return [Message("system", "Call the desk."), Message("user", self.task.question)]

    @tool
    def Desk(self, Find: Annotated[str, "keywords"]) -> str:
        """Find a passage."""
        found = self.index.search(Find, 1)
        return found[0][0].text if found else "Nothing."


@dataclasses.dataclass(frozen=True)
class Desks(small.Lucky):
    """The questions of the small world, where the reward is luck."""

    def load(self):
        taskset, index = super().load(), BM25(facts.passages(facts.entities_of("dev")))
        taskset.env = lambda task: Desk(task, index)
        return taskset


@pytest.mark.parametrize(
    "together",
    [
        pytest.param(False, id="each its devices"),
        pytest.param(True, id="all devices together", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_adapter_that_one_does(tmp_path, together):
    changes = {
        "model.path": "tiny",
        "model.weights": "load",
        "env.taskset": f"{__file__}:Desks",
        "grpo.group": 2,
        "rollout.limits.turn_tokens": 28,
        "rollout.slots": 2,  # less to compile: all calls have two rows
        "rollout.chunk": 32,
        "rollout.exact": True,
        "batch.rows": 2,
    }
    same = ["grpo", f"--config={small.config(tmp_path, 'grpo', steps=STEPS)}"]
    same += [f"--config.{key}={value}" for key, value in changes.items()]
    members = (("one", ()), *(("two", identity) for identity in identities(2)))
    finish(
        [
            start(
                *(SPY, str(tmp_path / name), *same, f"--workdir={tmp_path / name}"),
                "together" if together else "apart",
                identity=identity,
            )
            for name, identity in members
        ]
    )
    folders = [tmp_path / name for name in ("one", "two", "two/process-1")]
    for step in range(1, STEPS + 1):
        one, both = (record.read(folder / f"rollouts/{step:06d}.jsonl") for folder in folders[:2])
        assert [t.tokens for t in both] == [t.tokens for t in one]
        assert sum(t.metrics["calls"] for t in both) > 4
    sampled = [
        sum(row["engine/sampled"] for row in read_metrics(folder / "metrics.jsonl"))
        for folder in folders
    ]
    # a row counts what all engines did
    assert sampled[0] == sampled[1] == sampled[2] > 0
    before = None
    for step in range(STEPS + 1):
        one, first, second = (
            dict(np.load(f"{tmp_path}/{name}-{step}.npz")) for name in ("one-0", "two-0", "two-1")
        )
        for name, x in one.items():
            np.testing.assert_array_equal(first[name], second[name])
            # sums are in another order: 1 % of what the first step moves
            np.testing.assert_allclose(first[name], x, atol=5e-6)
            if step > 1 or (step == 1 and name.endswith("b")):
                assert np.abs(x - before[name]).max() > 4e-4
        before = one
    timed = ("time/", "rollout/tool_seconds", "engine/", "tool/Desk/latency")
    one, *both = (
        [
            {k: v for k, v in row.items() if not k.startswith(timed)}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in folders
    )
    assert both[0] == both[1] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in one]
