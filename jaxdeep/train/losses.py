"""What a step minimises: sums over tokens divided by one global count, so that packing, microbatches
and shards change nothing.

    SFT    -A_t log p_t                                     A_t = 1 on what the assistant wrote
    GRPO   -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)  r_t = p_t / p_t of the sampler

GRPO departs from its paper (arXiv 2402.03300) where practice does: the loss is normalised by the
tokens of the whole batch rather than by sequence (DAPO, arXiv 2503.14476, whose asymmetric clip it
also takes), there is no KL term, and the ratio is taken against the sampler's own log-probabilities.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdeep.errors import ConfigError
from jaxdeep.model import arch, qwen3
from jaxdeep.types import Batch


@dataclasses.dataclass(frozen=True)
class Clip:
    """The range of the probability ratio outside which a token no longer pushes."""

    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        if not (0 < self.low < 1 and self.high > 0):
            raise ConfigError(f"clip low={self.low} must be in (0, 1) and high={self.high} above 0")


def score(
    params: dict, adapter: dict | None, batch: Batch, *, cfg: arch.Config
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of each token of a packed batch, [B, T]."""
    hidden_BTD, _ = qwen3.forward(
        params,
        adapter,
        batch.tokens_BT,
        cfg=cfg,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
    )
    return qwen3.token_logps(params, hidden_BTD, batch.tokens_BT, cfg=cfg)


def loss(
    logp_BT: jax.Array, entropy_BT: jax.Array, batch: Batch, *, clip: Clip | None
) -> tuple[jax.Array, dict[str, dict[str, Any]]]:
    """The sum over learned tokens of the loss above (`clip=None`: SFT), and what to log.

    Metrics come as {"sum": ..., "max": ...}: how each adds up over microbatches.
    """
    learn_BT, advantage_BT = batch.learn_BT, batch.advantage_BT
    sums = {"tokens": learn_BT.sum(), "entropy": (entropy_BT * learn_BT).sum()}
    if clip is None:
        total = -(logp_BT * advantage_BT).sum()
        return total, {"sum": sums | {"loss": total}, "max": {}}
    # where nothing is learned the stored log-probability is 0, and a difference would overflow
    gap_BT = jnp.where(learn_BT > 0, logp_BT - batch.logp_BT, 0.0)
    ratio_BT = jnp.exp(gap_BT)
    bounded_BT = jnp.clip(ratio_BT, 1 - clip.low, 1 + clip.high)
    gain_BT = jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT)
    total = -(gain_BT * learn_BT).sum()
    sums |= {
        "loss": total,
        "clipped": ((ratio_BT * advantage_BT > gain_BT) * learn_BT).sum(),
        "mismatch_kl": ((ratio_BT - 1 - gap_BT) * learn_BT).sum(),
        "logp_diff": (jnp.abs(gap_BT) * learn_BT).sum(),
    }
    return total, {"sum": sums, "max": {"max_logp_diff": jnp.abs(gap_BT).max()}}
