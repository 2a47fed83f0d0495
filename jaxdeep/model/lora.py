"""Low-rank adapters: float32 factors beside a frozen base, and the one function that applies them.

An adapter is a dictionary from the name of a linear to its two factors, stacked over layers:
`{"wq": {"a": [L, in, R], "b": [L, R, out]}}`, with a dimension E before `in` and R for the linears of
experts. Its effect is `x @ a @ b * alpha / rank`; `b` starts at zero, so a new adapter is the base.
None in its place is the base, a tuple of adapters is their sum. (LoRA, arXiv 2106.09685.)

A `Bank` holds several adapters at once; each row of a batch uses any weighted mixture of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxdeep.errors import ConfigError
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.weights import LINEARS, Leaf
from jaxdeep.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank 0 trains every parameter of the base instead of an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEARS

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or not self.targets:
            raise ConfigError(f"lora.targets={self.targets}: choose some of {', '.join(LINEARS)}")
        if self.rank < 0:
            raise ConfigError(f"lora.rank={self.rank} must be 0 (train the base itself) or more")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / max(self.rank, 1)


@struct.dataclass
class Adapter:
    """One adapter as it is handed around: its effect on a linear is `x @ a @ b * scale`.

    `factors` are those of all its linears, `scale` is alpha / rank (data: another one compiles nothing),
    `base` says which frozen weights it belongs to (`identity.Base`), None where that is not known.
    """

    factors: dict[str, Any]
    scale: float | jax.Array
    base: Any = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Bank:
    """Adapters of one shape, and how much of each every row uses.

    `factors` is as one adapter with a dimension A after L: {"wq": {"a": [L, A, in, R], ...}}.
    `mix_BA` [B, A] float32 weighs them, alpha / rank included: a row of zeros is the base, one entry
    chooses an adapter, several compose. Both are data: a change compiles nothing.
    """

    factors: dict[str, Any]
    mix_BA: jax.Array


def leaves(cfg: Config, lora: LoraConfig, *, adapters: int = 0) -> dict[str, dict[str, Leaf]]:
    """The factors' shapes and axes, derived from the weights they stand beside; with `adapters`, those
    of a Bank of so many."""
    layers = model_weights.leaves(dataclasses.replace(cfg, quant=""))["layers"]
    A, none = ((adapters,), (None,)) if adapters else ((), ())
    out = {}
    for name in lora.targets:
        L, *E, inputs, outputs = layers[name].shape
        layer, *expert, i, o = layers[name].axes
        out[name] = {
            "a": Leaf((L, *A, *E, inputs, lora.rank), (layer, *none, *expert, i, "rank"), inputs),
            "b": Leaf((L, *A, *E, lora.rank, outputs), (layer, *none, *expert, "rank", o), 0),
        }
    return out


def init(key: jax.Array, cfg: Config, lora: LoraConfig) -> dict:
    """A fresh adapter: `a` uniform as in PEFT's default (Kaiming with a = sqrt 5), `b` zero."""
    names = leaves(cfg, lora)
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    return {
        name: {
            "a": jax.random.uniform(keys[name], pair["a"].shape, jnp.float32, -1, 1)
            * pair["a"].fan_in ** -0.5,
            "b": jnp.zeros(pair["b"].shape, jnp.float32),
        }
        for name, pair in names.items()
    }


def stack(adapters: Sequence[dict]) -> dict:
    """The `factors` of a Bank from adapters of the same targets and rank."""
    shapes = [jax.tree.map(jnp.shape, adapter) for adapter in adapters]
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError(
            "a bank needs adapters of the same linears and rank: pad the smaller ones"
        )
    return jax.tree.map(lambda *factors: jnp.stack(factors, 1), *adapters)


def merge(params: dict, adapter: dict, scale: float) -> dict:
    """The base with the adapter's effect added to its weights; with `-scale`, taken out again."""
    layers = dict(params["layers"])
    for name, pair in adapter.items():
        if isinstance(layers[name], dict):
            raise ConfigError(f"{name} is int8: merge into the base as published, then quantize")
        delta = jnp.einsum("...ir,...ro->...io", pair["a"], pair["b"]) * scale
        layers[name] = (layers[name].astype(jnp.float32) + delta).astype(layers[name].dtype)
    return {**params, "layers": layers}


def parts(lora: Any) -> tuple[tuple[dict, ...], tuple[jax.Array | None, ...]]:
    """The factors of each adapter in `lora`, to scan over layers, and the mixture of each Bank."""
    found = () if lora is None else lora if isinstance(lora, tuple) else (lora,)
    return (
        tuple(part.factors if isinstance(part, Bank) else part for part in found),
        tuple(part.mix_BA if isinstance(part, Bank) else None for part in found),
    )


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x @ a @ b` in the precision of `x`, [..., out]; gradients of the factors in their own."""
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple:
    low = x @ a.astype(x.dtype)
    return low @ b.astype(x.dtype), (x, low, a, b)


def _low_rank_backward(kept: tuple, grad: jax.Array) -> tuple:
    """The narrow operand comes first in each product: XLA's CPU backend transposes, so copies, that one,
    where the order of automatic differentiation has it copy the wide one."""
    x, low, a, b = kept
    back = grad @ b.astype(x.dtype).T
    da = jnp.einsum("...r,...i->ri", back, x, preferred_element_type=a.dtype).T
    db = jnp.einsum("...r,...o->ro", low, grad, preferred_element_type=b.dtype)
    return back @ a.astype(x.dtype).T, da, db


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's weights with what is added to its linears: `factors` of each adapter and `mixes`,
    None or [B, A] for each; `scale` is alpha / rank of those without a mixture.

    With `whole` each device gathers a linear and applies it to positions of its own (`context.owned`). In
    training that moves a quarter to a half of what summing hidden states over `model` would."""

    weights: dict[str, Any]
    factors: tuple[dict, ...]
    mixes: tuple[jax.Array | None, ...]
    scale: float
    whole: bool = False

    def __call__(self, x_BTi: jax.Array, name: str) -> jax.Array:
        """`x_BTi` through the linear `name` and the adapters beside it; [B, T, out]."""
        weight, dtype = self._held(self.weights[name]), x_BTi.dtype
        if isinstance(weight, dict):
            y_BTo = (x_BTi @ weight["q"].astype(dtype)) * weight["scale"].astype(dtype)
        else:
            y_BTo = x_BTi @ weight
        for factors, mix_BA in zip(self.factors, self.mixes, strict=True):
            if name not in factors:
                continue
            a, b = self._held((factors[name]["a"], factors[name]["b"]))
            if mix_BA is None:
                y_BTo = y_BTo + low_rank(x_BTi, a, b) * jnp.asarray(self.scale, dtype)
            else:
                low_BTAR = jnp.einsum("bti,air->btar", x_BTi, a.astype(dtype))
                low_BTAR = low_BTAR * mix_BA[:, None, :, None].astype(dtype)
                y_BTo = y_BTo + jnp.einsum("btar,aro->bto", low_BTAR, b.astype(dtype))
        return checkpoint_name(y_BTo, "linear")

    def _held(self, weight: Any) -> Any:
        return jax.tree.map(meshes.constrain, weight) if self.whole else weight
