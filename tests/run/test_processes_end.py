"""Several processes of which one is killed, told to stop, fails or hangs, and what four train.
Takes minutes."""

import dataclasses
import itertools
import json
import os
import signal
import time
from typing import Annotated

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run import small
from run.several import finish, identities, running, start, start_verb, wait, wait_for_exits

from jaxdeep.agent import record
from jaxdeep.agent.base import Env
from jaxdeep.agent.tool import tool
from jaxdeep.metrics import read_metrics
from jaxdeep.types import Message

pytestmark = pytest.mark.slow
LUCK = f"--config.env.taskset={small.__file__}:Lucky"


def place(workdir, index):
    return workdir / f"process-{index}" if index else workdir


def rows(workdir, index=0):
    path = place(workdir, index) / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def steps(workdir, index=0):
    return [row["step"] for row in rows(workdir, index)]


def kill(workdir, index, number):
    """Send a signal to the process that has locked the folder."""
    os.kill(int((place(workdir, index) / ".lock").read_text()), number)


def adapter(workdir, step):
    """The trained arrays of a checkpoint, by name."""
    path = workdir / f"checkpoints/{step}/trained"
    with ocp.StandardCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
        found = reader.restore(path, tree)
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(found)}


@pytest.mark.parametrize(("what", "count"), [("sft", 2), ("sft", 4), ("grpo", 4)])
def test_several_train_the_adapter_that_one_does(tmp_path, what, count):
    config = small.config(tmp_path, what, steps=4)
    same = [what, f"--config={config}", *([LUCK, "--config.rollout.exact=True"] * (what == "grpo"))]
    for n in (1, count):
        finish(start_verb(n, *same, f"--workdir={tmp_path / str(n)}"))
    one, many = (adapter(tmp_path / str(n), 4) for n in (1, count))
    assert one.keys() == many.keys()
    for name, x in one.items():
        # sums are in another order: 1 % of what a step moves
        np.testing.assert_allclose(many[name], x, atol=1e-5, err_msg=name)
        assert np.abs(x).max() > 5e-4
    for index in range(count):
        assert steps(tmp_path / str(count), index) == [1, 2, 3, 4]
    if what == "grpo":
        both = (record.read(tmp_path / f"{n}/rollouts/000001.jsonl") for n in (1, count))
        tokens, others = ([t.tokens for t in found] for found in both)
        assert tokens == others


# SFT that says how many conversations it read, where the second process fails at the `argv[1]`-th.
READS = """
import sys
import jax
from jaxdeep.data import sources
from jaxdeep.run import cli

read, count = sources.Conversations.__getitem__, 0

def counted(rows, index):
    global count
    count += 1
    if jax.process_index() == 1 and count == int(sys.argv[1]):
        raise OSError("the disk is gone")
    return read(rows, index)

sources.Conversations.__getitem__ = counted
status = cli.main(["sft", *sys.argv[2:]])
print("read", count)
sys.exit(status)
"""


def reading(count, folder, name, *args, fails=0, wrong=None):
    """SFT of so many processes, in the folder `name`, on a file with a `wrong` line."""
    lines = []
    for index in range(500):
        words = "she went there " * (1 + index % 6)
        turns = [("user", "Where to?"), ("assistant", words)]
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        lines.append(json.dumps({} if index == wrong else row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    same = [f"--config={small.config(folder, 'sft', steps=4)}", f"--workdir={folder / name}"]
    same += [f"--config.data.source=jsonl:{folder / 'rows.jsonl'}", *args]
    return [start(READS, str(fails), *same, identity=each) for each in identities(count)]


def test_each_reads_its_share_of_the_batches_of_one(tmp_path):
    read = {}
    for count in (1, 2, 4):
        printed = finish(reading(count, tmp_path, str(count)))
        read[count] = [int(text.split("read ")[1]) for text in printed]
    one = adapter(tmp_path / "1", 4)
    for count, most in ((2, 0.9), (4, 0.6)):
        assert max(read[count]) < most * read[1][0]
        many = adapter(tmp_path / str(count), 4)
        for name, x in one.items():
            np.testing.assert_allclose(many[name], x, atol=1e-5, err_msg=name)
        for index in range(count):
            for a, b in zip(rows(tmp_path / "1"), rows(tmp_path / str(count), index), strict=True):
                same = [name for name in a if name.startswith("data/")]
                same += ["train/tokens", "train/flops"]
                assert [a[name] for name in same] == [b[name] for name in same]
                assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    # two go on where four stopped
    for count, name in ((2, "4"), (1, "1")):
        finish(reading(count, tmp_path, name, "--config.train.steps=6"))
    one, many = (adapter(tmp_path / name, 6) for name in ("1", "4"))
    for name, x in one.items():
        np.testing.assert_allclose(many[name], x, atol=1e-5, err_msg=name)
    assert rows(tmp_path / "4")[-1]["data/rows"] == rows(tmp_path / "1")[-1]["data/rows"]


# It fails while all rows are checked; after that, in training; on a row that was not checked.
@pytest.mark.parametrize(
    ("fault", "check"), [({"fails": 150}, True), ({"fails": 400}, True), ({"wrong": 7}, False)]
)
def test_one_cannot_read_its_share_and_no_one_waits_for_it(tmp_path, fault, check):
    flags = ["--config.train.steps=400", f"--config.data.check={check}"]
    with running(reading(2, tmp_path, "run", *flags, **fault)) as runs:
        first, second = wait_for_exits(runs)
    if "fails" in fault:
        assert [run.returncode for run in runs] == [1, 1]
        assert "error: process 1 of 2 failed (OSError: the disk is gone)" in first
        assert second.strip().endswith("OSError: the disk is gone")
    else:
        assert [run.returncode for run in runs] == [2, 2]
        assert all("rows.jsonl:8: " in text and "bad_rows=skip" in text for text in (first, second))


@pytest.mark.parametrize(
    ("what", "count", "victim"), [("grpo", 2, 1), ("sft", 4, 2), ("sft", 2, 0), ("grpo", 4, 0)]
)
def test_one_is_killed_the_others_end_and_the_same_command_goes_on(tmp_path, what, count, victim):
    workdir = tmp_path / "run"
    config = small.config(tmp_path, what, steps=400)
    same = [what, f"--config={config}", f"--workdir={workdir}", *([LUCK] * (what == "grpo"))]
    with running(start_verb(count, *same)) as runs:
        wait(lambda: len(rows(workdir)) >= 5)
        kill(workdir, victim, signal.SIGKILL)
        others = [run for index, run in enumerate(runs) if index != victim]
        errors = wait_for_exits(others)
    assert all(run.returncode == 1 for run in others)
    for text in errors:
        assert f"error: process {victim} of {count} is gone, or hangs" in text
        assert "The same command in all processes continues" in text
        assert "another task died" not in text
    before = steps(workdir)
    kept = max(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )
    assert before[-1] - kept <= 4
    finish(start_verb(count, *same, f"--config.train.steps={kept + 3}"))
    for index in range(count):
        assert steps(workdir, index) == list(range(1, kept + 4))


@pytest.mark.parametrize("what", ["sft", "grpo"])
def test_one_is_told_to_stop_and_all_save(tmp_path, what):
    workdir = tmp_path / "run"
    config = small.config(tmp_path, what, steps=400)
    same = [what, f"--config={config}", f"--workdir={workdir}", *([LUCK] * (what == "grpo"))]
    with running(start_verb(2, *same)) as runs:
        wait(lambda: len(rows(workdir)) >= 3)
        kill(workdir, 1, signal.SIGTERM)
        printed = finish(runs)
    done = steps(workdir)[-1]
    assert all(f"terminated after step {done}, which is saved" in text for text in printed)
    assert (workdir / f"checkpoints/{done}").is_dir() and steps(workdir, 1) == steps(workdir)
    finish(start_verb(2, *same, f"--config.train.steps={done + 2}"))
    assert steps(workdir) == steps(workdir, 1) == list(range(1, done + 3))


def test_a_damaged_checkpoint_is_passed_over_by_both(tmp_path):
    workdir = tmp_path / "run"
    config = small.config(tmp_path, "sft", steps=4)
    same = ["sft", f"--config={config}", f"--workdir={workdir}"]
    finish(start_verb(2, *same))
    for path in (workdir / "checkpoints/4/trained").rglob("*"):
        if path.is_file() and not path.name.startswith("_"):
            path.write_bytes(b"spoiled")
    with running(start_verb(2, *same, "--config.train.steps=6")) as runs:
        errors = wait_for_exits(runs)
    assert [run.returncode for run in runs] == [0, 0], errors
    assert all("checkpoint 4 cannot be read" in text for text in errors)
    assert (workdir / "checkpoints-torn/4").is_dir() and (workdir / "checkpoints/6").is_dir()
    assert steps(workdir) == steps(workdir, 1) == [1, 2, 3, 4, 5, 6]


def test_the_guard_sets_both_back(tmp_path):
    workdir = tmp_path / "run"
    config = small.config(tmp_path, "grpo", steps=12)
    # it takes both of the two steps without reward to set the run back
    changes = ("action=rollback", "window=2", "patience=1", "reward_drop=0.6")
    changes += ("entropy_rise=0", "flat=0", "length=0")
    finish(
        start_verb(
            *(2, "grpo", f"--config={config}", f"--workdir={workdir}"),
            f"--config.env.taskset={small.__file__}:Collapsing",
            *("--config.env.first_bad=49", "--config.env.last_bad=64"),
            *(f"--config.guard.{change}" for change in changes),
        )
    )
    backs = [json.loads((place(workdir, i) / "guard.json").read_text()) for i in (0, 1)]
    assert backs[0] == backs[1] and len(backs[0]) == 1
    assert backs[0][0]["step"] == 8 and backs[0][0]["to"] == 4
    assert (workdir / "collapsed-1/metrics.jsonl").exists()
    assert steps(workdir) == steps(workdir, 1) == list(range(1, 13))


HANGS = 20.0  # seconds until the tool is given up: many times what a step takes otherwise


class Desk(Env):
    """One tool, which the environment calls itself before the conversation begins."""

    def __init__(self, dead):
        self.dead, self.tools = dead, [self.look]

    async def open(self):
        result = await self.look.call({"where": "there"})
        return [Message("user", result.text)]

    @tool(timeout=HANGS)
    def look(self, where: Annotated[str, "place"]) -> str:
        """Look."""
        time.sleep(3600 if self.dead else 0)
        return "Nothing."


@dataclasses.dataclass(frozen=True)
class HalfDead(small.Lucky):
    """Tasks whose tool hangs in the second process, in its second step."""

    def load(self):
        taskset, made = super().load(), itertools.count(-small.OPENED)
        taskset.env = lambda task: Desk(jax.process_index() == 1 and 8 <= next(made) < 16)
        return taskset


def test_a_tool_that_hangs_holds_up_no_one_beyond_its_time(tmp_path):
    workdir = tmp_path / "run"
    config = small.config(tmp_path, "grpo", steps=3)
    finish(
        start_verb(
            *(2, "grpo", f"--config={config}", f"--workdir={workdir}"),
            f"--config.env.taskset={__file__}:HalfDead",
        )
    )
    failed = [row["rollout/stop/failed"] for row in rows(workdir)]
    assert failed == [0.0, 0.5, 0.0]
    _, second, third = (row["time/rollout"] for row in rows(workdir))
    assert second >= HANGS > third
    found = record.read(workdir / "rollouts/000002.jsonl")
    assert all(f"look did not answer within {HANGS:g} s" in t.failure for t in found if t.failure)


@dataclasses.dataclass(frozen=True)
class Broken(small.Lucky):
    """Tasks of which the second process has none that works."""

    def load(self):
        taskset, made = super().load(), itertools.count(-small.OPENED)
        if jax.process_index() == 1:
            taskset.env = lambda task: Desk(False) if next(made) < 0 else 1 / 0
        return taskset


def test_one_fails_and_the_others_say_so(tmp_path):
    config = small.config(tmp_path, "grpo", steps=3)
    words = ["grpo", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    with running(start_verb(2, *words, f"--config.env.taskset={__file__}:Broken")) as runs:
        first, second = wait_for_exits(runs)
    assert [run.returncode for run in runs] == [1, 1]
    assert "error: process 1 of 2 failed (ZeroDivisionError" in first
    assert "Traceback" in second and second.strip().endswith("ZeroDivisionError: division by zero")
