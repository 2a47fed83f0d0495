"""Processes whose chips only run programs of the whole slice, as TPU v5e and v6e: their engines
make their calls together, each for rollouts of its own. Takes minutes."""

import json
import signal

import numpy as np
import pytest
from run import small, test_processes_end
from run.several import finish, running, start_verb, wait, wait_for_exits
from run.test_processes_end import kill, rows, steps

from jaxdeep.agent import record

pytestmark = pytest.mark.slow
BOUND = """
import sys
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import cli

meshes.WHOLE_SLICE_CHIPS = ("cpu",)
sys.exit(cli.main())
"""
LUCK = f"{small.__file__}:Lucky"


def grpo(folder, count, *args, devices=2, taskset=LUCK, workdir="run", steps=4):
    """GRPO in `count` processes with this number of devices each, two of them along `model`."""
    config = small.config(folder, "grpo", steps=steps)
    changes = ["mesh.model=2", f"env.taskset={taskset}", *args]
    words = ["grpo", f"--config={config}", f"--workdir={folder / workdir}"]
    words += [f"--config.{change}" for change in changes]
    return start_verb(count, *words, program=BOUND, devices=devices)


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1), (2, 4)])
def test_they_train_what_one_process_does(tmp_path, count, devices):
    exact = ["rollout.exact=True", *(["mesh.model=1"] * (devices == 1))]
    finish(grpo(tmp_path, count, *exact, devices=devices, workdir="many"))
    finish(grpo(tmp_path, 1, *exact, devices=count * devices, workdir="one"))
    one, many = (test_processes_end.adapter(tmp_path / name, 4) for name in ("one", "many"))
    for name, x in one.items():
        np.testing.assert_allclose(many[name], x, atol=1e-5, err_msg=name)
        assert np.abs(x).max() > 5e-4
    tokens, others = (
        [t.tokens for t in record.read(tmp_path / name / "rollouts/000001.jsonl")]
        for name in ("one", "many")
    )
    assert tokens == others
    sampled = [sum(r["engine/sampled"] for r in rows(tmp_path / "many", i)) for i in range(count)]
    # a row counts what all engines did
    assert set(sampled) == {sum(r["engine/sampled"] for r in rows(tmp_path / "one"))}
    # the trainer agrees with what was sampled, also on other processes' devices
    assert all(row["train/max_logp_diff"] < 1e-4 for row in rows(tmp_path / "many"))


def test_rollouts_one_step_ahead_wait_while_the_policy_is_changed(tmp_path):
    finish(grpo(tmp_path, 2, "grpo.ahead=1", steps=5))
    found = rows(tmp_path / "run")
    assert steps(tmp_path / "run", 1) == [1, 2, 3, 4, 5]
    assert max(row["train/max_staleness"] for row in found) == 1
    assert all(row.get("train/fresh_logp_diff", 0.0) < 1e-4 for row in found)


def test_one_is_told_to_stop_and_all_save(tmp_path):
    workdir = tmp_path / "run"
    with running(grpo(tmp_path, 2, steps=400)) as runs:
        wait(lambda: len(rows(workdir)) >= 3)
        kill(workdir, 1, signal.SIGTERM)
        printed = finish(runs)
    done = steps(workdir)[-1]
    assert all(f"terminated after step {done}, which is saved" in text for text in printed)
    finish(grpo(tmp_path, 2, steps=done + 2))
    assert steps(workdir) == steps(workdir, 1) == list(range(1, done + 3))


def test_one_is_killed_and_the_other_ends(tmp_path):
    workdir = tmp_path / "run"
    with running(grpo(tmp_path, 2, steps=400)) as runs:
        wait(lambda: len(rows(workdir)) >= 3)
        kill(workdir, 1, signal.SIGKILL)
        (error,) = wait_for_exits(runs[:1])
    assert "error: process 1 of 2 is gone, or hangs" in error


def test_one_fails_and_the_other_says_so(tmp_path):
    with running(grpo(tmp_path, 2, taskset=f"{test_processes_end.__file__}:broken")) as runs:
        first, second = wait_for_exits(runs)
    assert [run.returncode for run in runs] == [1, 1]
    assert "error: process 1 of 2 failed (ZeroDivisionError" in first
    assert second.strip().endswith("ZeroDivisionError: division by zero")


def test_a_tool_that_hangs_holds_up_no_one_beyond_its_time(tmp_path):
    finish(grpo(tmp_path, 2, taskset=f"{test_processes_end.__file__}:half_dead", steps=3))
    failed = [row["rollout/stop/failed"] for row in rows(tmp_path / "run")]
    assert failed == [0.0, 0.5, 0.0]
    _, second, third = (row["time/rollout"] for row in rows(tmp_path / "run"))
    assert second >= test_processes_end.HANGS > third


def test_the_guard_sets_both_back(tmp_path):
    """After which each has a second engine."""
    changes = ("action=rollback", "window=2", "patience=1", "entropy_rise=0", "flat=0", "length=0")
    collapsing = f"{test_processes_end.__file__}:collapsing"
    finish(grpo(tmp_path, 2, *(f"guard.{c}" for c in changes), taskset=collapsing, steps=12))
    backs = [test_processes_end.place(tmp_path / "run", i) / "guard.json" for i in (0, 1)]
    first, second = (json.loads(path.read_text()) for path in backs)
    assert first == second and len(first) == 1 and first[0]["to"] <= 6
    assert steps(tmp_path / "run") == steps(tmp_path / "run", 1) == list(range(1, 13))
