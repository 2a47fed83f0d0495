"""Attention: which key each query may see, and the plain computation that every kernel must equal.

Scores and softmax are float32. A query that may see nothing (padding) gets a finite value that
nothing reads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that is masked whole stays free of NaN


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    block: int = 512,
) -> jax.Array:
    """Causal attention of a sequence to itself, inside each segment; returns BTNH.

    Queries go `block` at a time, recomputed in the backward pass, so that memory grows with T and not
    with its square. Grouped keys and values are repeated: on XLA's CPU backend that halves the cost of
    the grouped einsum in training.
    """
    B, T, N, H = q_BTNH.shape
    k_BTNH = jnp.repeat(k_BTKH, N // k_BTKH.shape[2], axis=2)
    v_BTNH = jnp.repeat(v_BTKH, N // v_BTKH.shape[2], axis=2)

    def some(q_BQNH: jax.Array, segments_BQ: jax.Array, at_Q: jax.Array) -> jax.Array:
        scores_BNQT = jnp.einsum(
            "bqnh,btnh->bnqt", q_BQNH, k_BTNH, preferred_element_type=jnp.float32
        ) * (H**-0.5)
        seen_BQT = segments_BQ[:, :, None] == segments_BT[:, None, :]
        seen_BQT &= jnp.arange(T) <= at_Q[:, None]
        scores_BNQT = jnp.where(seen_BQT[:, None], scores_BNQT, MASKED)
        weights_BNQT = jax.nn.softmax(scores_BNQT, axis=-1).astype(v_BTNH.dtype)
        return jnp.einsum("bnqt,btnh->bqnh", weights_BNQT, v_BTNH)

    if block >= T:
        return some(q_BTNH, segments_BT, jnp.arange(T))
    pad = -T % block

    def split(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, pad if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

    parts = (split(q_BTNH, 1), split(segments_BT, 1), split(jnp.arange(T), 0))
    out = jax.lax.map(lambda part: jax.checkpoint(some)(*part), parts)
    return jnp.moveaxis(out, 0, 1).reshape(B, T + pad, N, H)[:, :T]


def attend_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array):
    """Attention of new queries to a cache that already holds their keys; returns BTNH.

    A query at position p sees slots 0..p. The cache is head-major so that each kv head is one
    batched matmul with its M query heads: half the time of a repeat in decoding.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    scores_BKQS = jnp.einsum(
        "bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32
    ) * (H**-0.5)
    seen_BTS = jnp.arange(S) <= positions_BT[:, :, None]
    seen_B1QS = jnp.repeat(seen_BTS, N // K, axis=1)[:, None]
    scores_BKQS = jnp.where(seen_B1QS, scores_BKQS, MASKED)
    weights_BKQS = jax.nn.softmax(scores_BKQS, axis=-1).astype(v_BKSH.dtype)
    out_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights_BKQS, v_BKSH)
    return out_BKQH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
