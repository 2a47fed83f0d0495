"""From hidden states to log-probabilities and entropies, without the [B, T, V] array of logits.

`token_logps` scores one chunk of positions after the other, forward and backward. Its forward pass
already computes the gradient with respect to the hidden states, so the backward pass scores nothing
again unless the head itself is trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdeep.model import context
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes


def logits(params: dict, hidden: jax.Array, *, cfg: Config) -> jax.Array:
    """The score of every token of the vocabulary for hidden states [..., D]; [..., V] float32."""
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
    """The log-probability of each token given those before it, and the entropy of that prediction;
    both [B, T] float32, in nats.

    `hidden_BTD` is from `decoder.forward`; tokens and results are in natural order. Position 0 has
    no prediction and holds 0, and tokens that are not `wanted_BT` (default: all are) may hold 0,
    too: each device scores the wanted positions first, in chunks of `cfg.chunk`, and skips chunks
    without any. The entropy carries no gradient. Inside a gradient it is accurate to 0.01 nats in
    bfloat16.
    """
    B, T = tokens_BT.shape
    C = context.shards()
    chunk = min(cfg.chunk, T // C)

    def next_token(x_BT: jax.Array) -> jax.Array:
        # position t predicts token t + 1; the last position predicts nothing
        return context.to_context_order(jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1))))

    wanted_BT = jnp.ones((B, T), bool) if wanted_BT is None else wanted_BT
    wanted_BCt = next_token(wanted_BT).reshape(B, C, T // C)
    # sorted within each device's positions, so that nothing crosses devices
    order_BCt = jnp.argsort(~wanted_BCt, axis=-1, stable=True)
    inverse_BCt = jnp.argsort(order_BCt, axis=-1)

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ...] in chunks, [chunks, B, C, chunk, ...], the wanted positions first."""
        rest = x.shape[2:]
        x = meshes.constrain(x.reshape(B, C, T // C, *rest), meshes.ROWS, "context")
        x = _reorder(x, order_BCt, inverse_BCt)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -(T // C) % chunk)] + [(0, 0)] * len(rest))
        x = jnp.moveaxis(x.reshape(B, C, -1, chunk, *rest), 2, 0)
        return meshes.constrain(x, None, meshes.ROWS, "context")

    def join(x: jax.Array) -> jax.Array:
        """Chunks of predictions back as [B, T], each beside the token it is of."""
        x = jnp.moveaxis(x, 0, 2).reshape(B, C, -1)[..., : T // C]
        x = context.to_natural_order(_reorder(x, inverse_BCt, order_BCt).reshape(B, T))
        return jnp.pad(x[:, : T - 1], ((0, 0), (1, 0)))

    table = {name: params[name] for name in (("embed",) if cfg.tie else ("head",))}
    used = split(wanted_BCt.reshape(B, T)).any((1, 2, 3))
    logps, entropies = _score(cfg, table, split(hidden_BTD), split(next_token(tokens_BT)), used)
    return join(logps), join(jax.lax.stop_gradient(entropies))


@jax.custom_vjp
def _reorder(x: jax.Array, order_BCt: jax.Array, inverse_BCt: jax.Array) -> jax.Array:
    """`x` with its third dimension in another order. The gradient is the same by the inverse order:
    automatic differentiation would scatter."""
    order = order_BCt.reshape(*order_BCt.shape, *[1] * (x.ndim - 3))
    return jnp.take_along_axis(x, order, axis=2, mode="promise_in_bounds")


_reorder.defvjp(
    lambda x, order_BCt, inverse_BCt: (
        _reorder(x, order_BCt, inverse_BCt),
        (order_BCt, inverse_BCt),
    ),
    lambda saved, grad: (_reorder(grad, saved[1], saved[0]), None, None),
)


def _score_chunk(cfg: Config, table: dict, hidden: jax.Array, target: jax.Array) -> tuple:
    """For each position of a chunk: the scores, their exponentials below the largest, the sum of
    those, and the log-probability of the target."""
    scores = logits(table, hidden, cfg=cfg)
    top = jax.lax.stop_gradient(scores.max(-1))
    powers = jnp.exp(scores - top[..., None])
    total = powers.sum(-1)
    picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
    return scores, powers, total, picked - top - jnp.log(total)


def _if_used(compute: Callable[..., Any], used: jax.Array, *chunk: jax.Array) -> Any:
    """`compute(*chunk)`, or zeros of its shape where the chunk is not used."""
    shapes = jax.eval_shape(compute, *chunk)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(used, compute, lambda *_: zeros, *chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    cfg: Config, table: dict, hidden: jax.Array, target: jax.Array, used: jax.Array
) -> tuple:
    """Log-probabilities and entropies of chunks, one after the other; 0 for those not used."""

    def compute(hidden, target):
        scores, powers, total, logp = _score_chunk(cfg, table, hidden, target)
        top = scores.max(-1)
        return logp, top + jnp.log(total) - (powers * scores).sum(-1) / total

    def step(_, chunk):
        return None, _if_used(compute, *chunk)

    return jax.lax.scan(step, None, (used, hidden, target))[1]


def _score_forward(
    cfg: Config, table: dict, hidden: jax.Array, target: jax.Array, used: jax.Array
) -> tuple:
    """As `_score`, and the slope of each log-probability with respect to its hidden state.

    The slope does not depend on anything computed later, so it is saved here, an array of the
    hidden states' size, and no score is computed again for it. With w the head: slope = w[target] -
    E[w], and scores are linear in the hidden state, so hidden . slope = score[target] - E[score],
    from which the entropy follows as hidden . slope - logp.
    """

    def compute(hidden, target):
        _, powers, total, logp = _score_chunk(cfg, table, hidden, target)
        is_target = jnp.arange(powers.shape[-1]) == target[..., None]
        # in the hidden state's dtype for the matmul; divided by the total after it, in float32
        pull = jnp.where(is_target, total[..., None] - powers, -powers).astype(hidden.dtype)
        weight = table["embed"] if cfg.tie else table["head"].T
        slope = jnp.einsum("...v,vd->...d", pull, weight, preferred_element_type=jnp.float32)
        slope /= total[..., None]
        entropy = (hidden.astype(jnp.float32) * slope).sum(-1) - logp
        return logp, entropy, slope.astype(hidden.dtype)

    def step(_, chunk):
        return None, _if_used(compute, *chunk)

    _, (logps, entropies, slopes) = jax.lax.scan(step, None, (used, hidden, target))
    return (logps, entropies), (table, hidden, target, used, slopes)


def _score_backward(cfg: Config, saved: tuple, cotangents: tuple) -> tuple:
    """Gradients of the head and of the hidden states. Where the head is frozen its gradient is not
    used, and the compiler drops the scan."""
    (table, hidden, target, used, slopes), (grad, _) = saved, cotangents

    def add(grads, hidden, target, grad):
        _, pull_back = jax.vjp(lambda t: _score_chunk(cfg, t, hidden, target)[-1], table)
        return jax.tree.map(lambda g, new: g + new.astype(g.dtype), grads, pull_back(grad)[0])

    def step(grads, chunk):
        used, *chunk = chunk
        return jax.lax.cond(used, add, lambda grads, *_: grads, grads, *chunk), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), table)
    grads, _ = jax.lax.scan(step, zeros, (used, hidden, target, grad))
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, table)
    return grads, (slopes * grad[..., None]).astype(hidden.dtype), None, None


_score.defvjp(_score_forward, _score_backward)
