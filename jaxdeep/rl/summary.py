"""Metrics of a GRPO step, from its scored rollouts and the trainer's log-probabilities of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxdeep.agent.rollout import tools_of
from jaxdeep.data.pack import unpack
from jaxdeep.errors import DataError
from jaxdeep.rl.health import health
from jaxdeep.types import Row, Stop, Trajectory

VOID_STEPS = 3  # this many steps in a row without a single reward stop a run


def refuse_void(groups: Sequence[Sequence[Trajectory]], void: int, step: int) -> int:
    """How many steps in a row had no reward at all, this one included; DataError where they are too many."""
    every = [t for g in groups for t in g]
    if any(t.reward is not None for t in every):
        return 0
    if void + 1 >= VOID_STEPS:
        why = next((t.failure for t in every if t.failure), "the rewards are None")
        raise DataError(
            f"none of the {len(every)} rollouts of step {step} has a reward, nor of the {void} steps "
            f"before it. The first of them: {why}"
        )
    return void + 1


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """What the rollouts of a step have in common."""
    every = [t for g in groups for t in g]
    judged = [t for t in every if t.reward is not None]
    out = {"reward/mean": float(np.mean([t.reward for t in judged])) if judged else float("nan")}
    for name in every[0].rewards:
        values = [t.rewards[name] for t in judged]
        out[f"reward/{name}"] = float(np.mean(values)) if values else float("nan")
    for name in ("turns", "calls", "bad_calls", "sampled_tokens", "tool_seconds"):
        out[f"rollout/{name}"] = float(np.mean([t.metrics.get(name, 0.0) for t in every]))
    out |= tools_of(every)
    signs = [health(t) for t in every]
    out |= {f"rollout/{name}": float(np.mean([s[name] for s in signs])) for name in signs[0]}
    for stop in Stop:
        out[f"rollout/stop/{stop.value}"] = sum(t.stop is stop for t in every) / len(every)
    return out


def staleness(
    trajectories: Sequence[Trajectory], gaps: Sequence[np.ndarray | None], version: int
) -> dict[str, float]:
    """How many updates older than `version` the policy was that sampled the tokens of the loss, on average
    and at most; and the largest gap between trainer and sampler of the tokens where it was not older."""
    ages, apart = [np.zeros(0)], [np.zeros(0)]
    for trajectory, gap in zip(trajectories, gaps, strict=True):
        if gap is not None:
            said = [piece for piece in trajectory.pieces if piece.author == "policy"]
            ages.append(
                np.repeat([version - p.version for p in said], [len(p.tokens) for p in said])
            )
            apart.append(np.abs(gap))
    age, far = np.concatenate(ages), np.concatenate(apart)
    found = {"staleness": float(age.mean()), "max_staleness": float(age.max())}
    return found | ({"fresh_logp_diff": float(far[age == 0].max())} if (age == 0).any() else {})


def gaps_of(
    trajectories: Sequence[Trajectory], rows: Sequence[Row], logps: Sequence[np.ndarray], T: int
) -> list[np.ndarray | None]:
    """For each trajectory the trainer's log-probabilities less the sampler's, of its sampled tokens; None
    where it has no part in the loss. `logps` are the trainer's, [B, T] of each microbatch that `pack` made
    of `rows`."""
    trained = zip(rows, unpack(rows, logps, T), strict=True)
    gaps = ((logp - row.logp)[row.learn > 0] for row, logp in trained)
    return [None if t.advantage is None else next(gaps) for t in trajectories]
