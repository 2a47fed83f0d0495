"""Two processes as two hosts: each talks with an engine and a tool of its own, on devices of its own or on
those of both together, and both train one adapter."""

import contextlib
import dataclasses
import os
import signal
import time
from typing import Annotated

import numpy as np
import pytest
from run import small
from run.several import finish, start, told, wait

from jaxdeep.agent import record
from jaxdeep.agent.base import Env
from jaxdeep.agent.tool import tool
from jaxdeep.envs.toy import facts
from jaxdeep.metrics import read_metrics
from jaxdeep.parallel import hosts
from jaxdeep.setup import sections as setup
from jaxdeep.tools.bm25 import BM25
from jaxdeep.types import Message

# The verb itself, with a copy of every adapter that an engine is given.
SPY = """
import sys
import jax
import numpy as np
from jaxdeep.parallel import exchange, mesh as meshes
from jaxdeep.run import cli
from jaxdeep.sample.engine import Engine

bound = sys.argv.pop() == "bound"
meshes.WHOLE_SLICE_CHIPS = ("cpu",) if bound else ()
given, count = Engine.set_adapter, 0

def kept(engine, adapter, *rest, **more):
    global count
    flat = {f"{name}-{key}": x for name, pair in adapter.factors.items() for key, x in pair.items()}
    assert all(x.is_fully_addressable != (bound and jax.process_count() > 1) for x in flat.values())
    flat = {name: x.addressable_data(0) for name, x in flat.items()}
    np.savez(f"{sys.argv[1]}-{jax.process_index()}-{count}.npz", **flat)
    count += 1
    given(engine, adapter, *rest, **more)

Engine.set_adapter = kept
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


def desks(env):
    """The questions of `env`, where the reward is luck."""
    taskset = setup.taskset_of(dataclasses.replace(env, taskset=""))
    index = BM25(facts.passages(facts.parse("dev")))
    taskset.env = lambda task: Desk(task, index)
    taskset.rewards = {"luck": (1.0, lambda task, trajectory: trajectory.seed % 5)}
    return taskset


# What the processes hand to each other, on meshes of two devices each.
HANDED = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxdeep.parallel import hosts
from jaxdeep.parallel import exchange, mesh as meshes
from jaxdeep.types import Batch

hosts.connect()
me = jax.process_index()
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
exchange.PARCEL = 1000
items = [(i, "word " * 100 * i) for i in range(7)]
mine = exchange.my_items(items)
assert [i for i, _ in mine] == list(range(me, 7, 2))
assert exchange.all_gather_objects(mine) == items and exchange.all_gather_objects([]) == []
x = np.arange(64.0).reshape(8, 8)
places = np.tile(np.arange(8), (8, 1))
batch = Batch(x, places * 0 + 1, places, x * 0, x * 0, x * 0)
for shape, held, own_shape in (
    (dict(replica=2, data=2), True, (1, 2, 1, 1)),
    (dict(data=4), False, (1, 1, 1, 2)),
    (dict(replica=2, data=1, model=2), True, (1, 1, 1, 2)),
    (dict(data=1, model=4), False, (1, 1, 1, 2)),
    (dict(data=2, context=2), False, (1, 1, 1, 2)),
):
    mesh = meshes.make_mesh(meshes.MeshConfig(**shape))
    whole = meshes.put(mesh, batch).tokens_BT
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
    here = meshes.rows_here(mesh, 8, 8)
    assert len(here) == (8 if shape["data"] == 1 and "replica" not in shape else 4), shape
    blank = np.where(np.isin(np.arange(8), list(here))[:, None], x, 0)
    for shard in meshes.put(mesh, batch._replace(tokens_BT=blank)).tokens_BT.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
    spec = P("data", "model")
    y = jax.device_put(x, NamedSharding(mesh, spec))
    for bound in ((), ("cpu",)):
        meshes.WHOLE_SLICE_CHIPS = bound
        own = meshes.local(mesh, 6)
        here = [device for device in own.devices.flat if device.process_index == me]
        assert sorted(here, key=lambda device: device.id) == jax.local_devices()
        assert own.size == (4 if bound else 2) and meshes.processes_of(own) == own.size // 2
        assert own.devices.shape == (own_shape[0] * meshes.processes_of(own), *own_shape[1:])
        to = dict(y=NamedSharding(own, spec))
        assert (exchange.reuse_shards(dict(y=y), to) is not None) == held, shape
        z = exchange.reshard(dict(y=y), to)["y"]
        assert z.sharding == to["y"] and z.is_fully_addressable == (not bound)
        for shard in z.addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index])
        rows = dict(a=np.arange(12).reshape(4, 3) + me, b=np.arange(4.0) * me)
        back = meshes.fetch_rows(meshes.put_rows(own, rows))
        for name, part in rows.items():
            np.testing.assert_array_equal(back[name], part)
assert meshes.local(meshes.make_mesh(meshes.MeshConfig(data=4)), 3).devices.shape == (2, 2, 1, 1)
"""


def test_what_processes_hand_to_each_other_is_whole():
    finish([start(HANDED, several=several, devices=2) for several in told(2)])


@pytest.mark.parametrize(
    "bound",
    [
        pytest.param(False, id="each its devices"),
        pytest.param(True, id="all devices together", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_adapter_that_one_does(tmp_path, bound):
    changes = {
        "model.path": "tiny",
        "model.weights": "load",
        "env.taskset": f"{__file__}:desks",
        "grpo.group": 2,
        "rollout.limits.turn_tokens": 28,
        "rollout.slots": 2,  # less to compile: all calls have two rows
        "rollout.chunk": 32,
        "rollout.exact": True,
        "batch.rows": 2,
    }
    same = ["grpo", f"--config={small.config(tmp_path, 'grpo', steps=STEPS)}"]
    same += [f"--config.{key}={value}" for key, value in changes.items()]
    runs = [
        start(
            *(SPY, str(tmp_path / name), *same, f"--workdir={tmp_path / name}"),
            "bound" if bound else "free",
            several=several,
        )
        for name, several in (*zip(("two", "two"), told(2), strict=True), ("one", ()))
    ]
    finish(runs)
    folders = [tmp_path / name for name in ("one", "two", "two/process-1")]
    for step in range(1, STEPS + 1):
        one, both = (record.read(folder / f"rollouts/{step:06d}.jsonl") for folder in folders[:2])
        assert [t.tokens for t in both] == [t.tokens for t in one]
        assert sum(t.metrics["calls"] for t in both) > 4
    sampled = [
        sum(row["engine/sampled"] for row in read_metrics(folder / "metrics.jsonl"))
        for folder in folders
    ]
    # each engine did its part
    assert sampled[0] == sum(sampled[1:]) and min(sampled) > sampled[0] / 4
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


# Processes that wait for each other for ever; what takes a minute is done in seconds.
TURNS = """
import numpy as np
from jax.experimental import multihost_utils
from jaxdeep.parallel import hosts

hosts.HEARTBEAT_SECONDS, hosts.MISSED_BEATS = 0.5, 10
with hosts.joined():
    for turn in range(100_000):
        multihost_utils.process_allgather(np.ones(1))
        if turn == 10:
            print("all turn", flush=True)
"""


def left_behind(runs):
    """Process groups that still have a member."""
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, 0)
            yield run.pid


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_first_is_missed_when_it_is_gone_or_hangs(how):
    runs = [start(TURNS, several=several, process_group=0) for several in told(3)]
    try:
        for run in runs:
            assert any(line == "all turn\n" for line in run.stdout)
        for stopped in (signal.SIGSTOP, signal.SIGCONT):  # as a machine that is suspended
            for run in runs:
                run.send_signal(stopped)
            time.sleep(7 if stopped == signal.SIGSTOP else 2)
        assert all(run.poll() is None for run in runs)
        runs[0].send_signal(how)
        wait(lambda: all(run.poll() is not None for run in runs[1:]), 60)
        said = [run.communicate()[1] for run in runs[1:]]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    line = f"process 0 of 3 is gone, or hangs: nothing was heard of it for 5 s. {hosts.AGAIN}\n"
    for run, text in zip(runs[1:], said, strict=True):
        assert run.returncode == 1 and f"error: {line}" in text and "another task died" not in text
    assert not list(left_behind(runs))
