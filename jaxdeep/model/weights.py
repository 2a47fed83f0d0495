"""The weights of a model, each declared once: shape, names of its dimensions, fan-in.

Initialisation, shardings, loading and saving, the shapes of adapters, FLOPs and memory all derive
from `leaves`.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdeep.model import families
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes

LINEARS = tuple(families.LINEARS)
EXPERTS = families.MLP  # in a mixture there is one of each per expert


class Leaf(NamedTuple):
    """A declared weight: its shape, the names of its dimensions (keys of `mesh.RULES`), its fan-in
    (None: it is initialised to ones, 0: to zeros), and its dtype if it is not the model's."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None
    dtype: str = ""


def leaves(cfg: Config) -> dict[str, Any]:
    """The tree of the model's weights with a Leaf in place of each array.

    Linears are [L, in, out], those of experts [L, E, in, out]. With `cfg.quant` each linear is a
    dictionary: "q", the same shape in int8, and "scale", one float32 per output.
    """
    tree = published(cfg)
    if cfg.quant:
        layers = tree["layers"]
        tree["layers"] = layers | {name: _quantized(layers[name]) for name in LINEARS}
    return tree


def published(cfg: Config) -> dict[str, Any]:
    """As `leaves`, before quantization: the weights that a checkpoint holds."""
    L, D, F, Q, KV, H = cfg.L, cfg.D, cfg.F, cfg.N * cfg.H, cfg.K * cfg.H, cfg.H
    # the widths of the norms of queries and keys
    normed = {"head": (H, H), "width": (Q, KV), "": ()}[cfg.kind.qk_norm]
    layers = {
        "attn_norm": Leaf((L, D), ("layers", None), None),
        "wq": Leaf((L, D, Q), ("layers", "embed", "heads"), D),
        "wk": Leaf((L, D, KV), ("layers", "embed", "kv_heads"), D),
        "wv": Leaf((L, D, KV), ("layers", "embed", "kv_heads"), D),
        **{
            name: Leaf((L, width), ("layers", None), None)
            for name, width in zip(("q_norm", "k_norm"), normed, strict=False)
        },
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
    for name in cfg.biases:
        outputs, axis = layers[name].shape[-1], layers[name].axes[-1]
        axis = None if axis == "embed" else axis  # as a norm: too small to be spread
        layers[bias_of(name)] = Leaf((L, outputs), ("layers", axis), 0)
    tree = {
        # laid out for the lookup in `decoder.embed`, not for a matmul
        "embed": Leaf((cfg.V, D), ("vocab", "embed_table"), D),
        "layers": layers,
        "norm": Leaf((D,), (None,), None),
    }
    return tree if cfg.tie else tree | {"head": Leaf((D, cfg.V), ("embed", "vocab"), D)}


def bias_of(linear: str) -> str:
    """The name of the bias of a linear: bq of wq, b_up of w_up."""
    return f"b{linear.removeprefix('w')}"


def _quantized(leaf: Leaf) -> dict[str, Leaf]:
    (*lead, _, outputs), (*lead_axes, _, axis) = leaf.shape, leaf.axes
    return {
        "q": leaf._replace(dtype="int8"),
        "scale": Leaf((*lead, outputs), (*lead_axes, axis), None, "float32"),
    }


def is_leaf(x: Any) -> bool:
    """For jax.tree functions over `leaves`, which would otherwise enter a Leaf, a tuple."""
    return isinstance(x, Leaf)


def divisible_shape(cfg: Config, leaf: Leaf) -> tuple[int, ...]:
    """The sizes that a mesh must divide: heads are counted whole, since none is ever split."""
    width = {"heads": cfg.H, "kv_heads": cfg.H}
    return tuple(n // width.get(axis, 1) for n, axis in zip(leaf.shape, leaf.axes, strict=True))


def shardings(cfg: Config, device_mesh: jax.sharding.Mesh, tree: Any = None) -> Any:
    """The sharding of each Leaf of `tree` (default: the model's own)."""
    return jax.tree.map(
        lambda leaf: meshes.weight_sharding(device_mesh, leaf.axes, divisible_shape(cfg, leaf)),
        leaves(cfg) if tree is None else tree,
        is_leaf=is_leaf,
    )


def shapes(cfg: Config, device_mesh: jax.sharding.Mesh, tree: Any, dtype: str = "") -> Any:
    """The arrays that `tree` declares, as shapes with dtypes and shardings; `dtype` is that of
    leaves without one of their own (default: the model's)."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype or dtype or cfg.dtype, sharding=sharding
        ),
        tree,
        shardings(cfg, device_mesh, tree),
        is_leaf=is_leaf,
    )


def matmul_precision(cfg: Config) -> contextlib.AbstractContextManager:
    """The context in which to trace a program of this model: a float32 model gets full float32
    products. GPUs and TPUs truncate their inputs by default, differently in programs of different
    shapes, and the log-probabilities of trainer and sampler would not agree."""
    full = cfg.dtype == "float32"
    return jax.default_matmul_precision("highest") if full else contextlib.nullcontext()


def quantize(weight: jax.Array) -> dict[str, jax.Array]:
    """A linear [..., in, out] as int8 with a float32 scale per output: the largest magnitude of its
    inputs over 127."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-2) / 127
    scale = jnp.where(scale == 0, 1.0, scale)  # an output of zeros stays zero, not NaN
    return {"q": jnp.round(weight / scale[..., None, :]).astype(jnp.int8), "scale": scale}


def init(key: jax.Array, cfg: Config) -> dict[str, Any]:
    """Random weights: normal with variance 1 / fan-in, norms at one, biases at zero."""
    flat, tree = jax.tree.flatten(published(cfg), is_leaf=is_leaf)
    keys = jax.random.split(key, len(flat))
    dtype = jnp.dtype(cfg.dtype)
    arrays = [
        jnp.full(leaf.shape, leaf.fan_in is None, dtype)
        if not leaf.fan_in
        else (jax.random.normal(k, leaf.shape) * leaf.fan_in**-0.5).astype(dtype)
        for k, leaf in zip(keys, flat, strict=True)
    ]
    params = jax.tree.unflatten(tree, arrays)
    if cfg.quant:
        params["layers"] |= {name: quantize(params["layers"][name]) for name in LINEARS}
    return params


def count(cfg: Config) -> int:
    """The number of parameters of the model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(published(cfg), is_leaf=is_leaf))
