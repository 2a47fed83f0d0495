"""The decoders of `families`, dense or a mixture of experts, as pure functions over a dictionary of
arrays (`weights.leaves`): token ids to hidden states. `head` goes on to log-probabilities.

Layers are stacked on their first dimension and scanned. Precision: weights and activations in
`cfg.dtype`; norms, rotary angles and softmax in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdeep.model import attention, context, moe, paged, rope
from jaxdeep.model.config import REMAT, Config
from jaxdeep.model.linear import Layer
from jaxdeep.model.lora import Adapter, Bank, factors_and_scales
from jaxdeep.parallel import mesh as meshes


def forward(
    params: dict,
    lora: Adapter | Bank | tuple | None,
    tokens_BT: jax.Array,
    *,
    cfg: Config,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: paged.Pages | None = None,
    count_B: jax.Array | None = None,
) -> tuple[jax.Array, paged.Pages | None]:
    """Hidden states after the last norm, [B, T, D], and the cache with the new tokens appended.

    Without a cache (training), a token attends to earlier ones of its own segment (default: a row
    is one segment). On a mesh whose `context` axis shares sequences the hidden states are in the
    order of `context.order`, as `head.token_logps` expects them. With a cache (sampling), the first
    `count_B` tokens of each row (default: all) are appended to the row's tokens and attend to all
    of them; the rest of the row is padding, and is not written.

    `lora` is None (the weights alone), an Adapter, a Bank, or a tuple of these, whose effects add
    up.
    """
    B, T = tokens_BT.shape
    if cache is not None:
        positions_BT = cache.held_B[:, None] + jnp.arange(T)
        count_B = jnp.full(B, T, jnp.int32) if count_B is None else count_B
    elif positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    if cache is None:
        tokens_BT, positions_BT, segments_BT = map(
            context.to_context_order, (tokens_BT, positions_BT, segments_BT)
        )
    turned = _angles(positions_BT, cfg)
    factors, scales = factors_and_scales(lora)
    gathered = cache is None and context.sequence_parallel(T)

    def layer_step(carry, xs):
        x_BTD, cache = carry
        layer, factors, index, windowed = xs
        # pins the layout of the scan's carry
        x_BTD = (
            context.constrain_activations(x_BTD)
            if cache is None
            else meshes.constrain(x_BTD, meshes.ROWS)
        )
        linear = Layer(layer, factors, scales, gathered)
        before, after = _norms(layer, cfg)
        q_BTNH, k_BTKH, v_BTKH = _heads(before(x_BTD, "attn_norm"), linear, turned(windowed), cfg)
        how = dict(kind=cfg.attention, window=attention.Window.of(cfg.window, windowed))
        if cache is None:
            out_BTNH = attention.attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, **how)
        else:
            out_BTNH, kv_LPSJH = paged.extend(q_BTNH, k_BTKH, v_BTKH, cache, index, count_B, **how)
            cache = cache.replace(kv_LPSJH=kv_LPSJH)
        out_BTD = linear(out_BTNH.reshape(B, T, cfg.N * cfg.H), "wo")
        x_BTD = x_BTD + after(out_BTD, "attn_norm")
        x_BTD = x_BTD + after(_mlp(before(x_BTD, "mlp_norm"), linear, cfg), "mlp_norm")
        return (x_BTD, cache), None

    if cache is None:
        # in a scan nothing can be merged with the forward pass, so the barrier against it only
        # costs
        policy = jax.checkpoint_policies.save_only_these_names(*REMAT[cfg.remat])
        layer_step = jax.checkpoint(layer_step, prevent_cse=False, policy=policy)
    x_BTD = embed(params["embed"], tokens_BT, positions_axis="context" if cache is None else None)
    # the pages are carried, not scanned over: all layers write into one array, in place
    # None where all layers are alike
    windowed_L = jnp.array(cfg.windowed) if cfg.windowed else None
    xs = (params["layers"], factors, jnp.arange(cfg.L), windowed_L)
    (x_BTD, cache), _ = jax.lax.scan(layer_step, (x_BTD, cache), xs)
    hidden_BTD = rms_norm(x_BTD, params["norm"], cfg.eps)
    if cache is not None:
        cache = cache.replace(held_B=cache.held_B + count_B)
    return hidden_BTD, cache


def _angles(positions_BT: jax.Array, cfg: Config) -> Callable[[jax.Array | None], tuple]:
    """The cosines and sines of a layer, [B, T, 1, H / 2], by whether it is windowed (None: all are,
    or none is)."""
    scaled = rope.angles(positions_BT, cfg.H, cfg.theta, cfg.scaling)
    if cfg.kind.scaled_window or not cfg.window or cfg.scaling is None:
        return lambda windowed: scaled
    plain = rope.angles(positions_BT, cfg.H, cfg.theta, None)
    if not cfg.windowed:
        return lambda windowed: plain
    return lambda windowed: tuple(
        jnp.where(windowed, *pair) for pair in zip(plain, scaled, strict=True)
    )


def _norms(layer: dict, cfg: Config) -> tuple[Callable, Callable]:
    """The norms before a block and after it, by their names: one of them changes nothing."""

    def norm(x_BTD: jax.Array, name: str) -> jax.Array:
        return rms_norm(x_BTD, layer[name], cfg.eps)

    def same(x_BTD: jax.Array, name: str) -> jax.Array:
        return x_BTD

    return (norm, same) if cfg.kind.norms == "before" else (same, norm)


def _heads(x_BTD: jax.Array, linear: Layer, turned: tuple, cfg: Config) -> tuple:
    """Queries BTNH, keys and values BTKH, the first two normed as the family does, and rotated."""

    def heads(name: str, norm: str, width: int) -> jax.Array:
        x = linear(x_BTD, name)
        if norm and cfg.kind.qk_norm == "width":
            x = rms_norm(x, linear.weights[norm], cfg.eps)
        x = x.reshape(*x.shape[:2], width, cfg.H)
        if norm and cfg.kind.qk_norm == "head":
            x = rms_norm(x, linear.weights[norm], cfg.eps)
        return rope.rotate(x, *turned) if norm else x

    return heads("wq", "q_norm", cfg.N), heads("wk", "k_norm", cfg.K), heads("wv", "", cfg.K)


def _mlp(x_BTD: jax.Array, linear: Layer, cfg: Config) -> jax.Array:
    """The mlp, or the mixture of experts in its place; [B, T, D]."""
    if cfg.E:
        return moe.mlp(x_BTD, linear, cfg)
    h_BTF = jax.nn.silu(linear(x_BTD, "w_gate")) * linear(x_BTD, "w_up")
    return linear(h_BTF, "w_down")


@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension, computed in float32.

    Checkpointed, so that the backward pass keeps `x` in its own dtype and not its float32 copy.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, *, positions_axis: str | None) -> jax.Array:
    """The row of the table for each token, [B, T, D].

    On a mesh the table stays where it is, vocabulary over `model` and columns over `data`: each
    device looks up its own words and columns for the rows of its whole `data` axis, and the results
    are exchanged. `positions_axis` is the mesh axis that shares positions, None if none does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table_VD, tokens_BT, axis=0)

    def local(table_vd, tokens_bt):
        tokens_Bt = jax.lax.all_gather(tokens_bt, "data", axis=0, tiled=True)
        index_Bt = tokens_Bt - jax.lax.axis_index("model") * len(table_vd)
        mine_Bt = (index_Bt >= 0) & (index_Bt < len(table_vd))
        x_Btd = jnp.where(mine_Bt[..., None], jnp.take(table_vd, index_Bt * mine_Bt, axis=0), 0)
        x_btD = jax.lax.all_to_all(x_Btd, "data", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x_btD, "model")  # a word is on one device, the others add zeros

    tokens = P(meshes.ROWS, positions_axis)
    return jax.shard_map(
        local, in_specs=(P("model", "data"), tokens), out_specs=tokens, check_vma=False
    )(table_VD, tokens_BT)
