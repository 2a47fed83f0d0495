"""Collapse: every sign raises an alarm, noise raises none, and a resumed run raises the same."""

import dataclasses
import random

import pytest

from jaxdeep.errors import ConfigError, DivergedError
from jaxdeep.train.guard import SIGNS, Guard, GuardConfig, checkpoints_to_keep, roll_back

FINE = {
    "reward/mean": 0.6,
    "train/mismatch_kl": 1e-4,
    "train/kl": 0.05,
    "train/entropy": 0.5,
    "rollout/repetition": 0.05,
    "rollout/malformed": 0.1,
    "rollout/thoughtless": 0.1,
    "rollout/sampled_tokens": 200.0,
    "grpo/flat_groups": 0.4,
    "rollout/unjudged": 0.05,
    "rollout/unsampled": 0.0,
    "rollout/broken_tools": 0.1,
}
# what each sign becomes within 30 steps, as reported of search agents trained by GRPO
COLLAPSED = {
    "reward_drop": 0.05,
    "mismatch": 0.4,
    "kl": 6.0,
    "entropy_low": 0.0,
    "entropy_rise": 4.0,
    "repetition": 0.8,
    "malformed": 0.9,
    "thoughtless": 1.0,
    "length": 1500.0,
    "flat": 1.0,
    "unjudged": 1.0,
    "unsampled": 1.0,
    "tools": 1.0,
}


def run(steps=120, seed=0, sign="", at=60):
    """Rows of a noisy run; from step `at` one sign moves to its collapsed value within 30 steps."""
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        row = {name: value * rng.uniform(0.7, 1.3) for name, value in FINE.items()}
        row["reward/mean"] *= min(1.0, 0.2 + step / 50)
        if sign and step > at:
            metric, far = SIGNS[sign][0], min(1.0, (step - at) / 30)
            row[metric] = row[metric] * (1 - far) + COLLAPSED[sign] * far
        yield {"step": step} | row


class Saved:
    """A double of the checkpoints of some steps."""

    def __init__(self, *steps):
        self.kept = list(steps)

    def wait(self):
        pass

    def steps(self):
        return self.kept

    def drop_after(self, step):
        self.kept = [s for s in self.kept if s <= step]


def collapse(folder, at, *kept, **given):
    """Act on a collapse after step `at` in a run that saves every 10 steps and kept these. Returns
    whether the run was set back and the checkpoints it has then."""
    guard = Guard(GuardConfig(action="rollback", window=10, patience=3, **given))
    for name in ("rollouts/000041.jsonl", "gaps/000041.npy", "metrics.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    saved = Saved(*kept)
    for step in range(1, 200):
        alarms = guard.see({"step": step} | FINE | {"train/kl": 9.0 if step > at else 0.05})
        if alarms:
            return roll_back(folder, saved, guard, step, alarms, 10), saved.kept
    raise AssertionError("no alarm was raised")


def test_a_run_is_set_back_to_before_the_windows_of_its_collapse(tmp_path):
    assert collapse(tmp_path, 40, 10, 20, 30, 40) == (True, [10, 20, 30])
    assert (tmp_path / "collapsed-1/000041.npy").exists() and not any((tmp_path / "gaps").iterdir())


def test_where_no_checkpoint_can_be_from_before_it_begins_anew(tmp_path):
    assert collapse(tmp_path, 12, 10, 20) == (True, [])


def test_a_checkpoint_from_within_the_collapse_is_none_from_before(tmp_path):
    with pytest.raises(DivergedError, match=r"No checkpoint of step 3\d .* is kept .*train\.keep"):
        collapse(tmp_path, 40, 40, 50)


@pytest.mark.parametrize("sign", ["unjudged", "unsampled", "tools"])
def test_a_broken_world_ends_the_run_instead(tmp_path, sign):
    guard, saved = Guard(GuardConfig(action="rollback", window=2, patience=1)), Saved(10, 20)
    rows = ({"step": step} | FINE | {SIGNS[sign][0]: 1.0} for step in (21, 22))
    alarms = [alarm for row in rows for alarm in guard.see(row)]
    with pytest.raises(DivergedError, match=f"stopped after step 22.*guard.{sign}=0.5"):
        roll_back(tmp_path, saved, guard, 22, alarms, 10)
    assert saved.kept == [10, 20]


def test_enough_checkpoints_are_kept_to_be_set_back():
    config = GuardConfig(action="rollback", window=20, patience=5)
    assert [checkpoints_to_keep(config, every) for every in (1, 5, 10, 100)] == [26, 6, 4, 2]
    assert checkpoints_to_keep(GuardConfig(action="warn"), 5) == checkpoints_to_keep(None, 5) == 1


@pytest.mark.parametrize("sign", SIGNS)
def test_each_sign_is_raised_soon_and_names_itself(sign):
    guard = Guard(GuardConfig())
    for row in run(sign=sign):
        if alarms := guard.see(row):
            break
    assert 60 < row["step"] <= 110
    assert len(alarms) == 1 and SIGNS[sign][0] in alarms[0] and f"guard.{sign}=" in alarms[0]
    assert 40 <= guard.safe_step <= row["step"] - 10
    silent = Guard(dataclasses.replace(GuardConfig(), **{sign: 0.0}))
    assert not any(silent.see(row) for row in run(sign=sign))


@pytest.mark.parametrize("seed", range(10))
def test_noise_raises_nothing(seed):
    guard = Guard(GuardConfig())
    assert not any(guard.see(row) for row in run(seed=seed))
    assert guard.safe_step == 110


def test_a_run_that_goes_on_sees_what_one_that_never_stopped_does():
    rows = list(run(sign="repetition"))
    whole = Guard(GuardConfig())
    want = [whole.see(row) for row in rows]
    assert any(want)
    for cut in (5, 61, 75, 100):
        again = Guard(GuardConfig(), rows[:cut])
        assert [again.see(row) for row in rows[cut:]] == want[cut:]
        assert again.safe_step == whole.safe_step


def test_what_is_not_measured_or_not_finite_is_left_out():
    guard = Guard(GuardConfig(window=2, patience=1))
    rows = [{"step": 1}, {"step": 2, "reward/mean": None}, {"step": 3, "reward/mean": float("nan")}]
    assert [guard.see(row) for row in rows] == [[], [], []]
    assert not Guard(GuardConfig(action="off")).see({"step": 1, "train/kl": 99.0})


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(action="panic"), "action is 'panic', none of 'off', 'warn'"),
        (dict(window=0), "at least 1"),
        (dict(lr=1.5), "lr=1.5 must be above 0 and at most 1"),
        (dict(kl=-1.0), "kl=-1.0 must be at least 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        GuardConfig(**wrong)
