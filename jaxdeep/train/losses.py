"""What a step minimises: sums over tokens divided by one global count, so that packing, microbatches
and shards change nothing.

With r = p / p of `old` (the sampler; or the trainer before the step, see `Objective`), A the advantage,
and [low, high] around 1 the range of `Clip`:

    likelihood  -A log p                                  SFT: A = 1 on what the assistant wrote
    clip        -min(r A, clip(r) A)                      PPO, GRPO (arXiv 2402.03300), DAPO (2503.14476)
    gspo        the same, r the geometric mean of r over the tokens of a sequence (2507.18071)
    cispo       -stop_gradient(clip(r)) A log p           (2506.13585)
    binary_tv   -r A, but 0 where p - p of the sampler is above `high` and A > 0, or below -`low` and
                A < 0: the total variation of "this token or another" bounds the step (DPPO, 2602.04879)

To each token's loss may be added KL to the base (the adapter off), and taken from it an entropy bonus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.model import decoder, head
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl.objective import SFT, Clip, Objective
from jaxdeep.types import Batch

MISMATCH = ("mismatch_kl", "logp_diff", "max_logp_diff", "max_prob_diff", "ess")
"""Metrics that compare the policy with its sampler."""

MAX_LOG_RATIO = (
    20.0  # nats: log-ratios are held within it, so that no exponential of one leaves float32
)


class ReferenceLogps(NamedTuple):
    """Log-probabilities of a batch before the step, [B, T]: the trainer's own, the base's. None where
    nothing asks for them."""

    old_BT: jax.Array | None = None
    base_BT: jax.Array | None = None


NO_REFERENCE = ReferenceLogps()


def score(params: dict, adapter: Any, batch: Batch, *, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of each token of a packed batch that is learned, [B, T]."""
    hidden_BTD, _ = decoder.forward(
        params,
        adapter,
        batch.tokens_BT,
        cfg=cfg,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
    )
    wanted_BT = batch.learn_BT != 0
    return head.token_logps(params, hidden_BTD, batch.tokens_BT, cfg=cfg, wanted_BT=wanted_BT)


def loss(
    logp_BT: jax.Array,
    entropy_BT: jax.Array,
    batch: Batch,
    before: ReferenceLogps = NO_REFERENCE,
    *,
    objective: Objective = SFT,
) -> tuple[jax.Array, dict[str, dict[str, Any]]]:
    """The sum over learned tokens of the losses above, to be divided by `count`, and what to log.

    Metrics come as {"sum": ..., "max": ...}: how each adds up over microbatches.
    """
    learn_BT = batch.learn_BT
    sums = {"tokens": learn_BT.sum(), "entropy": (entropy_BT * learn_BT).sum()}
    most = {}
    # an advantage is 0 where nothing is learned; other terms are to be masked
    if objective.kind == "likelihood":
        loss_BT, ratio_BT = -logp_BT * batch.advantage_BT, jnp.ones_like(logp_BT)
    else:
        loss_BT, ratio_BT, cut = policy_loss(logp_BT, batch, before.old_BT, objective)
        more, most = mismatch(logp_BT, batch)
        sums |= {name: (x_BT * learn_BT).sum() for name, x_BT in (more | cut).items()}
    if objective.kl.coef:
        kl_BT = divergence(logp_BT, before.base_BT, objective.kl.kind) * learn_BT
        loss_BT += objective.kl.coef * kl_BT
        sums["kl"] = kl_BT.sum()
    if objective.entropy:
        loss_BT -= objective.entropy * bonus(logp_BT, entropy_BT, ratio_BT) * learn_BT
    if objective.aggregate == "sequence":
        loss_BT /= sizes(batch)
    total = loss_BT.sum()
    return total, {"sum": sums | {"loss": total}, "max": most}


def count(batches: Sequence[Batch], objective: Objective) -> float:
    """What the sum of the losses of all (numpy) microbatches of a step is divided by."""
    if objective.aggregate == "token":
        return sum(float(batch.learn_BT.sum()) for batch in batches)
    sequences = 0
    for batch in batches:
        B, T = batch.segments_BT.shape
        names_BT = batch.segments_BT + (T + 1) * np.arange(B)[:, None]  # no two rows share one
        sequences += np.unique(names_BT[batch.learn_BT > 0]).size
    return float(sequences * (objective.length if objective.aggregate == "constant" else 1))


def summary(totals: dict[str, dict[str, Any]], count: float) -> dict[str, Any]:
    """Metrics of all microbatches together: the loss, means over learned tokens by their weight (whose sum
    is "tokens"), largest values. `ess` is the effective sample size of the weights r against the sampler,
    as a share of the tokens."""
    sums = dict(totals["sum"])
    total, tokens = sums.pop("loss"), sums.pop("tokens")
    means = {name: value / tokens for name, value in sums.items()}
    if "ratio" in means:
        means["ess"] = means.pop("ratio") ** 2 / means.pop("ratio_squared")
    return {"loss": total / count} | means | totals["max"] | {"tokens": tokens}


def mismatch(logp_BT: jax.Array, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """How far the policy is from the sampler: by token, and the largest of the batch."""
    now_BT, stored_BT = mask_unlearned(logp_BT, batch), mask_unlearned(batch.logp_BT, batch)
    gap_BT, apart_BT = now_BT - stored_BT, jnp.exp(now_BT) - jnp.exp(stored_BT)
    ratio_BT = jnp.exp(clamp_log_ratio(gap_BT))
    tokens = {
        "mismatch_kl": ratio_BT - 1 - clamp_log_ratio(gap_BT),
        "logp_diff": jnp.abs(gap_BT),
        "ratio": ratio_BT,
        "ratio_squared": ratio_BT**2,
    }
    return tokens, {
        "max_logp_diff": jnp.abs(gap_BT).max(),
        "max_prob_diff": jnp.abs(apart_BT).max(),
    }


def policy_loss(
    logp_BT: jax.Array, batch: Batch, trainer_BT: jax.Array | None, objective: Objective
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss of each token, its ratio to the old policy, and which tokens were cut off by what."""
    clip, correction, advantage_BT = objective.clip, objective.correction, batch.advantage_BT
    now_BT, stored_BT = mask_unlearned(logp_BT, batch), mask_unlearned(batch.logp_BT, batch)
    old_BT = stored_BT
    if trainer_BT is not None and not objective.ratio_to_sampler:
        old_BT = mask_unlearned(trainer_BT, batch)
    elif correction.kind != "none":  # nothing has moved since the step began
        old_BT = jax.lax.stop_gradient(now_BT)
    gap_BT = clamp_log_ratio(now_BT - old_BT)
    ratio_BT = jnp.exp(gap_BT)
    match objective.kind:
        case "clip":
            gain_BT, cut_BT = clipped(ratio_BT, advantage_BT, clip)
        case "gspo":
            mean_BT = by_sequence(gap_BT * batch.learn_BT, batch.segments_BT) / sizes(batch)
            gain_BT, cut_BT = clipped(jnp.exp(mean_BT), advantage_BT, clip)
        case "cispo":
            held_BT = jax.lax.stop_gradient(jnp.clip(ratio_BT, *limits(clip)))
            gain_BT, cut_BT = held_BT * advantage_BT * now_BT, held_BT != ratio_BT
        case "binary_tv":
            gain_BT, cut_BT = clip_by_probability(
                ratio_BT, jnp.exp(now_BT) - jnp.exp(stored_BT), advantage_BT, clip
            )
    cut = {"clipped": cut_BT}
    if correction.kind != "none":
        trust_BT = jnp.exp(clamp_log_ratio(old_BT - stored_BT))
        held_BT = jnp.clip(trust_BT, correction.low, correction.high)
        cut["corrected"] = held_BT != trust_BT
        if correction.kind == "mask":
            held_BT = jnp.where(cut["corrected"], 0.0, trust_BT)
        gain_BT *= held_BT
    return -gain_BT, ratio_BT, cut


def clipped(
    ratio_BT: jax.Array, advantage_BT: jax.Array, clip: Clip
) -> tuple[jax.Array, jax.Array]:
    """min(r A, clip(r) A), r held below `dual` where A is negative, and where r is past a bound that
    takes its gradient."""
    low, high = limits(clip)
    down_BT = advantage_BT < 0
    cut_BT = jnp.where(down_BT, ratio_BT < low, (ratio_BT > high) & (advantage_BT > 0))
    if clip.dual is not None:
        cut_BT |= down_BT & (ratio_BT > clip.dual)
        ratio_BT = jnp.where(down_BT, jnp.minimum(ratio_BT, clip.dual), ratio_BT)
    bounded_BT = jnp.clip(ratio_BT, low, high)
    return jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT), cut_BT


def clip_by_probability(
    ratio_BT: jax.Array, apart_BT: jax.Array, advantage_BT: jax.Array, clip: Clip
) -> tuple[jax.Array, jax.Array]:
    """r A, but 0 where the probability has moved by more than `clip` in the direction A pushes."""
    gain_BT, cut_BT = clipped(
        ratio_BT, advantage_BT, dataclasses.replace(clip, low=None, high=None)
    )
    out_BT = jnp.zeros_like(cut_BT)
    if clip.high is not None:
        out_BT |= (advantage_BT > 0) & (apart_BT > clip.high)
    if clip.low is not None:
        out_BT |= (advantage_BT < 0) & (apart_BT < -clip.low)
    return jnp.where(out_BT, 0.0, gain_BT), cut_BT | out_BT


def divergence(logp_BT: jax.Array, base_BT: jax.Array, kind: str) -> jax.Array:
    """The estimate of `Kl` at each token."""
    d_BT = clamp_log_ratio(logp_BT - base_BT)
    return {"k1": d_BT, "k2": d_BT**2 / 2, "k3": jnp.exp(-d_BT) - 1 + d_BT}[kind]


def bonus(logp_BT: jax.Array, entropy_BT: jax.Array, ratio_BT: jax.Array) -> jax.Array:
    """The entropy, whose gradient is estimated from the sampled token: that of H is the mean of
    -(log p + H) grad log p. (`score` gives an entropy without a gradient: through the whole vocabulary it
    would cost as much as the loss.)"""
    pull_BT = jax.lax.stop_gradient(ratio_BT * (logp_BT + entropy_BT))
    return entropy_BT - pull_BT * (logp_BT - jax.lax.stop_gradient(logp_BT))


def limits(clip: Clip) -> tuple[float, float]:
    """The range of the ratio."""
    low = 0.0 if clip.low is None else 1 - clip.low
    return low, float("inf") if clip.high is None else 1 + clip.high


def mask_unlearned(x_BT: jax.Array, batch: Batch) -> jax.Array:
    """0 where nothing is learned: what is stored there means nothing, and a difference could overflow."""
    return jnp.where(batch.learn_BT > 0, x_BT, 0.0)


def clamp_log_ratio(x: jax.Array) -> jax.Array:
    """A log-ratio held where its exponential is a number; beyond it has no gradient."""
    return jnp.clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sizes(batch: Batch) -> jax.Array:
    """At each token how many are learned of its sequence, by their weight, 1 where none is."""
    size_BT = by_sequence(batch.learn_BT, batch.segments_BT)
    return jnp.where(size_BT > 0, size_BT, 1.0)


def by_sequence(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """At each token the sum over its sequence."""

    def row(x_T: jax.Array, segments_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_T, segments_T, len(x_T) + 1)[segments_T]

    # a sequence may lie on several devices of the axis `context`
    return jax.vmap(row)(meshes.constrain(x_BT, meshes.ROWS, None), segments_BT)
