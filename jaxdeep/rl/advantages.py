"""From scored rollouts to rows of a batch: the weight of each rollout in the loss, and which are
left out.

    assign_advantages(groups, rules)    reward -> shaped reward -> A_i = (r_i - mean) / std
    to_rows(groups)                     a row for each branch of a rollout that has an advantage

`Norm` says over which rollouts the mean and the standard deviation are taken: those of the same
task (group), all of the step (batch), or none. Its four fields express GRPO (arXiv 2402.03300: mean
and std of the group), Dr. GRPO (2503.20783: mean of the group), RLOO (2402.14740: mean of the
others of the group) and REINFORCE++ (2501.03262: mean and std of the batch).

`Rules` adds what happens to a rollout that a limit cut, to one without a reward because the world
failed, and to a group whose rewards are all equal: under a group mean its advantages are all 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from jaxdeep.data.pack import to_row
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rl.objective import Aggregate
from jaxdeep.rl.shaping import Shaping, shaped
from jaxdeep.settings import AtLeast, Finite, section
from jaxdeep.types import Row, Trajectory

EPS = 1e-6  # added to a standard deviation, so that equal rewards are not divided by 0
EQUAL = 1e-8  # rewards that differ by less are equal: weighted sums round differently

Level = Literal["group", "batch", "none"]
Part = Literal["keep", "baseline", "drop"]


@section
class Norm:
    """What is subtracted from a reward, and what the difference is divided by."""

    mean: Annotated[Level, "rollouts whose mean is subtracted"] = "group"
    std: Annotated[Level, "rollouts whose standard deviation divides"] = "none"
    leave_one_out: Annotated[bool, "the mean is over the other rollouts"] = False
    unbiased: Annotated[bool, "the variance divides by n - 1 rather than n"] = True

    def __post_init__(self) -> None:
        if self.std == "group" and self.mean != "group":
            raise ConfigError(
                f"grpo.norm.std='group' needs grpo.norm.mean='group', not {self.mean!r}: in a "
                "group of equal rewards a difference from another mean would be divided by 0"
            )
        if self.mean == "none" and (self.std != "none" or self.leave_one_out):
            raise ConfigError(
                f"grpo.norm.mean='none' with grpo.norm.std={self.std!r} and "
                f"grpo.norm.leave_one_out={self.leave_one_out}: both are about a mean"
            )


@section
class AdvantageSettings:
    """Which rollouts count, and how: the settings of the section `grpo` about it."""

    norm: Norm = dataclasses.field(default_factory=Norm)
    flat: Annotated[
        Literal["drop", "keep", "resample"],
        "groups of equal rewards: out of the loss, in it, or out with other tasks in their place",
    ] = "drop"
    truncated: Annotated[
        Part,
        "rollouts that a limit cut: in baseline and loss, in the baseline alone, or in neither",
    ] = "keep"
    failed: Annotated[Part, "rollouts without a reward; where they count it is 0"] = "drop"
    shaping: Shaping = dataclasses.field(default_factory=Shaping)
    solved: Annotated[float, Finite(), "the reward from which on a task counts as solved"] = 1.0


@section
class Rules(AdvantageSettings):
    """The settings with a limit that shaping compares lengths with."""

    limit: Annotated[int, AtLeast(0), "tokens of a branch, at most"] = 0


RULES = Rules()


def assign_advantages(
    groups: Sequence[Sequence[Trajectory]],
    rules: Rules = RULES,
    rewards: Sequence[Sequence[float | None]] | None = None,
) -> Sequence[Sequence[float | None]]:
    """Set `advantage` of every rollout of a step, None where it has no part in the loss.

    `rewards` are those that are compared, as `baseline_rewards` gives them for each group; without
    them they are computed here. They are returned, so that metrics need not compute them again.
    Raises for a group of one rollout, of several tasks or of several prompts, and for a task in
    several groups.
    """
    _check(groups)
    if rewards is None:
        rewards = [baseline_rewards(group, rules) for group in groups]
    compared = rewards
    if rules.flat != "keep":
        compared = [[None] * len(group) if is_flat(group) else group for group in rewards]
    for group, advantages in zip(groups, normalise(compared, rules.norm), strict=True):
        for trajectory, advantage in zip(group, advantages, strict=True):
            trajectory.advantage = advantage if in_loss(trajectory, rules) else None
    return rewards


def to_rows(groups: Sequence[Sequence[Trajectory]], aggregate: Aggregate = "token") -> list[Row]:
    """The rows to learn from, in the order of the rollouts: one for each branch that has sampled
    tokens, of each rollout that has an advantage, which all its branches share.

    Each branch is a sequence of its own to the loss, which averages within sequences where
    `aggregate` is "sequence". There a branch counts as much as its share of the rollout's sampled
    tokens, by the weights of its tokens, so that a rollout counts as one however many it has.
    """
    rows = []
    for trajectory in learned(groups):
        for branch in trajectory.branches:
            if not branch.sampled:
                continue
            row = to_row(branch.pieces, advantage=trajectory.advantage)
            if aggregate == "sequence":
                share = np.float32(branch.sampled / trajectory.sampled)
                row = row._replace(learn=row.learn * share, advantage=row.advantage * share)
            rows.append(row)
    return rows


def learned(groups: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    """The rollouts that have a part in the loss."""
    return [t for group in groups for t in group if t.advantage is not None and t.sampled]


def normalise(groups: Sequence[Sequence[float | None]], norm: Norm) -> list[list[float | None]]:
    """The advantage of each reward, None for None. With a mean over the group, a reward that has no
    other beside it has none either."""
    groups = [
        [None] * len(group) if norm.mean == "group" and _present(group).size < 2 else group
        for group in groups
    ]
    batch = np.concatenate([_present(group) for group in groups])

    def one(reward: float, group: Sequence[float | None]) -> float:
        if norm.mean != "none":
            peers = _present(group) if norm.mean == "group" else batch
            reward -= float(peers.mean())
            if norm.leave_one_out and peers.size > 1:
                # r - mean = (n - 1) / n x (r - mean of the others)
                reward *= peers.size / (peers.size - 1)
        if norm.std != "none":
            peers = _present(group) if norm.std == "group" else batch
            reward /= float(peers.std(ddof=norm.unbiased and peers.size > 1)) + EPS
        return reward

    return [[None if r is None else one(r, group) for r in group] for group in groups]


def baseline_rewards(group: Sequence[Trajectory], rules: Rules) -> list[float | None]:
    """The shaped reward with which each rollout of a group enters the baseline, None where it does
    not."""
    rewards = []
    for trajectory in group:
        failed = trajectory.reward is None
        rule = rules.failed if failed else rules.truncated if trajectory.stop.truncated else "keep"
        rewards.append(None if rule == "drop" else 0.0 if failed else trajectory.reward)
    return shaped(group, rewards, rules.shaping, limit=rules.limit, solved=rules.solved)


def in_loss(trajectory: Trajectory, rules: Rules) -> bool:
    """Whether a rollout that has an advantage is learned from."""
    if trajectory.reward is None:
        return rules.failed == "keep" and trajectory.sampled > 0
    return trajectory.sampled > 0 and (rules.truncated == "keep" or not trajectory.stop.truncated)


def is_flat(rewards: Sequence[float | None]) -> bool:
    """Whether there is nothing to compare: fewer than two rewards, or all of them equal."""
    present = _present(rewards)
    return present.size < 2 or float(np.ptp(present)) < EQUAL


def informative(group: Sequence[Trajectory], rewards: Sequence[float | None], rules: Rules) -> bool:
    """Whether a group has different rewards to compare, as `baseline_rewards` gave them, and a
    rollout to learn from."""
    return not is_flat(rewards) and any(in_loss(t, rules) for t in group)


def solved_share(group: Sequence[Trajectory], solved: float) -> float | None:
    """The share of rollouts whose reward is at least `solved`, of those that have one; None where
    none has."""
    rewards = _present([t.reward for t in group])
    return float((rewards >= solved).mean()) if rewards.size else None


def _present(rewards: Sequence[float | None]) -> np.ndarray:
    return np.asarray([r for r in rewards if r is not None], np.float64)


def _check(groups: Sequence[Sequence[Trajectory]]) -> None:
    for group in groups:
        _check_group(group)
    ids = [group[0].task.id for group in groups]
    if len(set(ids)) < len(ids):
        repeated = sorted({id for id in ids if ids.count(id) > 1})
        raise ValueError(f"tasks in more than one group of a step: {repeated}")


def _check_group(group: Sequence[Trajectory]) -> None:
    """A group compares rollouts of one task from one first prompt; what later branches begin with
    is the rollout's own doing. This hashes every prompt, so it runs once a step."""
    if len(group) < 2:
        raise ConfigError(f"a group of {len(group)} has no baseline: grpo.group must be at least 2")
    if len({t.task.id for t in group}) != 1:
        raise ValueError(f"a group holds several tasks: {sorted({t.task.id for t in group})}")
    # One that failed in env.open has no branch.
    prompts = {tuple(t.branches[0].pieces[0].tokens) for t in group if t.branches}
    if len(prompts) > 1:
        raise DataError(
            f"the rollouts of task {group[0].task.id!r} have {len(prompts)} different prompts, so "
            "their rewards cannot be compared: Env.open must return the same messages each time"
        )
