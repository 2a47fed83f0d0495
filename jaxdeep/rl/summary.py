"""Metrics of a GRPO step, from its scored rollouts and the trainer's log-probabilities of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdeep.agent.rollout import mean_metrics, tools_of
from jaxdeep.data.pack import unpack
from jaxdeep.rl.advantages import Rules, is_flat
from jaxdeep.rl.health import health
from jaxdeep.rl.trouble import broken_share
from jaxdeep.types import Row, Stop, Trajectory


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Metrics of the rollouts of a step: rewards, `rollout/...` and `tool/...`. Means of rewards
    are over rollouts that have one, all others over all rollouts."""
    trajectories = [t for group in groups for t in group]
    judged = [t for t in trajectories if t.reward is not None]
    out = {"reward/mean": float(np.mean([t.reward for t in judged])) if judged else float("nan")}
    for name in trajectories[0].rewards:
        values = [t.rewards[name] for t in judged]
        out[f"reward/{name}"] = float(np.mean(values)) if values else float("nan")
    out |= {f"rollout/{name}": mean for name, mean in mean_metrics(trajectories).items()}
    out |= tools_of(trajectories)
    signs = [health(t) for t in trajectories]
    out |= {f"rollout/{name}": float(np.mean([sign[name] for sign in signs])) for name in signs[0]}
    out["rollout/unjudged"] = 1 - len(judged) / len(trajectories)
    out["rollout/unsampled"] = sum(not t.sampled for t in trajectories) / len(trajectories)
    out["rollout/broken_tools"] = broken_share(trajectories)
    for stop in Stop:
        share = sum(t.stop is stop for t in trajectories) / len(trajectories)
        out[f"rollout/stop/{stop.value}"] = share
    return out


def advantage_metrics(
    groups: Sequence[Sequence[Trajectory]], rewards: Sequence[Sequence[float | None]], rules: Rules
) -> dict[str, float]:
    """Metrics of a step whose advantages are assigned; `rewards` as `assign_advantages` returned
    them.

    `grpo/rows` is how many rows the step makes, and `grpo/loss_tokens` how many tokens were sampled
    for them: what the masks of its batches must add up to.
    """
    trajectories = [t for group in groups for t in group]
    learned = [t for t in trajectories if t.advantage is not None]
    out = {
        "grpo/flat_groups": sum(map(is_flat, rewards)) / len(groups),
        "grpo/void_rollouts": float(sum(t.reward is None for t in trajectories)),
        "grpo/rows": float(sum(_rows_of(t) for t in learned)),
        "grpo/loss_tokens": float(sum(t.sampled for t in learned)),
    }
    if rules.shaping.overlong or rules.shaping.length:
        present = [reward for group in rewards for reward in group if reward is not None]
        out["reward/shaped"] = float(np.mean(present)) if present else float("nan")
    return out


def engine_counts(
    readings: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> dict[str, float]:
    """What engines have done together between two readings of the metrics of each, one engine a
    process."""
    names = ("sampled", "prefilled", "reused", "paused", "compilations")
    done = {
        f"engine/{name}": sum(now[name] - before[name] for before, now in readings)
        for name in names
    }
    entered = done["engine/reused"] + done["engine/prefilled"]
    return done | {"engine/hit_rate": done["engine/reused"] / max(entered, 1)}


def staleness(
    trajectories: Sequence[Trajectory], gaps: Sequence[np.ndarray | None], version: int
) -> dict[str, float]:
    """The age of the tokens in the loss: how many updates before `version` the policy that sampled
    a token was made, on average and at most. `fresh_logp_diff` is the largest gap between trainer
    and sampler among tokens of age 0, where there are any: those have no reason to differ."""
    ages, distances = [np.zeros(0)], [np.zeros(0)]
    for trajectory, gap in zip(trajectories, gaps, strict=True):
        if gap is not None:
            pieces = [piece for piece in trajectory.pieces if piece.author == "policy"]
            sizes = [len(piece.tokens) for piece in pieces]
            ages.append(np.repeat([version - piece.version for piece in pieces], sizes))
            distances.append(np.abs(gap))
    age, distance = np.concatenate(ages), np.concatenate(distances)
    out = {"staleness": float(age.mean()), "max_staleness": float(age.max())}
    fresh = distance[age == 0]
    return out | ({"fresh_logp_diff": float(fresh.max())} if fresh.size else {})


def gaps_of(
    trajectories: Sequence[Trajectory], rows: Sequence[Row], logps: Sequence[np.ndarray], T: int
) -> list[np.ndarray | None]:
    """For each trajectory the trainer's log-probabilities minus the sampler's, of its sampled
    tokens over all branches; None where it has no part in the loss. `rows` are what `to_rows` made
    of them and `logps` the trainer's, [B, T] for each microbatch that `pack` made of `rows`."""
    trained = zip(rows, unpack(rows, logps, T), strict=True)
    gaps = ((logp - row.logp)[row.learn > 0] for row, logp in trained)
    return [
        None if t.advantage is None else np.concatenate(list(itertools.islice(gaps, _rows_of(t))))
        for t in trajectories
    ]


def _rows_of(trajectory: Trajectory) -> int:
    return sum(branch.sampled > 0 for branch in trajectory.branches)
