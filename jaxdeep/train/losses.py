"""The losses: sums over tokens, divided by one denominator for the whole step. So neither packing
nor microbatches nor shards change the gradient.

For each token p is its probability under the policy, r = p / p_old the importance ratio and A the
advantage. p_old is the sampler's, or the trainer's before the step (see `Objective`); clip(r) is r
held within [1 - low, 1 + high] of `Clip`. The loss of a token is

    likelihood  -A log p                         SFT: A = 1 on what the assistant wrote
    clip        -min(r A, clip(r) A)             PPO, GRPO (arXiv 2402.03300), DAPO (2503.14476)
    gspo        the same with the geometric mean of r over the tokens of a sequence (2507.18071)
    cispo       -stop_gradient(clip(r)) A log p  (2506.13585)
    binary_tv   -r A; 0 where A > 0 and p - p_sampler > high, or A < 0 and p - p_sampler < -low: a
                trust region in the total variation of "this token or another" (DPPO, 2602.04879)

plus, if the objective asks for them, an estimate of the KL to the base (the model without its
adapter) and minus an entropy bonus.
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

MAX_LOG_RATIO = 20.0  # nats: exp(20) is 5e8, finite in float32, and so is its square


class ReferenceLogps(NamedTuple):
    """Log-probabilities of a batch's tokens, [B, T]: `old_BT` by the trainer before the updates of
    this step, `base_BT` by the reference policy of the KL term. None if the loss does not need
    them."""

    old_BT: jax.Array | None = None
    base_BT: jax.Array | None = None


NO_REFERENCE = ReferenceLogps()


def score(params: dict, adapter: Any, batch: Batch, *, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy in nats of each learned token of a packed batch, both [B, T]. At
    other positions the values are arbitrary."""
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
    """The summed loss of the learned tokens, to be divided by `denominator`, and metrics.

    Metrics come as {"sum": ..., "max": ...}, by how microbatches combine.
    """
    learn_BT = batch.learn_BT
    sums = {"tokens": learn_BT.sum(), "entropy": (entropy_BT * learn_BT).sum()}
    maxima = {}
    # the advantage is 0 at tokens that are not learned; every other term has to be masked
    if objective.kind == "likelihood":
        loss_BT, ratio_BT = -logp_BT * batch.advantage_BT, jnp.ones_like(logp_BT)
    else:
        loss_BT, ratio_BT, cut = policy_loss(logp_BT, batch, before.old_BT, objective)
        by_token, maxima = sampler_mismatch(logp_BT, batch)
        sums |= {name: (x_BT * learn_BT).sum() for name, x_BT in (by_token | cut).items()}
    if objective.kl.coef:
        kl_BT = kl_estimate(logp_BT, before.base_BT, objective.kl.kind) * learn_BT
        loss_BT += objective.kl.coef * kl_BT
        sums["kl"] = kl_BT.sum()
    if objective.entropy:
        loss_BT -= objective.entropy * entropy_bonus(logp_BT, entropy_BT, ratio_BT) * learn_BT
    if objective.aggregate == "sequence":
        # counted, not weighed: a row's weights say how much of a sequence it is
        count_BT = sum_over_sequence((learn_BT > 0).astype(jnp.float32), batch.segments_BT)
        loss_BT /= jnp.maximum(count_BT, 1.0)
    total = loss_BT.sum()
    return total, {"sum": sums | {"loss": total}, "max": maxima}


def denominator(
    batches: Sequence[Batch], objective: Objective, sequences: int | None = None
) -> float:
    """What the summed loss of a step's microbatches, all of them numpy batches, is divided by.
    `sequences`: how many there are, where some are in several segments; None: one a segment."""
    if objective.aggregate == "token":
        return sum(float(batch.learn_BT.sum()) for batch in batches)
    if sequences is None:
        sequences = sum(map(learned_segments, batches))
    return float(sequences * (objective.length if objective.aggregate == "constant" else 1))


def learned_segments(batch: Batch) -> int:
    """How many segments of a numpy batch have a token to learn."""
    B, T = batch.segments_BT.shape
    # segments are numbered from 1 in every row: make the numbers unique in the batch
    ids_BT = batch.segments_BT + (T + 1) * np.arange(B)[:, None]
    return np.unique(ids_BT[batch.learn_BT > 0]).size


def summary(totals: dict[str, dict[str, Any]], count: float) -> dict[str, Any]:
    """Metrics of a step from those of all its microbatches: the loss; means over learned tokens,
    weighted as in the loss ("tokens" is the sum of the weights); maxima. "ess" is the effective
    sample size of the ratios p / p_sampler as a share of the tokens, 1 on policy."""
    sums = dict(totals["sum"])
    total, tokens = sums.pop("loss"), sums.pop("tokens")
    means = {name: value / tokens for name, value in sums.items()}
    if "ratio" in means:
        means["ess"] = means.pop("ratio") ** 2 / means.pop("ratio_squared")
    return {"loss": total / count} | means | totals["max"] | {"tokens": tokens}


def sampler_mismatch(
    logp_BT: jax.Array, batch: Batch
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """How far the policy is from the sampler: metrics of each token, [B, T], and maxima over the
    batch. "mismatch_kl" is the k3 estimate of KL(sampler || policy)."""
    policy_BT, sampler_BT = mask_unlearned(logp_BT, batch), mask_unlearned(batch.logp_BT, batch)
    gap_BT, prob_gap_BT = policy_BT - sampler_BT, jnp.exp(policy_BT) - jnp.exp(sampler_BT)
    ratio_BT = jnp.exp(clamp_log_ratio(gap_BT))
    by_token = {
        "mismatch_kl": ratio_BT - 1 - clamp_log_ratio(gap_BT),
        "logp_diff": jnp.abs(gap_BT),
        "ratio": ratio_BT,
        "ratio_squared": ratio_BT**2,
    }
    return by_token, {
        "max_logp_diff": jnp.abs(gap_BT).max(),
        "max_prob_diff": jnp.abs(prob_gap_BT).max(),
    }


def policy_loss(
    logp_BT: jax.Array, batch: Batch, trainer_BT: jax.Array | None, objective: Objective
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss of each token and its ratio to the old policy, both [B, T]; and as metrics which
    tokens were beyond a bound of `clip` ("clipped") or of `correction` ("corrected")."""
    clip, correction, advantage_BT = objective.clip, objective.correction, batch.advantage_BT
    policy_BT, sampler_BT = mask_unlearned(logp_BT, batch), mask_unlearned(batch.logp_BT, batch)
    old_BT = sampler_BT
    if trainer_BT is not None and not objective.ratio_to_sampler:
        old_BT = mask_unlearned(trainer_BT, batch)
    elif correction.kind != "none":
        # the step's only update: the policy is still the old one, so r is 1, with the gradient of
        # log p
        old_BT = jax.lax.stop_gradient(policy_BT)
    log_ratio_BT = clamp_log_ratio(policy_BT - old_BT)
    ratio_BT = jnp.exp(log_ratio_BT)
    match objective.kind:
        case "clip":
            surrogate_BT, cut_BT = clipped_surrogate(ratio_BT, advantage_BT, clip)
        case "gspo":
            total_BT = sum_over_sequence(log_ratio_BT * batch.learn_BT, batch.segments_BT)
            mean_BT = total_BT / sequence_tokens(batch)
            surrogate_BT, cut_BT = clipped_surrogate(jnp.exp(mean_BT), advantage_BT, clip)
        case "cispo":
            clipped_BT = jax.lax.stop_gradient(jnp.clip(ratio_BT, *clip_range(clip)))
            surrogate_BT, cut_BT = clipped_BT * advantage_BT * policy_BT, clipped_BT != ratio_BT
        case "binary_tv":
            prob_gap_BT = jnp.exp(policy_BT) - jnp.exp(sampler_BT)
            surrogate_BT, cut_BT = clip_by_probability(ratio_BT, prob_gap_BT, advantage_BT, clip)
    cut = {"clipped": cut_BT}
    if correction.kind != "none":
        weight_BT = jnp.exp(clamp_log_ratio(old_BT - sampler_BT))
        bounded_BT = jnp.clip(weight_BT, correction.low, correction.high)
        cut["corrected"] = bounded_BT != weight_BT
        if correction.kind == "mask":
            bounded_BT = jnp.where(cut["corrected"], 0.0, weight_BT)
        surrogate_BT *= bounded_BT
    return -surrogate_BT, ratio_BT, cut


def clipped_surrogate(
    ratio_BT: jax.Array, advantage_BT: jax.Array, clip: Clip
) -> tuple[jax.Array, jax.Array]:
    """Two arrays [B, T]: the surrogate min(r A, clip(r) A), and a mask of the tokens whose gradient
    the clip sets to 0. Where A < 0, r is first capped at `clip.dual`."""
    low, high = clip_range(clip)
    negative_BT = advantage_BT < 0
    cut_BT = jnp.where(negative_BT, ratio_BT < low, (ratio_BT > high) & (advantage_BT > 0))
    if clip.dual is not None:
        # where A < 0 the minimum is r A however large r is: one such token can dominate the step
        cut_BT |= negative_BT & (ratio_BT > clip.dual)
        ratio_BT = jnp.where(negative_BT, jnp.minimum(ratio_BT, clip.dual), ratio_BT)
    bounded_BT = jnp.clip(ratio_BT, low, high)
    return jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT), cut_BT


def clip_by_probability(
    ratio_BT: jax.Array, prob_gap_BT: jax.Array, advantage_BT: jax.Array, clip: Clip
) -> tuple[jax.Array, jax.Array]:
    """Two arrays [B, T]: the surrogate r A, 0 where the probability has already moved further than
    `clip` in the direction of A; and a mask of the tokens whose gradient is 0."""
    surrogate_BT, cut_BT = clipped_surrogate(
        ratio_BT, advantage_BT, dataclasses.replace(clip, low=None, high=None)
    )
    out_BT = jnp.zeros_like(cut_BT)
    if clip.high is not None:
        out_BT |= (advantage_BT > 0) & (prob_gap_BT > clip.high)
    if clip.low is not None:
        out_BT |= (advantage_BT < 0) & (prob_gap_BT < -clip.low)
    return jnp.where(out_BT, 0.0, surrogate_BT), cut_BT | out_BT


def kl_estimate(logp_BT: jax.Array, base_BT: jax.Array, kind: str) -> jax.Array:
    """The estimate of KL(policy || base) at each token, [B, T], by the kinds of `Kl`."""
    d_BT = clamp_log_ratio(logp_BT - base_BT)
    return {"k1": d_BT, "k2": d_BT**2 / 2, "k3": jnp.exp(-d_BT) - 1 + d_BT}[kind]


def entropy_bonus(logp_BT: jax.Array, entropy_BT: jax.Array, ratio_BT: jax.Array) -> jax.Array:
    """The entropy H at each token, [B, T], with a gradient that is estimated from the sampled
    token: grad H is the expectation of -(log p + H) grad log p, tokens of the old policy weighted
    by r."""
    # `score` gives H without a gradient: through the whole vocabulary it costs as much as the loss
    factor_BT = jax.lax.stop_gradient(ratio_BT * (logp_BT + entropy_BT))
    return entropy_BT - factor_BT * (logp_BT - jax.lax.stop_gradient(logp_BT))


def clip_range(clip: Clip) -> tuple[float, float]:
    """The bounds that the ratio is clipped to."""
    low = 0.0 if clip.low is None else 1 - clip.low
    return low, float("inf") if clip.high is None else 1 + clip.high


def mask_unlearned(x_BT: jax.Array, batch: Batch) -> jax.Array:
    """Log-probabilities with 0 at tokens that are not learned."""
    # what is stored there is arbitrary, and the difference of two could overflow to inf or NaN
    return jnp.where(batch.learn_BT > 0, x_BT, 0.0)


def clamp_log_ratio(x: jax.Array) -> jax.Array:
    """Clamp a log-ratio to +-MAX_LOG_RATIO, so that its exponential stays finite; beyond these
    bounds the gradient is 0."""
    return jnp.clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_tokens(batch: Batch) -> jax.Array:
    """At each token the number of learned tokens of its sequence, by their weight; 1 if none are.
    [B, T]."""
    tokens_BT = sum_over_sequence(batch.learn_BT, batch.segments_BT)
    return jnp.where(tokens_BT > 0, tokens_BT, 1.0)


def sum_over_sequence(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """At each token the sum of x over the token's sequence, [B, T]."""

    def row(x_T: jax.Array, segments_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_T, segments_T, len(x_T) + 1)[segments_T]

    # a sequence may be sharded over the mesh axis `context`: each device needs all of it
    return jax.vmap(row)(meshes.constrain(x_BT, meshes.ROWS, None), segments_BT)
