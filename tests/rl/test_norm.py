"""Normalisations against numpy and the published formulas; rollouts in and out of baseline and
loss; and what length takes from a reward."""

import itertools
import random

import numpy as np
import pytest

from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rl import summary
from jaxdeep.rl.advantages import (
    EPS,
    RULES,
    Norm,
    Rules,
    assign_advantages,
    baseline_rewards,
    informative,
    normalise,
    solved_share,
    to_rows,
)
from jaxdeep.rl.shaping import Shaping, shaped
from jaxdeep.types import Branch, Piece, Stop, Task, Trajectory


def trajectory(reward, *, task="t", sampled=3, world=4, stop=Stop.FINISHED, prompt=7):
    pieces = [Piece([prompt] * world, "world"), Piece([1] * sampled, "policy", [-0.5] * sampled)]
    return Trajectory(Task(task, "?"), branches=[Branch(pieces)], reward=reward, stop=stop)


def advantages(groups, rules=RULES):
    assign_advantages(groups, rules)
    return [[t.advantage for t in group] for group in groups]


def rows(groups, rules=RULES):
    """The rows and metrics of a step."""
    rewards = assign_advantages(groups, rules)
    return to_rows(groups), summary.advantage_metrics(groups, rewards, rules)


LEVELS = ("group", "batch", "none")
NORMS = [
    Norm(mean, std, out, unbiased)
    for mean, std, out, unbiased in itertools.product(LEVELS, LEVELS, (False, True), (False, True))
    if (std != "group" or mean == "group") and (mean != "none" or (std == "none" and not out))
]


def reference(groups, norm):
    """By loops, each statistic from the list of numbers it is over."""
    flat = [r for group in groups for r in group if r is not None]
    out = []
    for group in groups:
        mine = [r for r in group if r is not None]
        found = []
        for r in group:
            if r is None:
                found.append(None)
                continue
            peers = {"group": mine, "batch": flat, "none": []}
            centre = list(peers[norm.mean])
            if norm.leave_one_out and len(centre) > 1:
                centre.remove(r)
            a = r - (sum(centre) / len(centre) if centre else 0.0)
            if norm.std != "none":
                around = peers[norm.std]
                mean = sum(around) / len(around)
                squares = sum((x - mean) ** 2 for x in around)
                a /= (squares / (len(around) - norm.unbiased)) ** 0.5 + EPS
            found.append(a)
        out.append(found)
    return out


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_every_normalisation_equals_its_definition(norm):
    rng = random.Random(str(norm))
    for _ in range(20):
        groups = [
            [rng.choice([0.0, 1.0, rng.random()]) for _ in range(rng.randint(2, 6))]
            for _ in range(rng.randint(1, 4))
        ]
        for group in groups[1:]:
            group += [None] * rng.randint(0, 2)
        for mine, want in zip(normalise(groups, norm), reference(groups, norm), strict=True):
            assert [a is None for a in mine] == [a is None for a in want]
            assert [a for a in mine if a is not None] == pytest.approx(
                [a for a in want if a is not None], rel=1e-9, abs=1e-9
            )


def test_published_formulas():
    r = np.array([[1.0, 0.0, 0.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.0, 0.7]])
    G = r.shape[1]

    def ours(**fields):
        return np.array(normalise(r.tolist(), Norm(**fields)))

    mean, std = r.mean(1, keepdims=True), r.std(1, ddof=1, keepdims=True)
    near = dict(rtol=1e-5)
    np.testing.assert_allclose(ours(std="group"), (r - mean) / std, **near)  # GRPO
    np.testing.assert_allclose(ours(), r - mean, **near)  # Dr. GRPO
    others = (r.sum(1, keepdims=True) - r) / (G - 1)
    np.testing.assert_allclose(ours(leave_one_out=True), r - others, **near)  # RLOO
    batch = (r - r.mean()) / r.std(ddof=1)
    np.testing.assert_allclose(ours(mean="batch", std="batch"), batch, **near)  # REINFORCE++
    np.testing.assert_allclose(ours(std="batch"), (r - mean) / r.std(ddof=1), **near)  # Lite PPO
    np.testing.assert_allclose(ours(mean="none"), r)  # REINFORCE


def test_equal_rewards_stay_numbers_under_every_norm():
    for norm in NORMS:
        found = normalise([[1.0, 1.0, 1.0], [1.0, 1.0, None]], norm)
        want = 1.0 if norm.mean == "none" else 0.0
        assert [a for g in found for a in g] == [want] * 5 + [None], norm


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(mean="batch", std="group"), "grpo.norm.std='group' needs grpo.norm.mean='group'"),
        (dict(mean="none", std="batch"), "both are about a mean"),
        (dict(mean="none", leave_one_out=True), "both are about a mean"),
    ],
)
def test_a_norm_that_divides_by_nothing_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        Norm(**fields)


CUT = Stop.MAX_TOKENS


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("keep", [2 / 3, -1 / 3, -1 / 3]),
        ("baseline", [2 / 3, -1 / 3, None]),
        ("drop", [0.5, -0.5, None]),
    ],
)
def test_truncated_rollouts_are_in_baseline_and_loss_as_named(how, want):
    group = [trajectory(1.0), trajectory(0.0), trajectory(0.0, stop=CUT)]
    (found,) = advantages([group], Rules(truncated=how))
    assert found == [None if a is None else pytest.approx(a) for a in want]
    assert len(rows([group], Rules(truncated=how))[0]) == sum(a is not None for a in want)


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("keep", [2 / 3, -1 / 3, -1 / 3]),
        ("baseline", [2 / 3, -1 / 3, None]),
        ("drop", [0.5, -0.5, None]),
    ],
)
def test_failed_rollouts_are_in_baseline_and_loss_as_named(how, want):
    group = [trajectory(1.0), trajectory(0.0), trajectory(None, stop=Stop.FAILED)]
    (found,) = advantages([group], Rules(failed=how))
    assert found == [None if a is None else pytest.approx(a) for a in want]
    # a limit and a judge that failed at once: the rule for failures decides
    group[2] = trajectory(None, stop=CUT)
    assert advantages([group], Rules(failed=how, truncated="keep")) == [found]


def test_a_rollout_that_sampled_nothing_is_in_the_baseline_alone():
    group = [trajectory(1.0), trajectory(0.0, sampled=0), trajectory(0.5)]
    assert advantages([group]) == [[0.5, None, 0.0]]


def test_groups_of_equal_rewards_are_kept_or_left_out():
    flat, live = [trajectory(1.0, task="a")] * 2, [trajectory(r, task="b") for r in (0.0, 1.0)]
    for how, want in (("drop", 2), ("resample", 2), ("keep", 4)):
        found, metrics = rows([flat, live], Rules(flat=how))
        assert len(found) == want and metrics["grpo/flat_groups"] == 0.5
        assert metrics["grpo/rows"] == want and metrics["grpo/loss_tokens"] == 3 * want
    assert not informative(flat, [1.0, 1.0], Rules()) and informative(live, [0.0, 1.0], Rules())
    # Under the mean of a batch equal rewards are a signal; left out, they are not in it either.
    norm = Norm(mean="batch")
    assert advantages([flat, live], Rules(norm, "keep"))[0] == [0.25, 0.25]
    assert advantages([flat, live], Rules(norm, "drop")) == [[None, None], [-0.5, 0.5]]
    cut = [trajectory(r, stop=CUT) for r in (0.0, 1.0)]
    assert not informative(cut, [0.0, 1.0], Rules(truncated="baseline"))


def test_one_task_has_one_group_and_one_prompt():
    group = [trajectory(0.0), trajectory(1.0)]
    with pytest.raises(ValueError, match=r"more than one group of a step: \['t'\]"):
        rows([group, group])
    with pytest.raises(DataError, match="'t' have 2 different prompts"):
        rows([[trajectory(0.0), trajectory(1.0, prompt=8)]])


def test_a_groups_order_and_its_place_change_no_advantage():
    rng = random.Random(0)
    groups = [[trajectory(rng.random(), task=name) for _ in range(4)] for name in "abc"]
    for norm in NORMS:
        rules = Rules(norm, "keep")
        want = {id(t): a for g, p in zip(groups, advantages(groups, rules), strict=True)
                for t, a in zip(g, p, strict=True)}  # fmt: skip
        mixed = [rng.sample(g, 4) for g in rng.sample(groups, 3)]
        for group, pushed in zip(mixed, advantages(mixed, rules), strict=True):
            assert pushed == pytest.approx([want[id(t)] for t in group], rel=1e-9)


def test_solved_is_a_share_of_what_was_judged():
    group = [trajectory(r) for r in (1.0, 0.5, 1.2, None)]
    assert solved_share(group, 1.0) == pytest.approx(2 / 3)
    assert solved_share(group, 2.0) == 0.0
    assert solved_share([trajectory(None)], 1.0) is None


def test_the_soft_penalty_for_long_conversations_is_dapos():
    # L_max 20, the last fifth of it: nothing up to 16 tokens, all of it at 20
    group = [trajectory(1.0, sampled=n, world=4) for n in (4, 12, 13, 14, 16, 30)]
    found = shaped(group, [1.0] * 6, Shaping(overlong=1.0, window=0.2), limit=20, solved=1.0)
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.0, 0.0])
    found = shaped(group, [None] * 6, Shaping(overlong=1.0), limit=20, solved=1.0)
    assert found == [None] * 6
    # a result that did not fit ended it early: cut is cut
    group[0].stop, group[1].stop = Stop.MAX_TOKENS, Stop.MAX_TURNS
    found = shaped(group[:2], [1.0] * 2, Shaping(overlong=1.0), limit=20, solved=1.0)
    assert found == [0.0, 1.0]


def test_the_length_reward_is_kimis():
    group = [trajectory(0.0, sampled=n) for n in (10, 15, 20, 20)]
    how = dict(limit=100, solved=1.0)
    found = shaped(group, [1.0, 1.0, 1.0, None], Shaping(length=0.4), **how)
    assert found == [pytest.approx(1.2), pytest.approx(1.0), pytest.approx(0.8), None]
    found = shaped(group, [0.0, 0.0, 0.0, 0.0], Shaping(length=0.4), **how)
    assert found == pytest.approx([0.0, 0.0, -0.2, -0.2])
    assert shaped(group[2:], [1.0, 0.0], Shaping(length=0.4), **how) == [1.0, 0.0]  # equal lengths


def test_shaping_changes_advantages_and_leaves_the_reward_that_is_logged():
    group = [trajectory(1.0, sampled=4), trajectory(1.0, sampled=8)]
    rules = Rules(shaping=Shaping(overlong=1.0, window=0.5), limit=12)
    assert advantages([group]) == [[None, None]]
    assert advantages([group], rules) == [pytest.approx([1 / 3, -1 / 3])]
    _, metrics = rows([group], rules)
    assert metrics["reward/shaped"] == pytest.approx(1 - 2 / 3) and group[1].reward == 1.0
    assert "reward/shaped" not in rows([group])[1]


@pytest.mark.parametrize("bad", [dict(overlong=-1.0), dict(window=0.0), dict(length=float("nan"))])
def test_shaping_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match=f"Shaping.{next(iter(bad))}="):
        Shaping(**bad)


def test_rewards_that_are_known_are_not_computed_again(monkeypatch):
    def groups():
        return [[trajectory(r, task=task) for r in (0.0, 1.0, None)] for task in "ab"]

    rules = Rules(shaping=Shaping(length=0.5), limit=9)
    known = [baseline_rewards(group, rules) for group in groups()]
    want, found = groups(), groups()
    assert assign_advantages(want, rules) == known
    monkeypatch.setattr("jaxdeep.rl.advantages.shaped", None)
    assign_advantages(found, rules, known)
    assert [t.advantage for g in found for t in g] == [t.advantage for g in want for t in g]
