"""Attention against a loop in numpy, in blocks against whole, kernels against plain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdeep.errors import ConfigError
from jaxdeep.model import attention, context
from jaxdeep.parallel import mesh as meshes


def inputs(T, B=2, N=4, K=2, H=8, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    cuts = np.sort(rng.integers(0, T, (B, 2)), axis=1)
    segments = 1 + (np.arange(T) >= cuts[:, :1]) + (np.arange(T) >= cuts[:, 1:])
    segments[1, -3:] = 0  # padding
    return q, k, v, segments.astype(np.int32)


def loop(q, k, v, segments, width=10**6):
    out = np.zeros(q.shape)
    B, T, N, H = q.shape
    for b in range(B):
        for t in range(T):
            first = max(t - width + 1, 0)
            seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
            for n in range(N):
                kv = n // (N // k.shape[2])
                scores = k[b, seen, kv].astype(float) @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
    return out


def run(args, weight=None, **options):
    """The output, and the gradients of queries, keys and values for a weighted sum of it."""
    weight = np.random.default_rng(1).standard_normal(args[0].shape) if weight is None else weight

    def total(q, k, v, segments):
        out = attention.attend(q, k, v, segments, **options)
        return (out * weight).sum(), out

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = step(*args)
    return jax.device_get((out, grads))


def same(want, got, atol=1e-4):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-4), want, got)


WINDOW = attention.Window(5)
ON, OFF = (attention.Window(5, np.array(on)) for on in (True, False))


@pytest.mark.parametrize("block", [64, 8])
@pytest.mark.parametrize("window", [None, WINDOW, ON, OFF], ids=["none", "always", "on", "off"])
def test_equals_a_loop(block, window):
    args = inputs(19)
    attend = jax.jit(functools.partial(attention.attend, block=block, window=window))
    want = loop(*args, 5) if window in (WINDOW, ON) else loop(*args)
    np.testing.assert_allclose(attend(*args), want, atol=1e-5)


@pytest.mark.parametrize("window", [None, attention.Window(11)], ids=["none", "11"])
def test_blocks_change_neither_values_nor_gradients(window):
    args = inputs(37)
    same(run(args, block=64, window=window), run(args, block=8, window=window))


@pytest.mark.parametrize("on", [None, True, False])
def test_splash_equals_plain(on):
    args = inputs(256, N=4, K=2, H=16)
    window = None if on is None else attention.Window(40, np.array(on))
    same(run(args, kind="plain", window=window), run(args, kind="splash", window=window))


@pytest.mark.parametrize(
    ("T", "axes", "window"),
    [
        (512, dict(data=1, context=2, model=4), attention.Window(140)),
        (256, dict(data=2, model=4), None),
    ],
    ids=str,
)
def test_splash_on_a_mesh_equals_plain_on_one_device(T, axes, window):
    """Two kv heads for four devices, and positions in the order of the context axis."""
    args = inputs(T, N=4, K=2, H=16)
    weight = np.random.default_rng(1).standard_normal(args[0].shape)
    want_out, want_grads = run(args, weight, kind="plain", window=window)
    with meshes.use(meshes.make_mesh(meshes.MeshConfig(**axes))):
        order = context.order(T)
        args = [x[:, order] for x in args]
        out, grads = run(args, weight[:, order], kind="splash", window=window)
    back = np.argsort(order)
    same((want_out, want_grads), jax.tree.map(lambda x: x[:, back], (out, grads)))


@pytest.mark.parametrize(("kind", "block"), [("plain", 512), ("plain", 64), ("splash", 128)])
def test_padding_is_seen_by_nobody(kind, block):
    q, k, v, segments = inputs(128)
    segments[:, :20] = 0  # before real queries: only the segment, not the order, hides it
    segments[:, 60:70] = 0
    real = segments > 0
    outs = []
    for value in (0.0, 30.0):
        k, v = (np.where(real[..., None, None], x, np.float32(value)) for x in (k, v))
        outs.append(run((q, k, v, segments), q * real[..., None, None], kind=kind, block=block))
    (out, grads), (changed, changed_grads) = outs
    np.testing.assert_array_equal(out[real], changed[real])
    for a, b in zip(grads, changed_grads, strict=True):
        np.testing.assert_array_equal(a[real], b[real])
        assert np.isfinite(b).all() and not b[~real].any()


def test_a_kernel_that_cannot_compute_is_refused_by_name_and_number():
    with pytest.raises(ConfigError, match=r"attention='flesh'.*auto, plain, splash, cudnn"):
        dataclasses.replace(tiny.CFG, attention="flesh")
    with pytest.raises(ConfigError, match=r"splash.*multiple of 128.*there are 100"):
        attention.choose("splash", (1, 100, 4, 16), jnp.float32)
    with pytest.raises(ConfigError, match="not on cpu"):
        attention.choose("cudnn", (1, 128, 4, 16), jnp.bfloat16)
    assert attention.choose("auto", (1, 128, 4, 16), jnp.bfloat16) == "plain"
