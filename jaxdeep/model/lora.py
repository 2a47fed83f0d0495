"""Low-rank adapters: float32 factors beside a frozen base, and the one function that applies them.

An adapter is a dictionary from the name of a linear to its two factors, stacked over layers:
`{"wq": {"a": [L, in, R], "b": [L, R, out]}}`. Its effect is `x @ a @ b * alpha / rank`; `b` starts
at zero, so a new adapter is the base. None in its place is the base. (LoRA, arXiv 2106.09685.)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdeep.errors import ConfigError
from jaxdeep.model import qwen3
from jaxdeep.model.qwen3 import LINEARS, Leaf


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


def leaves(cfg: qwen3.Config, lora: LoraConfig) -> dict[str, dict[str, Leaf]]:
    """The factors' shapes and axes, derived from the weights they stand beside."""
    out = {}
    for name in lora.targets:
        weight = qwen3.leaves(cfg)["layers"][name]
        layers, inputs, outputs = weight.shape
        out[name] = {
            "a": Leaf((layers, inputs, lora.rank), ("layers", weight.axes[1], "rank"), inputs),
            "b": Leaf((layers, lora.rank, outputs), ("layers", "rank", weight.axes[2]), 0),
        }
    return out


def init(key: jax.Array, cfg: qwen3.Config, lora: LoraConfig) -> dict:
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


def merge(params: dict, adapter: dict, scale: float) -> dict:
    """The base with the adapter's effect added to its weights."""
    layers = dict(params["layers"])
    for name, pair in adapter.items():
        delta = jnp.einsum("lir,lro->lio", pair["a"], pair["b"]) * scale
        layers[name] = (layers[name].astype(jnp.float32) + delta).astype(layers[name].dtype)
    return {**params, "layers": layers}
