"""From scored rollouts to rows: what each rollout counts for, and what is left out.

    reward -> shaped -> A_i = (r_i - mean) / std -> row

`Norm` says over what the mean and the standard deviation are taken: the rollouts of one task (group),
all of a step (batch), or none. Its four fields express GRPO (arXiv 2402.03300: mean and std of the
group), Dr. GRPO (2503.20783: mean of the group), RLOO (2402.14740: mean of the others of the group) and
REINFORCE++ (2501.03262: mean and std of the batch).

`Rules` says what happens to a rollout that a limit cut, to one that has no reward because the world
failed, and to a group whose rewards are all equal, which under a group mean teaches nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxdeep.data.pack import to_row
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rl.shaping import Shaping, shaped
from jaxdeep.types import Row, Trajectory

EPS = 1e-6  # beside a standard deviation, so that equal rewards are divided by something
EQUAL = 1e-8  # rewards this near are one reward

Level = Literal["group", "batch", "none"]
Part = Literal["keep", "baseline", "drop"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """What is taken from a reward, and what the rest is divided by."""

    mean: Level = "group"
    std: Level = "none"
    leave_one_out: bool = False  # the mean is that of the others
    unbiased: bool = True  # the variance is a sum over n - 1 rather than n

    def __post_init__(self) -> None:
        if self.std == "group" and self.mean != "group":
            raise ConfigError(
                f"norm.std='group' needs norm.mean='group', not {self.mean!r}: a group of equal rewards "
                "would be divided by nothing"
            )
        if self.mean == "none" and (self.std != "none" or self.leave_one_out):
            raise ConfigError(
                f"norm.mean='none' with norm.std={self.std!r} and leave_one_out={self.leave_one_out}: "
                "both are about a mean"
            )


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which rollouts count, and how.

    `truncated` (ended by a limit) and `failed` (without a reward; where one counts, it is 0): "keep" in
    baseline and loss, in the "baseline" alone, or "drop" from both. `flat`: groups of equal rewards
    are left out ("drop"), kept, or left out and other tasks drawn in their place ("resample"). `limit`
    and `solved` are as in `shaping.shaped`.
    """

    norm: Norm = Norm()
    flat: Literal["drop", "keep", "resample"] = "drop"
    truncated: Part = "keep"
    failed: Part = "drop"
    shaping: Shaping = dataclasses.field(default_factory=Shaping)
    limit: int = 0
    solved: float = 1.0


RULES = Rules()


def rows(
    groups: Sequence[Sequence[Trajectory]], rules: Rules = RULES
) -> tuple[list[Row], dict[str, float]]:
    """The rows to learn from, and metrics; each advantage is noted on its trajectory. `grpo/loss_tokens` is how many tokens were sampled for these
    rows: what the masks of their batches must add up to."""
    out, tokens = [], 0
    for group, pushed in zip(groups, advantages(groups, rules), strict=True):
        for trajectory, advantage in zip(group, pushed, strict=True):
            trajectory.advantage = advantage
            if advantage is not None:
                out.append(to_row(trajectory.pieces, advantage=advantage))
                tokens += trajectory.sampled
    rewards = [counted(group, rules) for group in groups]
    found = {
        "grpo/flat_groups": sum(map(is_flat, rewards)) / len(groups),
        "grpo/void_rollouts": float(sum(t.reward is None for group in groups for t in group)),
        "grpo/rows": float(len(out)),
        "grpo/loss_tokens": float(tokens),
    }
    if rules.shaping.overlong or rules.shaping.length:
        every = np.concatenate([known(group) for group in rewards])
        found["reward/shaped"] = float(every.mean()) if every.size else float("nan")
    return out, found


def advantages(
    groups: Sequence[Sequence[Trajectory]], rules: Rules = RULES
) -> list[list[float | None]]:
    """The advantage of each rollout; None where it has no part in the loss."""
    rewards = [counted(group, rules) for group in groups]
    ids = [group[0].task.id for group in groups]
    if len(set(ids)) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise ValueError(f"tasks in more than one group of a step: {twice}")
    if rules.flat != "keep":
        rewards = [[None] * len(group) if is_flat(group) else group for group in rewards]
    return [
        [a if in_loss(t, rules) else None for t, a in zip(group, pushed, strict=True)]
        for group, pushed in zip(groups, normalise(rewards, rules.norm), strict=True)
    ]


def normalise(groups: Sequence[Sequence[float | None]], norm: Norm) -> list[list[float | None]]:
    """The advantage of each reward; None stays None, and a single reward has no mean of a group."""
    groups = [
        [None] * len(group) if norm.mean == "group" and known(group).size < 2 else group
        for group in groups
    ]
    batch = np.concatenate([known(group) for group in groups])

    def one(reward: float, group: Sequence[float | None]) -> float:
        if norm.mean != "none":
            peers = known(group) if norm.mean == "group" else batch
            reward -= float(peers.mean())
            if norm.leave_one_out and peers.size > 1:
                reward *= peers.size / (peers.size - 1)  # = the reward less the mean of the others
        if norm.std != "none":
            peers = known(group) if norm.std == "group" else batch
            reward /= float(peers.std(ddof=norm.unbiased and peers.size > 1)) + EPS
        return reward

    return [[None if r is None else one(r, group) for r in group] for group in groups]


def counted(group: Sequence[Trajectory], rules: Rules) -> list[float | None]:
    """What each rollout brings to the baseline: its shaped reward, None where it has no part in it."""
    check(group)
    rewards = []
    for trajectory in group:
        failed = trajectory.reward is None
        how = rules.failed if failed else rules.truncated if trajectory.stop.truncated else "keep"
        rewards.append(None if how == "drop" else 0.0 if failed else trajectory.reward)
    return shaped(group, rewards, rules.shaping, limit=rules.limit, solved=rules.solved)


def in_loss(trajectory: Trajectory, rules: Rules) -> bool:
    """Whether a rollout that has an advantage is learned from."""
    if trajectory.reward is None:
        return rules.failed == "keep" and trajectory.sampled > 0
    return trajectory.sampled > 0 and (rules.truncated == "keep" or not trajectory.stop.truncated)


def known(group: Sequence[float | None]) -> np.ndarray:
    """The rewards there are."""
    return np.asarray([r for r in group if r is not None], np.float64)


def is_flat(rewards: Sequence[float | None]) -> bool:
    """Whether there is nothing to compare: fewer than two rewards, or all of them equal."""
    found = known(rewards)
    return found.size < 2 or float(np.ptp(found)) < EQUAL


def informative(group: Sequence[Trajectory], rules: Rules) -> bool:
    """Whether a group has rewards to compare and rollouts to learn from."""
    return not is_flat(counted(group, rules)) and any(in_loss(t, rules) for t in group)


def solved_share(group: Sequence[Trajectory], solved: float) -> float | None:
    """The share of rollouts whose reward is at least `solved`; None where none has a reward."""
    rewards = known([t.reward for t in group])
    return float((rewards >= solved).mean()) if rewards.size else None


def check(group: Sequence[Trajectory]) -> None:
    """A group is of one task and one prompt, and of at least two, or its mean is no baseline."""
    if len(group) < 2:
        raise ConfigError(f"a group of {len(group)} has no baseline: grpo.group must be at least 2")
    if len({t.task.id for t in group}) != 1:
        raise ValueError(f"a group holds several tasks: {sorted({t.task.id for t in group})}")
    prompts = {tuple(t.pieces[0].tokens) for t in group if t.pieces}
    if len(prompts) > 1:
        raise DataError(
            f"the rollouts of task {group[0].task.id!r} have {len(prompts)} different prompts, so their "
            "rewards cannot be compared: env.open must say the same each time"
        )
