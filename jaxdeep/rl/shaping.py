"""What the length of a rollout takes from its reward, before advantages are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from jaxdeep.settings import Above, AtLeast, AtMost, section
from jaxdeep.types import Stop, Trajectory


@section
class Shaping:
    """Two penalties, both off by default.

    `overlong` is for conversations that come near `rollout.limits.max_tokens`. It grows linearly
    from 0 over the last `window` of that limit, a share of it, and is full at the limit or where
    the conversation was cut for it (DAPO, arXiv 2503.14476: 1.0 and 0.2).

    `length` prefers short solutions within a group. From the shortest rollout to the longest, in
    sampled tokens, a solved one gets from +length / 2 down to -length / 2; one that is not solved
    gets the same but never more than 0 (Kimi k1.5, arXiv 2501.12599).
    """

    overlong: Annotated[float, AtLeast(0), "reward lost at the limit of tokens; 0: none"] = 0.0
    window: Annotated[
        float, Above(0), AtMost(1), "share of rollout.limits.max_tokens over which it grows"
    ] = 0.2
    length: Annotated[
        float, AtLeast(0), "reward between the shortest and the longest of a group; 0: none"
    ] = 0.0


def shaped(
    group: Sequence[Trajectory],
    rewards: Sequence[float | None],
    shaping: Shaping,
    *,
    limit: int,
    solved: float,
) -> list[float | None]:
    """The rewards of a group less the penalties; None stays None. `limit` is the most tokens a
    branch may have; a rollout with a reward of at least `solved` is solved."""
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
            # The limit is of each branch, so the longest one says how near the rollout came to it.
            longest = max((len(branch.tokens) for branch in trajectory.branches), default=0)
            over = float(np.clip((longest - (limit - room)) / room, 0, 1))
            # What would have come next did not fit: cut is cut, however short it ended.
            if trajectory.stop is Stop.MAX_TOKENS:
                over = 1.0
        out.append(reward + shaping.length * extra - shaping.overlong * over)
    return out
