"""Attention against a loop in numpy, and in blocks against whole."""

import functools

import jax
import numpy as np

from jaxdeep.model import attention


def inputs(T, B=2, N=4, K=2, H=8, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    cuts = np.sort(rng.integers(0, T, (B, 2)), axis=1)
    segments = 1 + (np.arange(T) >= cuts[:, :1]) + (np.arange(T) >= cuts[:, 1:])
    segments[1, -3:] = 0  # padding
    return q, k, v, segments.astype(np.int32)


def loop(q, k, v, segments):
    out = np.zeros(q.shape)
    B, T, N, H = q.shape
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for n in range(N):
                kv = n // (N // k.shape[2])
                scores = k[b, seen, kv].astype(float) @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
    return out


def test_equals_a_loop():
    args = inputs(19)
    np.testing.assert_allclose(jax.jit(attention.attend)(*args), loop(*args), atol=1e-5)


def test_blocks_change_neither_values_nor_gradients():
    args = inputs(37)

    def run(block):
        def total(q, k, v):
            out = attention.attend(q, k, v, args[3], block=block)
            return (out * np.arange(37)[None, :, None, None]).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*args[:3])

    whole, blocks = run(64), run(8)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3, rtol=1e-4), whole, blocks)


def test_a_cache_holds_what_a_sequence_would_see():
    q, k, v, _ = inputs(12)
    ones = np.ones((2, 12), np.int32)
    whole = jax.jit(attention.attend)(q, k, v, ones)
    rest = np.full((2, 2, 5, 8), 1e3, np.float32)  # slots past the positions must not be seen
    k_cache = np.concatenate([k.transpose(0, 2, 1, 3), rest], axis=2)
    v_cache = np.concatenate([v.transpose(0, 2, 1, 3), rest], axis=2)
    positions = np.broadcast_to(np.arange(9, 12), (2, 3))
    got = jax.jit(attention.attend_cache)(q[:, 9:], k_cache, v_cache, positions)
    np.testing.assert_allclose(got, whole[:, 9:], atol=1e-5)
