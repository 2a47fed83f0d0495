"""Attention: which key each query may see, and the plain computation that every kernel must equal.

Scores and softmax are float32. A query that may see nothing (padding) gets a finite value that
nothing reads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that is masked whole stays free of NaN


def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array):
    """Causal attention of a sequence to itself, inside each segment; returns BTNH.

    Grouped keys and values are repeated: on XLA's CPU backend that halves the cost of the grouped
    einsum in training.
    """
    T, groups = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BTNH = jnp.repeat(k_BTKH, groups, axis=2)
    v_BTNH = jnp.repeat(v_BTKH, groups, axis=2)
    scores_BNTS = jnp.einsum(
        "btnh,bsnh->bnts", q_BTNH, k_BTNH, preferred_element_type=jnp.float32
    ) * (q_BTNH.shape[-1] ** -0.5)
    seen_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & jnp.tri(T, dtype=bool)
    scores_BNTS = jnp.where(seen_BTS[:, None], scores_BNTS, MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BTNH.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BTNH)


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
    seen_BKQS = jnp.repeat(seen_BTS, N // K, axis=1)[:, None]
    scores_BKQS = jnp.where(seen_BKQS, scores_BKQS, MASKED)
    weights_BKQS = jax.nn.softmax(scores_BKQS, axis=-1).astype(v_BKSH.dtype)
    out_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights_BKQS, v_BKSH)
    return out_BKQH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
