"""Rotary position embedding: plain, or with its frequencies stretched for longer texts than those
of pre-training.

    default   frequencies that are powers of theta
    linear    all of them divided by one factor
    llama3    slow ones divided, fast ones as they are, those between blended (Llama 3.1)
    yarn      the same by other bounds, and attention scores scaled (arXiv 2309.00071)

`read` takes the settings from a `config.json`, in either of the two layouts there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import CheckpointError

KINDS = ("default", "linear", "llama3", "yarn")
OF_ALL = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
KEYS = {  # the settings of each kind, beside those of all
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",  # says how the model was made, and changes nothing
    },
}


class Linear(NamedTuple):
    """All frequencies are divided by `factor`."""

    factor: float
    attention = 1.0  # see Yarn

    def to_hf(self) -> dict[str, Any]:
        """The content of `rope_scaling` that says the same."""
        return {"rope_type": "linear", "factor": self.factor}

    def stretch(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies in place of the `plain` ones, radians per position."""
        return plain / np.float32(self.factor)


class Llama3(NamedTuple):
    """Frequencies that turn less than `slow` times over the `original` positions are divided by
    `factor`, those that turn more than `fast` times stay as they are, and those between are
    blended by the number of their turns."""

    factor: float
    original: int  # positions of pre-training
    slow: float = 1.0
    fast: float = 4.0
    attention = 1.0  # see Yarn

    def to_hf(self) -> dict[str, Any]:
        """The content of `rope_scaling` that says the same."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "original_max_position_embeddings": self.original,
            "low_freq_factor": self.slow,
            "high_freq_factor": self.fast,
        }

    def stretch(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies in place of the `plain` ones, radians per position."""
        turns = np.float32(self.original) * plain / np.float32(2 * math.pi)
        kept = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        return plain / np.float32(self.factor) * (1 - kept) + plain * kept


class Yarn(NamedTuple):
    """Fast frequencies stay as they are, slow ones are divided by `factor`, and those between are
    blended by the index of their dimension."""

    factor: float
    original: int  # positions of pre-training
    fast: float = 32.0  # a frequency with more rotations over `original` positions is fast
    slow: float = 1.0  # and one with fewer is slow
    # multiplies cosine and sine, and so scales attention scores by its square
    attention: float = 1.0
    truncate: bool = True  # round the band between fast and slow outwards to whole dimensions

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

    def stretch(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies in place of the `plain` ones, radians per position."""
        H = 2 * len(plain)

        def dimension(rotations: float) -> float:
            """The (fractional) index of the pair that turns this often over the original
            positions."""
            return H * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.fast), dimension(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, H - 1)
        width = high - low or 0.001  # as transformers does, against a division by zero
        stretched = np.clip((np.arange(H // 2, dtype=np.float32) - low) / width, 0, 1)
        return plain / self.factor * stretched + plain * (1 - stretched)


Scaling = Linear | Llama3 | Yarn


def read(hf: Mapping[str, Any], name: str, theta: float | None = None) -> tuple[float, Any]:
    """Theta and the Scaling (None: plain) that the content `hf` of a `config.json` asks for.

    `rope_scaling` goes before `rope_parameters` where there are both, as in transformers, and theta
    may stand in either or beside them (`theta` is used where it stands nowhere). CheckpointError
    where two of them disagree, and for a kind or a setting that is not computed here; `name` is the
    file's.
    """
    _refuse_part(hf, name)
    given = {key: hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    found, thetas = {}, {"rope_theta": hf.get("rope_theta")}
    for key, rope in given.items():
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{name}: {key}={rope!r} is not a dictionary of settings")
        if rope:
            found[key] = _scaling(hf, key, rope, name)
            thetas[f"{key}.rope_theta"] = rope.get("rope_theta")
    first = next(iter(found.values()), None)
    # plain parameters beside a scaling only carry theta
    if found.get("rope_parameters") not in (None, first):
        raise CheckpointError(
            f"{name} has rope_scaling={given['rope_scaling']} and "
            f"rope_parameters={given['rope_parameters']}, which disagree: remove the one that the "
            "model is not meant to have"
        )
    thetas = {k: _positive(v, k, name) for k, v in thetas.items() if v is not None}
    if len(set(thetas.values())) > 1:
        said = ", ".join(f"{key}={value:g}" for key, value in thetas.items())
        raise CheckpointError(f"{name} has {said}, which disagree: keep the right one")
    if not thetas and theta is None:
        raise CheckpointError(f"{name} lacks 'rope_theta'")
    return next(iter(thetas.values()), theta), first


def _scaling(hf: Mapping[str, Any], key: str, rope: Mapping[str, Any], name: str) -> Any:
    """The Scaling that one dictionary of settings asks for; `key` is its own."""
    kind = _kind(key, rope, name)
    if kind == "default":
        return None

    def of(setting: str, default: float | None = None) -> float:
        value = default if rope.get(setting) is None else rope[setting]
        if value is None:
            raise CheckpointError(f"{name}: {key} of the type {kind!r} lacks {setting!r}")
        return _positive(value, f"{key}.{setting}", name)

    limit, beside = (
        hf.get(k) for k in ("max_position_embeddings", "original_max_position_embeddings")
    )
    inside = rope.get("original_max_position_embeddings")
    if None not in (beside, inside) and beside != inside:
        raise CheckpointError(
            f"{name}: original_max_position_embeddings={beside!r} and "
            f"{key}.original_max_position_embeddings={inside!r} disagree: keep the right one"
        )
    original = int(of("original_max_position_embeddings", beside or limit))
    factor = of("factor", limit / original if kind == "yarn" else None)
    if factor < 1:
        raise CheckpointError(f"{name}: {key}.factor={factor} must be 1 or more")
    if kind == "linear":
        return Linear(factor)
    if kind == "llama3":
        slow, fast = of("low_freq_factor"), of("high_freq_factor")
        if slow >= fast:
            raise CheckpointError(
                f"{name}: {key}.low_freq_factor={slow} must be below high_freq_factor={fast}"
            )
        return Llama3(factor, original, slow, fast)

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    attention = scale(1.0)
    if rope.get("attention_factor") is not None:
        attention = of("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = scale(of("mscale")) / scale(of("mscale_all_dim"))
    # a zero stands for the default, as in transformers
    betas = (of(k) if rope.get(k) else v for k, v in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    return Yarn(factor, original, *betas, attention, bool(rope.get("truncate", True)))


def _kind(key: str, rope: Mapping[str, Any], name: str) -> str:
    """The type of the settings; CheckpointError for one that is not computed here, or for a setting
    that the type does not have."""
    kinds = sorted({str(rope[k]) for k in ("rope_type", "type") if rope.get(k)}) or ["default"]
    kind = kinds[0]
    if len(kinds) > 1 or kind not in KINDS:
        raise CheckpointError(
            f"{name}: {key} is of the type {' and '.join(map(repr, kinds))}; "
            f"computed are {', '.join(KINDS)}"
        )
    unknown = sorted(k for k in rope.keys() - OF_ALL - KEYS[kind] if rope[k] is not None)
    if unknown:
        raise CheckpointError(
            f"{name}: {key}.{unknown[0]}={rope[unknown[0]]!r} is no setting of the type {kind!r}"
        )
    _refuse_part(rope, name)
    return kind


def _refuse_part(rope: Mapping[str, Any], name: str) -> None:
    if (factor := rope.get("partial_rotary_factor")) not in (None, 1):
        raise CheckpointError(
            f"{name}: partial_rotary_factor={factor!r}: heads are rotated whole here"
        )


def _positive(value: Any, key: str, name: str) -> float:
    """`value` as a float; CheckpointError unless it is a finite number above 0."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < math.inf:
        raise CheckpointError(f"{name}: {key}={value!r} is not a positive number")
    return float(value)


def frequencies(H: int, theta: float, scaling: Scaling | None) -> np.ndarray:
    """Radians per position of each pair of a head's dimensions, [H / 2] float32."""
    pair = np.arange(0, H, 2, dtype=np.float32)
    plain = (1.0 / theta ** (pair / H)).astype(np.float32)
    return plain if scaling is None else scaling.stretch(plain, theta).astype(np.float32)


def angles(
    positions_BT: jax.Array, H: int, theta: float, scaling: Scaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, each [B, T, 1, H / 2], float32."""
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequencies(H, theta, scaling)
    scale = 1.0 if scaling is None else scaling.attention
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair of a head's dimensions, in float32. Dimension i is paired with i + H / 2, as
    in the published checkpoints (and not with i + 1, as in the paper)."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
