"""Qwen3, dense or a mixture of experts, as pure functions over a dictionary of arrays
(`weights.leaves`): token ids to hidden states. `head` goes on to log-probabilities.

Layers are stacked on their first dimension and scanned. Precision: weights and activations in
`cfg.dtype`; norms, rotary angles and softmax in float32.
"""

from __future__ import annotations

import functools

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
    cos, sin = rope.angles(positions_BT, cfg.H, cfg.theta, cfg.scaling)
    factors, scales = factors_and_scales(lora)
    gathered = cache is None and context.sequence_parallel(T)

    def layer_step(carry, xs):
        x_BTD, cache = carry
        layer, factors, index = xs
        # pins the layout of the scan's carry
        x_BTD = (
            context.constrain_activations(x_BTD)
            if cache is None
            else meshes.constrain(x_BTD, meshes.ROWS)
        )
        linear = Layer(layer, factors, scales, gathered)
        h_BTD = rms_norm(x_BTD, layer["attn_norm"], cfg.eps)
        q_BTNH = linear(h_BTD, "wq").reshape(B, T, cfg.N, cfg.H)
        k_BTKH = linear(h_BTD, "wk").reshape(B, T, cfg.K, cfg.H)
        v_BTKH = linear(h_BTD, "wv").reshape(B, T, cfg.K, cfg.H)
        q_BTNH = rope.rotate(rms_norm(q_BTNH, layer["q_norm"], cfg.eps), cos, sin)
        k_BTKH = rope.rotate(rms_norm(k_BTKH, layer["k_norm"], cfg.eps), cos, sin)
        if cache is None:
            out_BTNH = attention.attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, kind=cfg.attention)
        else:
            out_BTNH, kv_LPSJH = paged.extend(
                q_BTNH, k_BTKH, v_BTKH, cache, index, count_B, kind=cfg.attention
            )
            cache = cache.replace(kv_LPSJH=kv_LPSJH)
        x_BTD = x_BTD + linear(out_BTNH.reshape(B, T, cfg.N * cfg.H), "wo")
        h_BTD = rms_norm(x_BTD, layer["mlp_norm"], cfg.eps)
        if cfg.E:
            return (x_BTD + moe.mlp(h_BTD, linear, cfg), cache), None
        h_BTF = jax.nn.silu(linear(h_BTD, "w_gate")) * linear(h_BTD, "w_up")
        x_BTD = x_BTD + linear(h_BTF, "w_down")
        return (x_BTD, cache), None

    if cache is None:
        # in a scan nothing can be merged with the forward pass, so the barrier against it only
        # costs
        policy = jax.checkpoint_policies.save_only_these_names(*REMAT[cfg.remat])
        layer_step = jax.checkpoint(layer_step, prevent_cse=False, policy=policy)
    x_BTD = embed(params["embed"], tokens_BT, positions_axis="context" if cache is None else None)
    # the pages are carried, not scanned over: all layers write into one array, in place
    xs = (params["layers"], factors, jnp.arange(cfg.L))
    (x_BTD, cache), _ = jax.lax.scan(layer_step, (x_BTD, cache), xs)
    hidden_BTD = rms_norm(x_BTD, params["norm"], cfg.eps)
    if cache is not None:
        cache = cache.replace(held_B=cache.held_B + count_B)
    return hidden_BTD, cache


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
