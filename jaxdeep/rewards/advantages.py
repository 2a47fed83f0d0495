"""From scored rollouts to rows: group-relative advantages, and what is left out of them.

    A_i = r_i - mean of the rewards of its group        no division by the standard deviation

A rollout that cannot be judged (the world failed) is in neither baseline nor loss. A group whose
rewards are all equal teaches nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxdeep.data.pack import to_row
from jaxdeep.errors import ConfigError
from jaxdeep.types import Row, Trajectory


def advantages(rewards: Sequence[float | None]) -> list[float | None]:
    """The advantage of each rollout of one group; None where it has no part in the loss."""
    if len(rewards) < 2:
        raise ConfigError(
            f"a group of {len(rewards)} has no baseline: grpo.group must be at least 2"
        )
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or max(known) - min(known) < 1e-8:
        return [None] * len(rewards)
    mean = float(np.mean(known))
    return [None if r is None else r - mean for r in rewards]


def rows(groups: Sequence[Sequence[Trajectory]]) -> tuple[list[Row], dict[str, float]]:
    """The rows to learn from, and metrics of the groups."""
    out, flat, void = [], 0, 0
    for group in groups:
        if len({t.task.id for t in group}) != 1:
            raise ValueError(f"a group holds several tasks: {sorted({t.task.id for t in group})}")
        pushed = advantages([t.reward for t in group])
        void += sum(t.reward is None for t in group)
        flat += all(a is None for a in pushed)
        for trajectory, advantage in zip(group, pushed, strict=True):
            if advantage is not None and trajectory.sampled:
                out.append(to_row(trajectory.pieces, advantage=advantage))
    return out, {"grpo/flat_groups": flat / len(groups), "grpo/void_rollouts": float(void)}
