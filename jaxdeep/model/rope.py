"""Rotary position embedding, plain or stretched by YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import CheckpointError


class Yarn(NamedTuple):
    """YaRN's settings, from the `rope_scaling` of a config.json: fast frequencies stay as they are,
    slow ones are divided by `factor`, and those between are blended."""

    factor: float
    original: int  # positions of pre-training
    fast: float = 32.0  # a frequency with more rotations over `original` positions is fast
    slow: float = 1.0  # and one with fewer is slow
    attention: float = (
        1.0  # multiplies cosine and sine, and so scales attention scores by its square
    )
    truncate: bool = True  # round the band between fast and slow outwards to whole dimensions

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], limit: int) -> Yarn:
        """From a `rope_scaling` of type yarn, with transformers' defaults for what it leaves out;
        `limit` is the config's max_position_embeddings."""
        original = int(rope.get("original_max_position_embeddings") or limit)
        factor = float(rope.get("factor") or limit / original)
        if factor < 1:
            raise CheckpointError(f"rope_scaling factor={factor} must be 1 or more")

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0

        attention = rope.get("attention_factor")
        if attention is None:
            top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
            attention = scale(top) / scale(bottom) if top and bottom else scale(1.0)
        return cls(
            factor,
            original,
            float(rope.get("beta_fast") or 32),
            float(rope.get("beta_slow") or 1),
            float(attention),
            bool(rope.get("truncate", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of `rope_scaling` that says the same."""
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original,
            "beta_fast": self.fast,
            "beta_slow": self.slow,
            "attention_factor": self.attention,
            "truncate": self.truncate,
        }


def frequencies(H: int, theta: float, yarn: Yarn | None) -> np.ndarray:
    """Radians per position of each pair of a head's dimensions, [H / 2] float32."""
    pair = np.arange(0, H, 2, dtype=np.float32)
    plain = (1.0 / theta ** (pair / H)).astype(np.float32)
    if yarn is None:
        return plain

    def dimension(rotations: float) -> float:
        """The (fractional) index of the pair that turns this often over the original positions."""
        return H * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.fast), dimension(yarn.slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    width = high - low or 0.001  # as transformers does, against a division by zero
    stretched = np.clip((np.arange(H // 2, dtype=np.float32) - low) / width, 0, 1)
    return (plain / yarn.factor * stretched + plain * (1 - stretched)).astype(np.float32)


def angles(
    positions_BT: jax.Array, H: int, theta: float, yarn: Yarn | None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, each [B, T, 1, H / 2], float32."""
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequencies(H, theta, yarn)
    scale = 1.0 if yarn is None else yarn.attention
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair of a head's dimensions, in float32. Dimension i is paired with i + H / 2, as
    in the published checkpoints (and not with i + 1, as in the paper)."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
