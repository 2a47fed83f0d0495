"""What a rollout's length takes from its reward, before advantages are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxdeep.errors import ConfigError
from jaxdeep.types import Stop, Trajectory


@dataclasses.dataclass(frozen=True)
class Shaping:
    """Two penalties, both off.

    `overlong`: what a conversation loses that fills `rollout.limits.max_tokens` or was cut for it; the loss
    grows from nothing over the last `window` of that limit, as a share of it (DAPO, arXiv 2503.14476: 1.0
    and 0.2).
    `length`: between the shortest and the longest rollout of a group, in tokens sampled, a solved one
    gets from +length / 2 to -length / 2, another at most nothing (Kimi k1.5, arXiv 2501.12599).
    """

    overlong: float = 0.0
    window: float = 0.2
    length: float = 0.0

    def __post_init__(self) -> None:
        if not (self.overlong >= 0 and self.length >= 0 and 0 < self.window <= 1):
            raise ConfigError(
                f"shaping.overlong={self.overlong} and shaping.length={self.length} must not be below 0 "
                f"and shaping.window={self.window} must be in (0, 1]"
            )


def shaped(
    group: Sequence[Trajectory],
    rewards: Sequence[float | None],
    shaping: Shaping,
    *,
    limit: int,
    solved: float,
) -> list[float | None]:
    """The rewards of a group with the penalties; None stays None. `limit` is in tokens of the whole
    conversation, a rollout whose reward is at least `solved` is solved."""
    lengths = [t.sampled for t, r in zip(group, rewards, strict=True) if r is not None]
    out = []
    for trajectory, reward in zip(group, rewards, strict=True):
        if reward is None:
            out.append(None)
            continue
        extra = 0.0
        if shaping.length and max(lengths) > min(lengths):
            place = (trajectory.sampled - min(lengths)) / (max(lengths) - min(lengths))
            extra = 0.5 - place if reward >= solved else min(0.0, 0.5 - place)
        over = 0.0
        if shaping.overlong:
            room = shaping.window * limit
            over = float(np.clip((len(trajectory.tokens) - (limit - room)) / room, 0, 1))
            if trajectory.stop is Stop.MAX_TOKENS:  # what came next did not fit
                over = 1.0
        out.append(reward + shaping.length * extra - shaping.overlong * over)
    return out
