"""Qwen3 (dense) as pure functions over a dictionary of arrays.

`leaves` declares each weight once; initialisation, shardings, loading and LoRA shapes derive from it.
Layers are stacked on their first dimension and scanned. Precision: weights and activations in
`cfg.dtype`; norms, rotary angles, softmax and log-probabilities in float32.

Shape letters: B rows, T positions, S cache slots, D width, N query heads, K kv heads, H head width,
F mlp width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxdeep import mesh
from jaxdeep.errors import CheckpointError
from jaxdeep.model import attention

LINEARS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture, from a Hugging Face `config.json`, and how to compute it."""

    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    theta: float
    eps: float
    tie: bool
    limit: int  # positions the model was trained for
    dtype: str = "bfloat16"
    remat: bool = True  # recompute each layer in the backward pass
    chunk: int = 256  # positions whose logits exist at one time
    lora_scale: float = 1.0  # alpha / rank of whichever adapter is given

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | Mapping[str, Any], **changes: Any) -> Config:
        """The configuration in `source`: a config.json, its folder, or its content.

        `changes` replaces fields. An architecture this module does not compute is refused.
        """
        hf, name = source, "the given config"
        if not isinstance(source, Mapping):
            path = pathlib.Path(source)
            path = path / "config.json" if path.is_dir() else path
            name = str(path)
            try:
                hf = json.loads(path.read_text())
            except (OSError, json.JSONDecodeError) as error:
                raise CheckpointError(f"{path}: no readable config.json ({error})") from error
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        refused = {
            "model_type": hf.get("model_type") != "qwen3",
            "hidden_act": hf.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(hf.get("attention_bias")),
            "use_sliding_window": bool(hf.get("use_sliding_window")),
            "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        }
        if any(refused.values()):
            keys = ", ".join(f"{k}={hf.get(k, rope)!r}" for k, bad in refused.items() if bad)
            raise CheckpointError(f"{name} is not a dense Qwen3 this model computes: {keys}")
        try:
            values = dict(
                V=hf["vocab_size"],
                D=hf["hidden_size"],
                F=hf["intermediate_size"],
                L=hf["num_hidden_layers"],
                N=hf["num_attention_heads"],
                K=hf["num_key_value_heads"],
                H=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
                theta=float(rope.get("rope_theta") or hf["rope_theta"]),
                eps=hf["rms_norm_eps"],
                tie=bool(hf.get("tie_word_embeddings", False)),
                limit=hf["max_position_embeddings"],
            )
        except KeyError as error:
            raise CheckpointError(f"{name} lacks {error}: is it a Qwen3 config.json?") from error
        if values["N"] % values["K"]:
            raise CheckpointError(f"{name}: {values['N']} heads do not divide by {values['K']}")
        return cls(**values | changes)

    def to_hf(self) -> dict[str, Any]:
        """The same architecture as the content of a Hugging Face `config.json`."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.V,
            "hidden_size": self.D,
            "intermediate_size": self.F,
            "num_hidden_layers": self.L,
            "num_attention_heads": self.N,
            "num_key_value_heads": self.K,
            "head_dim": self.H,
            "rope_theta": self.theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tie,
            "max_position_embeddings": self.limit,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": self.dtype,
        }


class Leaf(NamedTuple):
    """A weight's shape, the names of its dimensions, and its fan-in (None: starts at one)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None


def leaves(cfg: Config) -> dict[str, Any]:
    """Every weight of the model, a Leaf in place of each array. Linears are [L, in, out]."""
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
        "w_gate": Leaf((L, D, F), ("layers", "embed", "mlp"), D),
        "w_up": Leaf((L, D, F), ("layers", "embed", "mlp"), D),
        "w_down": Leaf((L, F, D), ("layers", "mlp", "embed"), F),
    }
    tree = {
        "embed": Leaf((cfg.V, D), ("vocab", "embed"), D),
        "layers": layers,
        "norm": Leaf((D,), (None,), None),
    }
    return tree if cfg.tie else tree | {"head": Leaf((D, cfg.V), ("embed", "vocab"), D)}


def is_leaf(x: Any) -> bool:
    """For jax.tree functions over `leaves`."""
    return isinstance(x, Leaf)


def units(cfg: Config, leaf: Leaf) -> tuple[int, ...]:
    """The sizes that sharding must divide: whole heads, not single numbers of a head."""
    per = {"heads": cfg.H, "kv_heads": cfg.H}
    return tuple(n // per.get(a, 1) for n, a in zip(leaf.shape, leaf.axes, strict=True))


def shardings(cfg: Config, device_mesh: jax.sharding.Mesh, tree: Any = None) -> Any:
    """The sharding of each leaf of `tree` (default: the model's own)."""
    return jax.tree.map(
        lambda leaf: mesh.sharding(device_mesh, leaf.axes, units(cfg, leaf)),
        leaves(cfg) if tree is None else tree,
        is_leaf=is_leaf,
    )


def init(key: jax.Array, cfg: Config) -> dict[str, Any]:
    """Random weights: normal with variance 1 / fan-in, norms at one."""
    flat, tree = jax.tree.flatten(leaves(cfg), is_leaf=is_leaf)
    keys = jax.random.split(key, len(flat))
    dtype = jnp.dtype(cfg.dtype)
    arrays = [
        jnp.ones(leaf.shape, dtype)
        if leaf.fan_in is None
        else (jax.random.normal(k, leaf.shape) * leaf.fan_in**-0.5).astype(dtype)
        for k, leaf in zip(keys, flat, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


def count(cfg: Config) -> int:
    """How many parameters the model has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves(cfg), is_leaf=is_leaf))


@struct.dataclass
class Cache:
    """Keys and values of the positions so far. Slots at and after a row's length hold nothing."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    length_B: jax.Array


def empty_cache(cfg: Config, B: int, S: int) -> Cache:
    """A cache of B rows with S slots each."""
    shape, dtype = (cfg.L, B, cfg.K, S, cfg.H), jnp.dtype(cfg.dtype)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(B, jnp.int32))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def angles(positions_BT: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, each [B, T, 1, H / 2], float32."""
    frequency = cfg.theta ** (-jnp.arange(0, cfg.H, 2, dtype=jnp.float32) / cfg.H)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding, the halves of a head paired as in the published checkpoints."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def linear(x: jax.Array, layer: dict, adapter: dict | None, name: str, cfg: Config) -> jax.Array:
    """`x` through one linear and, where the adapter has factors for it, through those beside it."""
    y = x @ layer[name]
    if adapter is not None and name in adapter:
        pair = adapter[name]
        low = x @ pair["a"].astype(x.dtype)
        y = y + low @ pair["b"].astype(x.dtype) * jnp.asarray(cfg.lora_scale, x.dtype)
    return y


def forward(
    params: dict,
    lora: dict | None,
    tokens_BT: jax.Array,
    *,
    cfg: Config,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
    count_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states after the last norm, [B, T, D], and the cache with the new tokens appended.

    Without a cache, tokens attend to earlier ones of their own segment (default: one segment a row).
    With a cache, the first `count_B` tokens of each row (default: all) are appended at its length and
    attend to everything the row holds; the rest of the row is padding and leaves no trace.
    """
    B, T = tokens_BT.shape
    if cache is not None:
        held_BT = cache.length_B[:, None] + jnp.arange(T)
        positions_BT = held_BT
        count_B = jnp.full(B, T, jnp.int32) if count_B is None else count_B
        S = cache.k_LBKSH.shape[3]
        # out-of-range slots are dropped by the scatter: padding is never written
        slots_BT = jnp.where(jnp.arange(T) < count_B[:, None], held_BT, S)
    elif positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    cos, sin = angles(positions_BT, cfg)
    rows_B1 = jnp.arange(B)[:, None]

    def layer_step(carry, xs):
        x_BTD, k_cache, v_cache = carry
        layer, adapter, index = xs
        x_BTD = mesh.constrain(x_BTD, mesh.ROWS, "context", None)
        project = functools.partial(linear, layer=layer, adapter=adapter, cfg=cfg)
        h_BTD = rms_norm(x_BTD, layer["attn_norm"], cfg.eps)
        q_BTNH = project(h_BTD, name="wq").reshape(B, T, cfg.N, cfg.H)
        k_BTKH = project(h_BTD, name="wk").reshape(B, T, cfg.K, cfg.H)
        v_BTKH = project(h_BTD, name="wv").reshape(B, T, cfg.K, cfg.H)
        q_BTNH = rotate(rms_norm(q_BTNH, layer["q_norm"], cfg.eps), cos, sin)
        k_BTKH = rotate(rms_norm(k_BTKH, layer["k_norm"], cfg.eps), cos, sin)
        if cache is None:
            out_BTNH = attention.attend(q_BTNH, k_BTKH, v_BTKH, segments_BT)
        else:
            k_cache = k_cache.at[index, rows_B1, :, slots_BT].set(k_BTKH, mode="drop")
            v_cache = v_cache.at[index, rows_B1, :, slots_BT].set(v_BTKH, mode="drop")
            out_BTNH = attention.attend_cache(q_BTNH, k_cache[index], v_cache[index], positions_BT)
        x_BTD = x_BTD + project(out_BTNH.reshape(B, T, cfg.N * cfg.H), name="wo")
        h_BTD = rms_norm(x_BTD, layer["mlp_norm"], cfg.eps)
        h_BTF = jax.nn.silu(project(h_BTD, name="w_gate")) * project(h_BTD, name="w_up")
        x_BTD = x_BTD + project(h_BTF, name="w_down")
        return (x_BTD, k_cache, v_cache), None

    if cfg.remat and cache is None:
        layer_step = jax.checkpoint(layer_step, prevent_cse=False)
    x_BTD = jnp.take(params["embed"], tokens_BT, axis=0)
    carry = (x_BTD, cache and cache.k_LBKSH, cache and cache.v_LBKSH)
    xs = (params["layers"], lora, jnp.arange(cfg.L))
    (x_BTD, k_LBKSH, v_LBKSH), _ = jax.lax.scan(layer_step, carry, xs)
    hidden_BTD = rms_norm(x_BTD, params["norm"], cfg.eps)
    if cache is not None:
        cache = Cache(k_LBKSH, v_LBKSH, cache.length_B + count_B)
    return hidden_BTD, cache


def logits(params: dict, hidden: jax.Array, *, cfg: Config) -> jax.Array:
    """Scores of every token of the vocabulary, float32."""
    if cfg.tie:
        return jnp.einsum(
            "...d,vd->...v", hidden, params["embed"], preferred_element_type=jnp.float32
        )
    return jnp.einsum("...d,dv->...v", hidden, params["head"], preferred_element_type=jnp.float32)


def token_logps(
    params: dict, hidden_BTD: jax.Array, tokens_BT: jax.Array, *, cfg: Config
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token given those before it, and the entropy of that prediction.

    Both [B, T] float32, in nats; position 0 has no prediction and holds 0. The sequence is walked in
    chunks of `cfg.chunk` positions, recomputed in the backward pass, so [B, T, V] never exists. The
    entropy carries no gradient.
    """
    B, T = tokens_BT.shape
    chunk = min(cfg.chunk, T)
    pad = -T % chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def score(hidden_BCD: jax.Array, target_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = logits(params, hidden_BCD, cfg=cfg)
        total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        picked_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        still_BCV = jax.lax.stop_gradient(logits_BCV - total_BC[..., None])
        return picked_BC - total_BC, -jnp.sum(jnp.exp(still_BCV) * still_BCV, axis=-1)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(B, -1)
        return jnp.pad(x[:, : T - 1], ((0, 0), (1, 0)))

    # the prediction of token t is made at t - 1; the last position predicts nothing
    target_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    parts = (split(hidden_BTD), split(target_BT))
    _, (logps, entropies) = jax.lax.scan(lambda _, part: (None, score(*part)), None, parts)
    return join(logps), join(entropies)
