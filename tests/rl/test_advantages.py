"""Group advantages: centred, without the void, and as many learned tokens as were sampled."""

import random

import numpy as np
import pytest

from jaxdeep.errors import ConfigError
from jaxdeep.rl import summary
from jaxdeep.rl.advantages import RULES, assign_advantages, to_rows
from jaxdeep.types import Branch, Piece, Task, Trajectory


def trajectory(reward, *, task="t", sampled=3, mark=0):
    """Two policy turns of `sampled` tokens in all, the world saying `mark` between them."""
    first = min(sampled, 1)
    pieces = [
        Piece([8, 9], "world"),
        Piece([1] * first, "policy", [-0.5] * first),
        Piece([mark], "world"),
        Piece([2] * (sampled - first), "policy", [-0.25] * (sampled - first)),
    ]
    return Trajectory(Task(task, "?"), branches=[Branch(pieces)], reward=reward)


def advantages(rewards):
    """Those of one group."""
    group = [trajectory(r) for r in rewards]
    assign_advantages([group])
    return [t.advantage for t in group]


def rows(groups, rules=RULES):
    """The rows and metrics of a step."""
    rewards = assign_advantages(groups, rules)
    return to_rows(groups), summary.advantage_metrics(groups, rewards, rules)


def marked(row):
    """The mark of the rollout a row is of."""
    return next(int(t) for t in row.tokens if t >= 100)


def random_rewards(rng):
    choices = [0.0, 0.1, 1.0, rng.random()]
    void = rng.choice([0.0, 0.3])
    n = rng.randint(2, 9)
    return [None if rng.random() < void else rng.choice(choices) for _ in range(n)]


@pytest.mark.parametrize("seed", range(50))
def test_advantages_are_rewards_less_their_mean_without_the_void(seed):
    rewards = random_rewards(random.Random(seed))
    found = advantages(rewards)
    known = [r for r in rewards if r is not None]
    assert len(found) == len(rewards)
    if len(set(known)) < 2:
        assert found == [None] * len(rewards)
        return
    mean = sum(known) / len(known)
    assert found == [None if r is None else pytest.approx(r - mean, abs=1e-12) for r in rewards]
    assert sum(a for a in found if a is not None) == pytest.approx(0, abs=1e-12)


def test_a_void_rollout_moves_no_other():
    assert advantages([1.0, None, 0.0, None]) == [0.5, None, -0.5, None]
    # a void one is not a zero: that would be the mean of three
    assert advantages([1.0, 0.0, 0.0]) == [pytest.approx(x) for x in (2 / 3, -1 / 3, -1 / 3)]


def test_no_division_by_the_deviation():
    assert advantages([0.0, 10.0]) == [-5.0, 5.0]
    assert advantages([0.0, 0.1]) == [pytest.approx(-0.05), pytest.approx(0.05)]


@pytest.mark.parametrize(
    "rewards", [[0.0, 0.0], [1.0, None, 1.0], [None, None], [1.0, None], [0.3, 0.1 + 0.2]]
)
def test_a_group_that_teaches_nothing_is_left_out(rewards):
    assert advantages(rewards) == [None] * len(rewards)
    found, metrics = rows([[trajectory(r) for r in rewards]])
    assert found == []
    assert metrics["grpo/flat_groups"] == 1.0
    assert metrics["grpo/void_rollouts"] == rewards.count(None)


@pytest.mark.parametrize("rewards", [[], [1.0], [None]])
def test_a_group_without_a_baseline_is_refused(rewards):
    with pytest.raises(ConfigError, match=f"group of {len(rewards)} .*at least 2"):
        advantages(rewards)


def test_a_group_of_one_is_refused_before_a_step_learns_from_it():
    with pytest.raises(ConfigError, match="at least 2"):
        rows([[trajectory(1.0), trajectory(0.0)], [trajectory(1.0)]])


def test_a_group_of_several_tasks_is_refused():
    with pytest.raises(ValueError, match=r"several tasks.*'a', 'b'"):
        rows([[trajectory(1.0, task="a"), trajectory(0.0, task="b")]])
    found, _ = rows(
        [[trajectory(r, task=task) for r in (0.0, 1.0)] for task in ("a", "b")]
    )  # one task a group
    assert len(found) == 4


@pytest.mark.parametrize("seed", range(20))
def test_rows_carry_their_own_advantage_on_exactly_what_was_sampled(seed):
    rng = random.Random(seed)
    groups, number = [], 0
    for task in range(rng.randint(1, 5)):
        group = []
        for reward in random_rewards(rng):
            group.append(
                trajectory(reward, task=str(task), sampled=rng.randint(0, 6), mark=100 + number)
            )
            number += 1
        groups.append(group)
    want = {
        t.pieces[2].tokens[0]: (t, a)
        for group in groups
        for t, a in zip(group, advantages([t.reward for t in group]), strict=True)
        if a is not None and t.sampled
    }
    found, metrics = rows(groups)
    assert {marked(row) for row in found} == set(want) and len(found) == len(want)
    for row in found:
        t, advantage = want[marked(row)]
        assert row.tokens.tolist() == t.tokens
        assert row.learn.sum() == t.sampled
        pushed = row.advantage[row.learn > 0]
        assert pushed == pytest.approx(np.full(t.sampled, advantage), abs=1e-6)
        assert not row.advantage[row.learn == 0].any()
        sampled = [x for piece in t.pieces for x in (piece.logps or [0.0] * len(piece.tokens))]
        assert row.logp.tolist() == sampled
    rewards = [[t.reward for t in group] for group in groups]
    flat = sum(len({r for r in group if r is not None}) < 2 for group in rewards)
    assert metrics["grpo/flat_groups"] == pytest.approx(flat / len(groups))
    assert metrics["grpo/void_rollouts"] == sum(group.count(None) for group in rewards)


def test_a_rollout_at_the_mean_stays_in_the_count_of_tokens():
    # its gradient is zero, but the loss is divided by the tokens of all that were judged
    found, _ = rows([[trajectory(r, sampled=4) for r in (0.0, 0.5, 1.0)]])
    assert sum(row.learn.sum() for row in found) == 12
