"""What a Qwen3 is made of: its configuration, from a Hugging Face `config.json`, and each of its
weights, declared once. Initialisation, shardings, loading, LoRA shapes and memory derive from here.

Shape letters: B rows, T positions, S cache slots, D width, N query heads, K kv heads, H head width,
F mlp width (of one expert), E experts, L layers, V vocabulary, A adapters, R rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes

LINEARS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
EXPERTS = ("w_gate", "w_up", "w_down")  # of a mixture: one of each per expert


class Leaf(NamedTuple):
    """A weight's shape, the names of its dimensions, its fan-in (None: starts at one), and its dtype
    where that is not the model's."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None
    dtype: str = ""


def leaves(cfg: Config) -> dict[str, Any]:
    """Every weight of the model, a Leaf in place of each array. Linears are [L, in, out], those of
    experts [L, E, in, out]; with `cfg.quant` each is {"q": int8, "scale": of each output}."""
    L, D, F, Q, KV, H = cfg.L, cfg.D, cfg.F, cfg.N * cfg.H, cfg.K * cfg.H, cfg.H
    layers = {
        "attn_norm": Leaf((L, D), ("layers", None), None),
        "wq": Leaf((L, D, Q), ("layers", "embed", "heads"), D),
        "wk": Leaf((L, D, KV), ("layers", "embed", "kv_heads"), D),
        "wv": Leaf((L, D, KV), ("layers", "embed", "kv_heads"), D),
        "q_norm": Leaf((L, H), ("layers", None), None),
        "k_norm": Leaf((L, H), ("layers", None), None),
        "wo": Leaf((L, Q, D), ("layers", "heads", "embed"), Q),
        "mlp_norm": Leaf((L, D), ("layers", None), None),
    }
    if cfg.E:
        layers |= {
            "router": Leaf((L, D, cfg.E), ("layers", "embed", None), D),
            "w_gate": Leaf((L, cfg.E, D, F), ("layers", "experts", "embed", None), D),
            "w_up": Leaf((L, cfg.E, D, F), ("layers", "experts", "embed", None), D),
            "w_down": Leaf((L, cfg.E, F, D), ("layers", "experts", None, "embed"), F),
        }
    else:
        layers |= {
            "w_gate": Leaf((L, D, F), ("layers", "embed", "mlp"), D),
            "w_up": Leaf((L, D, F), ("layers", "embed", "mlp"), D),
            "w_down": Leaf((L, F, D), ("layers", "mlp", "embed"), F),
        }
    if cfg.quant:
        layers |= {name: _quantized(layers[name]) for name in LINEARS}
    tree = {
        "embed": Leaf((cfg.V, D), ("vocab", "embed_table"), D),  # as `qwen3.embed` looks it up
        "layers": layers,
        "norm": Leaf((D,), (None,), None),
    }
    return tree if cfg.tie else tree | {"head": Leaf((D, cfg.V), ("embed", "vocab"), D)}


def _quantized(leaf: Leaf) -> dict[str, Leaf]:
    return {
        "q": leaf._replace(dtype="int8"),
        "scale": Leaf(
            (*leaf.shape[:-2], leaf.shape[-1]), (*leaf.axes[:-2], leaf.axes[-1]), None, "float32"
        ),
    }


def is_leaf(x: Any) -> bool:
    """For jax.tree functions over `leaves`."""
    return isinstance(x, Leaf)


def divisible_shape(cfg: Config, leaf: Leaf) -> tuple[int, ...]:
    """The sizes that sharding must divide: whole heads, not single numbers of a head."""
    per = {"heads": cfg.H, "kv_heads": cfg.H}
    return tuple(n // per.get(a, 1) for n, a in zip(leaf.shape, leaf.axes, strict=True))


def shardings(cfg: Config, device_mesh: jax.sharding.Mesh, tree: Any = None) -> Any:
    """The sharding of each leaf of `tree` (default: the model's own)."""
    return jax.tree.map(
        lambda leaf: meshes.sharding(device_mesh, leaf.axes, divisible_shape(cfg, leaf)),
        leaves(cfg) if tree is None else tree,
        is_leaf=is_leaf,
    )


def matmul_precision(cfg: Config) -> contextlib.AbstractContextManager:
    """For tracing a program of this model: products of float32 numbers are of all their bits, which GPUs
    and TPUs round by default, so that trainer and sampler would not agree."""
    whole = cfg.dtype == "float32"
    return jax.default_matmul_precision("highest") if whole else contextlib.nullcontext()


def quantize(weight: jax.Array) -> dict[str, jax.Array]:
    """A linear [..., in, out] as int8 with one float32 scale per output: its largest input / 127."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-2) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return {"q": jnp.round(weight / scale[..., None, :]).astype(jnp.int8), "scale": scale}


def init(key: jax.Array, cfg: Config) -> dict[str, Any]:
    """Random weights: normal with variance 1 / fan-in, norms at one."""
    plain = leaves(dataclasses.replace(cfg, quant=""))
    flat, tree = jax.tree.flatten(plain, is_leaf=is_leaf)
    keys = jax.random.split(key, len(flat))
    dtype = jnp.dtype(cfg.dtype)
    arrays = [
        jnp.ones(leaf.shape, dtype)
        if leaf.fan_in is None
        else (jax.random.normal(k, leaf.shape) * leaf.fan_in**-0.5).astype(dtype)
        for k, leaf in zip(keys, flat, strict=True)
    ]
    params = jax.tree.unflatten(tree, arrays)
    if cfg.quant:
        params["layers"] |= {name: quantize(params["layers"][name]) for name in LINEARS}
    return params


def count(cfg: Config) -> int:
    """How many parameters the model has."""
    tree = leaves(dataclasses.replace(cfg, quant=""))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=is_leaf))
