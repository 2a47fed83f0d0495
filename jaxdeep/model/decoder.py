"""Qwen3, dense or a mixture of experts, as pure functions over a dictionary of arrays (`weights.leaves`).

Layers are stacked on their first dimension and scanned. Precision: weights and activations in
`cfg.dtype`; norms, rotary angles, softmax and log-probabilities in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdeep.model import attention, context, moe, paged, rope
from jaxdeep.model import lora as adapters
from jaxdeep.model.config import REMAT, Config
from jaxdeep.parallel import mesh as meshes


@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dimension, in float32. For the backward pass `x` is kept as it
    is, not in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, *, positions: str | None) -> jax.Array:
    """The row of the table for each token, [B, T, D].

    On a mesh each device looks up, in the columns and the words it holds, the tokens of all rows of
    its `data` axis, and devices exchange what they found: the table stays where it is. `positions` is
    the axis that the sequence is spread over.
    """
    used = jax.sharding.get_abstract_mesh()
    if used.empty or used.size == 1:
        return jnp.take(table_VD, tokens_BT, axis=0)

    def local(table_vd, tokens_bt):
        tokens_Bt = jax.lax.all_gather(tokens_bt, "data", axis=0, tiled=True)
        at_Bt = tokens_Bt - jax.lax.axis_index("model") * len(table_vd)
        held_Bt = (at_Bt >= 0) & (at_Bt < len(table_vd))
        x_Btd = jnp.where(held_Bt[..., None], jnp.take(table_vd, at_Bt * held_Bt, axis=0), 0)
        x_btD = jax.lax.all_to_all(x_Btd, "data", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x_btD, "model")

    tokens = P(meshes.ROWS, positions)
    return jax.shard_map(
        local, in_specs=(P("model", "data"), tokens), out_specs=tokens, check_vma=False
    )(table_VD, tokens_BT)


def forward(
    params: dict,
    lora: dict | adapters.Bank | tuple | None,
    tokens_BT: jax.Array,
    *,
    cfg: Config,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: paged.Pages | None = None,
    count_B: jax.Array | None = None,
) -> tuple[jax.Array, paged.Pages | None]:
    """Hidden states after the last norm, [B, T, D], and the cache with the new tokens appended.

    Without a cache, tokens attend to earlier ones of their own segment (default: one segment a row),
    and on a mesh whose `context` axis shares sequences hidden states are in the order of that module:
    what `token_logps` expects.
    With a cache, the first `count_B` tokens of each row (default: all) are appended to what the row
    holds and attend to all of it; the rest of the row is padding and leaves no trace.

    `lora` is None (the base), an adapter, a Bank, or a tuple of them whose effects add up.
    """
    B, T = tokens_BT.shape
    if cache is not None:
        positions_BT = cache.held_B[:, None] + jnp.arange(T)
        count_B = jnp.full(B, T, jnp.int32) if count_B is None else count_B
    elif positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    positions = None  # the axis that the sequence is spread over
    if cache is None:
        positions = "context"
        tokens_BT, positions_BT, segments_BT = map(
            context.to_context_order, (tokens_BT, positions_BT, segments_BT)
        )
    cos, sin = rope.angles(positions_BT, cfg.H, cfg.theta, cfg.yarn)
    factors, mixes = adapters.parts(lora)
    whole = cache is None and context.sequence_parallel(T)

    def layer_step(carry, xs):
        x_BTD, cache = carry
        layer, factors, index = xs
        x_BTD = (
            context.constrain_activations(x_BTD)
            if cache is None
            else meshes.constrain(x_BTD, meshes.ROWS)
        )
        linear = adapters.Layer(layer, factors, mixes, cfg.lora_scale, whole)
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
        policy = jax.checkpoint_policies.save_only_these_names(*REMAT[cfg.remat])
        layer_step = jax.checkpoint(layer_step, prevent_cse=False, policy=policy)
    x_BTD = embed(params["embed"], tokens_BT, positions=positions)
    xs = (params["layers"], factors, jnp.arange(cfg.L))
    (x_BTD, cache), _ = jax.lax.scan(layer_step, (x_BTD, cache), xs)
    hidden_BTD = rms_norm(x_BTD, params["norm"], cfg.eps)
    if cache is not None:
        cache = cache.replace(held_B=cache.held_B + count_B)
    return hidden_BTD, cache


def logits(params: dict, hidden: jax.Array, *, cfg: Config) -> jax.Array:
    """Scores of every token of the vocabulary, float32."""
    if cfg.tie:
        return jnp.einsum(
            "...d,vd->...v", hidden, params["embed"], preferred_element_type=jnp.float32
        )
    return jnp.einsum("...d,dv->...v", hidden, params["head"], preferred_element_type=jnp.float32)


def token_logps(
    params: dict,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    *,
    cfg: Config,
    wanted_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token given those before it, and the entropy of that prediction.

    `hidden_BTD` is from `forward`, tokens and results are in natural order. Both [B, T] float32, in
    nats; position 0 has no prediction and holds 0, and so may tokens that are not `wanted_BT` (default:
    all are). The sequence is walked in chunks of `cfg.chunk` positions of each device, the wanted ones
    first, so [B, T, V] never exists, and chunks without any are passed over. The entropy carries no
    gradient; beside one it is good to 0.01 nats in bfloat16.
    """
    B, T = tokens_BT.shape
    C = context.shards()
    chunk = min(cfg.chunk, T // C)

    def ahead(x_BT: jax.Array) -> jax.Array:
        # the prediction of token t is made at t - 1; the last position predicts nothing
        return context.to_context_order(jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1))))

    wanted_BT = jnp.ones((B, T), bool) if wanted_BT is None else wanted_BT
    wanted_BCt = ahead(wanted_BT).reshape(B, C, T // C)
    places_BCt = jnp.argsort(~wanted_BCt, axis=-1, stable=True)
    back_BCt = jnp.argsort(places_BCt, axis=-1)

    def split(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = meshes.constrain(x.reshape(B, C, T // C, *rest), meshes.ROWS, "context")
        x = _reorder(x, places_BCt, back_BCt)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -(T // C) % chunk)] + [(0, 0)] * len(rest))
        x = jnp.moveaxis(x.reshape(B, C, -1, chunk, *rest), 2, 0)
        return meshes.constrain(x, None, meshes.ROWS, "context")

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2).reshape(B, C, -1)[..., : T // C]
        x = context.to_natural_order(_reorder(x, back_BCt, places_BCt).reshape(B, T))
        return jnp.pad(x[:, : T - 1], ((0, 0), (1, 0)))

    table = {name: params[name] for name in (("embed",) if cfg.tie else ("head",))}
    used = split(wanted_BCt.reshape(B, T)).any((1, 2, 3))
    logps, entropies = _score(cfg, table, split(hidden_BTD), split(ahead(tokens_BT)), used)
    return join(logps), join(jax.lax.stop_gradient(entropies))


@jax.custom_vjp
def _reorder(x: jax.Array, places_BCt: jax.Array, back_BCt: jax.Array) -> jax.Array:
    """`x` with its third dimension in another order, and `back_BCt` the way back: what its gradient takes,
    which would be a scatter."""
    places = places_BCt.reshape(*places_BCt.shape, *[1] * (x.ndim - 3))
    return jnp.take_along_axis(x, places, axis=2, mode="promise_in_bounds")


_reorder.defvjp(
    lambda x, places_BCt, back_BCt: (_reorder(x, places_BCt, back_BCt), (places_BCt, back_BCt)),
    lambda kept, along: (_reorder(along, kept[1], kept[0]), None, None),
)


def _score_chunk(cfg: Config, table: dict, hidden: jax.Array, target: jax.Array) -> tuple:
    """Scores at each position of a chunk, their exponentials under the largest, the sum of those, and
    the log-probability of the target."""
    scores = logits(table, hidden, cfg=cfg)
    top = jax.lax.stop_gradient(scores.max(-1))
    powers = jnp.exp(scores - top[..., None])
    total = powers.sum(-1)
    picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
    return scores, powers, total, picked - top - jnp.log(total)


def _where_used(make: Callable[..., Any], used: jax.Array, *part: jax.Array) -> Any:
    """What `make` makes of a chunk, zeros where it is not used."""
    shapes = jax.eval_shape(make, *part)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(used, make, lambda *_: nothing, *part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    cfg: Config, table: dict, hidden: jax.Array, target: jax.Array, used: jax.Array
) -> tuple:
    """Log-probabilities and entropies of the chunks that are used, one after the other."""

    def make(hidden, target):
        scores, powers, total, logp = _score_chunk(cfg, table, hidden, target)
        top = scores.max(-1)
        return logp, top + jnp.log(total) - (powers * scores).sum(-1) / total

    def one(_, part):
        return None, _where_used(make, *part)

    return jax.lax.scan(one, None, (used, hidden, target))[1]


def _score_forward(
    cfg: Config, table: dict, hidden: jax.Array, target: jax.Array, used: jax.Array
) -> tuple:
    """As `_score`. How a log-probability changes with its hidden state depends on nothing that comes
    later: it is kept, of the hidden state's size, so that no score is computed again for it. Scores are
    linear in the hidden state, so it also holds their mean, and with it the entropy."""

    def make(hidden, target):
        _, powers, total, logp = _score_chunk(cfg, table, hidden, target)
        here = jnp.arange(powers.shape[-1]) == target[..., None]
        pull = jnp.where(here, total[..., None] - powers, -powers).astype(hidden.dtype)
        weight = table["embed"] if cfg.tie else table["head"].T
        slope = jnp.einsum("...v,vd->...d", pull, weight, preferred_element_type=jnp.float32)
        slope /= total[..., None]
        entropy = (hidden.astype(jnp.float32) * slope).sum(-1) - logp
        return logp, entropy, slope.astype(hidden.dtype)

    def one(_, part):
        return None, _where_used(make, *part)

    _, (logps, entropies, slopes) = jax.lax.scan(one, None, (used, hidden, target))
    return (logps, entropies), (table, hidden, target, used, slopes)


def _score_backward(cfg: Config, kept: tuple, cotangents: tuple) -> tuple:
    """Of the table only where it is trained: else the compiler drops the scan."""
    (table, hidden, target, used, slopes), (along, _) = kept, cotangents

    def add(grads, hidden, target, along):
        _, pull = jax.vjp(lambda t: _score_chunk(cfg, t, hidden, target)[-1], table)
        return jax.tree.map(lambda g, new: g + new.astype(g.dtype), grads, pull(along)[0])

    def one(grads, part):
        used, *part = part
        return jax.lax.cond(used, add, lambda grads, *_: grads, grads, *part), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), table)
    grads, _ = jax.lax.scan(one, zeros, (used, hidden, target, along))
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, table)
    return grads, (slopes * along[..., None]).astype(hidden.dtype), None, None


_score.defvjp(_score_forward, _score_backward)
