"""A sequence over several devices: the same losses and gradients as on one, and less memory on each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdeep import mesh as meshes
from jaxdeep.errors import ConfigError
from jaxdeep.model import arch, attention, context, lora, qwen3
from jaxdeep.train import losses
from jaxdeep.types import Batch


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    return meshes.make_mesh(meshes.MeshConfig(**{"data": 1} | axes), jax.devices()[:count])


def packed(cfg, B, lengths, T):
    """Rows of segments with these lengths, longest first in one row and last in the next."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        at = 0
        for n, length in enumerate(lengths[:: 1 - 2 * (b % 2)]):
            segments[b, at : at + length] = n + 1
            positions[b, at : at + length] = np.arange(length)
            at += length
    tokens = rng.integers(0, cfg.V, (B, T)).astype(np.int32)
    learn = ((positions > 0) & (rng.random((B, T)) < 0.7)).astype(np.float32)
    return Batch(tokens, segments, positions, learn, learn * 0, learn)


def measured(cfg, mesh, params, adapter, batch):
    """Mean loss, what each token got, and the gradients of the adapter, or without one the weights'."""

    def total(trained, params, batch):
        trained = (params, trained) if params is not None else (trained, None)
        logp_BT, entropy_BT = losses.score(*trained, batch, cfg=cfg)
        loss, _ = losses.loss(logp_BT, entropy_BT, batch, clip=None)
        return loss / batch.learn_BT.sum(), (logp_BT * batch.learn_BT, entropy_BT * batch.learn_BT)

    place = functools.partial(arch.shardings, cfg, mesh)
    weights = jax.device_put(params, place())
    trained = weights
    if adapter is not None:
        rank = jax.tree.leaves(adapter)[0].shape[-1]
        targets = tuple(adapter)
        leaves = lora.leaves(cfg, lora.LoraConfig(rank, 1.0, targets))
        trained = jax.device_put(adapter, place(leaves))
    with meshes.use(mesh):
        run = jax.jit(jax.value_and_grad(total, has_aux=True))
        return jax.device_get(
            run(trained, None if adapter is None else weights, meshes.put(mesh, batch))
        )


def same(want, got, tolerance=1e-4):
    def close(a, b):
        np.testing.assert_allclose(b, a, atol=tolerance * max(np.abs(a).max(), 1e-2))

    assert max(np.abs(x).max() for x in jax.tree.leaves(want[1])) > 1e-3
    jax.tree.map(close, want, got)


BATCH = packed(tiny.CFG, 2, (37, 5, 11), 64)


@functools.cache
def alone(full):
    adapter = None if full else tiny.adapter()
    return measured(tiny.CFG, tiny.one_device(), tiny.params(), adapter, BATCH)


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        (dict(data=2, context=2, model=2), {}),
        (dict(context=8), dict(chunk=3)),
        (dict(context=4, model=2), dict(remat="full")),
        (dict(context=2, model=4), {}),
    ],
    ids=str,
)
def test_a_sequence_over_devices_equals_one_device(axes, changes):
    cfg = dataclasses.replace(tiny.CFG, **changes)
    same(alone(False), measured(cfg, mesh_of(**axes), tiny.params(), tiny.adapter(), BATCH))


def test_so_do_the_gradients_of_all_weights():
    mesh = mesh_of(data=2, context=2, model=2)
    same(alone(True), measured(tiny.CFG, mesh, tiny.params(), None, BATCH))


def test_each_device_holds_as_much_to_look_at():
    with meshes.use(mesh_of(context=4)):
        order = context.order(64)
        there_and_back = jax.jit(lambda x: (context.spread(x), context.restore(context.spread(x))))
        spread, natural = there_and_back(np.arange(64, dtype=np.int32)[None])
    assert sorted(order) == list(range(64))
    seen = (order + 1).reshape(4, 16).sum(1)
    assert len(set(seen)) == 1
    np.testing.assert_array_equal(spread[0], order)
    np.testing.assert_array_equal(natural[0], np.arange(64))


def test_sizes_that_do_not_divide_are_refused_with_their_numbers():
    mesh = mesh_of(context=4)
    with pytest.raises(ConfigError, match=r"60 positions.*8 chunks for context=4"):
        meshes.put(mesh, jax.tree.map(lambda x: x[:, :60], BATCH))
    with meshes.use(mesh), pytest.raises(ConfigError, match=r"60 positions.*2\*context=8"):
        jax.eval_shape(
            lambda p: qwen3.forward(p, None, jnp.zeros((1, 60), jnp.int32), cfg=tiny.CFG),
            tiny.params(),
        )
    q, k = (jax.ShapeDtypeStruct((1, 64, n, 8), jnp.float32) for n in (6, 2))
    with meshes.use(mesh_of(model=4)), pytest.raises(ConfigError, match=r"6 attention.*model=4"):
        jax.eval_shape(attention.attend, q, k, k, jax.ShapeDtypeStruct((1, 64), jnp.int32))


@functools.cache
def small(**changes):
    """A model whose activations, rather than its weights, take the memory."""
    sizes = dict(V=32, D=16, F=32, L=1, N=2, K=1, H=8, limit=1 << 17, chunk=1024) | changes
    cfg = dataclasses.replace(tiny.CFG, **sizes)
    spec = lora.LoraConfig(2, 2.0, ("wq", "wv", "w_up"))
    adapter = lora.init(jax.random.key(1), cfg, spec)
    return cfg, arch.init(jax.random.key(0), cfg), jax.tree.map(lambda x: x + 0.05, adapter)


def test_the_memory_of_a_device_falls_with_the_axis():
    cfg, params, adapter = small(D=64, F=128, N=4, H=16, remat="full")
    sizes = {}
    for C in (1, 2, 4, 8):

        def total(adapter, params, batch):
            logp_BT, _ = losses.score(params, adapter, batch, cfg=cfg)
            return (logp_BT * batch.learn_BT).sum()

        mesh = mesh_of(context=C)
        batch = [jax.ShapeDtypeStruct((1, 1 << 15), t) for t in [np.int32] * 3 + [np.float32] * 3]
        where = jax.sharding.NamedSharding(mesh, jax.P(meshes.ROWS, "context"))
        batch = Batch(*(x.update(sharding=where) for x in batch))
        with meshes.use(mesh):
            compiled = jax.jit(jax.grad(total)).lower(adapter, params, batch).compile()
        sizes[C] = compiled.memory_analysis().temp_size_in_bytes
    print(sizes)
    assert all(sizes[2 * C] < 0.65 * sizes[C] for C in (1, 2, 4)), sizes


@pytest.mark.slow
def test_131072_tokens_in_one_row():
    cfg, params, adapter = small(remat="full")
    batch = packed(cfg, 1, (100_000, 30_000), 1 << 17)
    want = measured(cfg, tiny.one_device(), params, adapter, batch)
    same(want, measured(cfg, mesh_of(context=8), params, adapter, batch))
