"""A sequence over several devices: the same losses and gradients as on one, and less memory on
each."""

import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bench import ahead

from jaxdeep import programs
from jaxdeep.errors import ConfigError
from jaxdeep.model import attention, context, decoder, lora
from jaxdeep.model import weights as model_weights
from jaxdeep.parallel import mesh as meshes
from jaxdeep.train import losses, optim
from jaxdeep.train import state as states
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


def measured(cfg, mesh, params, factors, batch):
    """What each learned token got, and the gradients of weights and factors, of the mean loss."""

    def total(trained, batch):
        params, factors = trained
        adapter = lora.Adapter(factors, tiny.SPEC.scale)
        logp_BT, entropy_BT = losses.score(params, adapter, batch, cfg=cfg)
        loss, _ = losses.loss(logp_BT, entropy_BT, batch)
        return loss / batch.learn_BT.sum(), (logp_BT * batch.learn_BT, entropy_BT * batch.learn_BT)

    leaves = lora.leaves(cfg, tiny.SPEC)
    trained = jax.device_put(
        (params, factors),
        (model_weights.shardings(cfg, mesh), model_weights.shardings(cfg, mesh, leaves)),
    )
    with meshes.use(mesh):
        run = jax.jit(jax.grad(total, has_aux=True))
        return jax.device_get(run(trained, meshes.put(mesh, batch)))


def same(want, got, tolerance=1e-4):
    def close(a, b):
        np.testing.assert_allclose(b, a, atol=tolerance * max(np.abs(a).max(), floor))

    floor = 1e-2 * max(np.abs(x).max() for x in jax.tree.leaves(want[0]))
    jax.tree.map(close, want, got)


BATCH = packed(tiny.CFG, 2, (37, 5, 11), 64)
MIXTURE = dict(E=4, top_k=2, F=16)
OLMO = dict(family="olmo3", window=9, windowed=(True, False), biases=("wq", "wk", "wv", "wo"))


@functools.cache
def model(**changes):
    """A configuration, weights, and an adapter far from zero."""
    cfg = dataclasses.replace(tiny.CFG, **changes)

    def build(key):
        adapter = lora.init(key, cfg, tiny.SPEC)
        return model_weights.init(key, cfg), jax.tree.map(lambda x: x + 0.05, adapter)

    return cfg, *jax.jit(build)(jax.random.key(0))


@functools.cache
def alone(**changes):
    cfg, params, adapter = model(**changes)
    return measured(cfg, tiny.one_device(), params, adapter, BATCH)


@pytest.mark.parametrize(
    ("axes", "changes", "how"),
    [
        (dict(data=2, context=2, model=2), {}, {}),
        pytest.param(dict(context=8), {}, dict(chunk=3, remat="full"), marks=pytest.mark.slow),
        pytest.param(dict(context=4, model=2), {}, {}, marks=pytest.mark.slow),
        pytest.param(dict(data=2, context=2, model=2), MIXTURE, {}, marks=pytest.mark.slow),
        pytest.param(dict(data=2, context=2, model=2), OLMO, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_sequence_over_devices_equals_one_device(axes, changes, how):
    cfg, params, adapter = model(**changes)
    cfg = dataclasses.replace(cfg, **how)
    same(alone(**changes), measured(cfg, mesh_of(**axes), params, adapter, BATCH))


@pytest.mark.slow
def test_linears_are_spread_where_positions_do_not_divide_over_the_model_axis():
    cfg, params, adapter = model()
    batch = jax.tree.map(lambda x: x[:, :63], BATCH)
    mesh = mesh_of(data=2, model=2)
    with meshes.use(mesh):
        assert context.sequence_parallel(64) and not context.sequence_parallel(63)
    want = measured(cfg, tiny.one_device(), params, adapter, batch)
    same(want, measured(cfg, mesh, params, adapter, batch))


def test_each_device_holds_as_much_to_look_at():
    with meshes.use(mesh_of(context=4)):
        order = context.order(64)
        there_and_back = jax.jit(
            lambda x: (
                context.to_context_order(x),
                context.to_natural_order(context.to_context_order(x)),
            )
        )
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
    params = tiny.params()  # shared with other tests: not to be made on this mesh
    with meshes.use(mesh), pytest.raises(ConfigError, match=r"60 positions.*2\*context=8"):
        jax.eval_shape(
            lambda p: decoder.forward(p, None, jnp.zeros((1, 60), jnp.int32), cfg=tiny.CFG), params
        )
    q, k = (jax.ShapeDtypeStruct((1, 64, n, 8), jnp.float32) for n in (6, 2))
    with meshes.use(mesh_of(model=4)), pytest.raises(ConfigError, match=r"6 attention.*model=4"):
        jax.eval_shape(attention.attend, q, k, k, jax.ShapeDtypeStruct((1, 64), jnp.int32))


@functools.cache
def temporary(C):
    """Bytes beside the arguments on each device, for the gradient with 32,768 tokens over C."""
    mesh = mesh_of(context=C)
    program = programs.compile_traced(programs.gradients(ahead.LONG, mesh, 1, 1 << 15), mesh)
    return program.memory_analysis().temp_size_in_bytes


def test_the_memory_of_a_device_falls_with_the_axis():
    assert temporary(8) < 0.25 * temporary(1)


@pytest.mark.slow
def test_the_memory_of_a_device_about_halves_with_each_doubling():
    sizes = [temporary(C) for C in (1, 2, 4, 8)]
    assert all(0.4 < b / a < 0.65 for a, b in itertools.pairwise(sizes)), sizes


@pytest.mark.slow
def test_131072_tokens_in_one_row():
    sizes = dict(V=32, D=16, F=32, L=1, N=1, K=1, H=8, limit=1 << 17, chunk=1024)
    cfg, params, adapter = model(**sizes)
    batch = packed(cfg, 1, (30_000, 40_000, 20_000, 25_000), 1 << 17)
    want = measured(cfg, tiny.one_device(), params, adapter, batch)
    same(want, measured(cfg, mesh_of(context=8), params, adapter, batch))


@pytest.mark.parametrize(
    ("model", "least", "most"), [pytest.param(1, 0.9, 1.5, marks=pytest.mark.slow), (4, 0, 0.4)]
)
def test_what_is_kept_of_a_layer_is_spread_over_the_model_axis_too(model, least, most):
    sizes = []
    for L in (4, 20):
        cfg = dataclasses.replace(tiny.CFG, L=L, remat="full", chunk=16)
        spec = states.Spec(cfg, tiny.SPEC, optim.OptimConfig(lr=1e-3, steps=10))
        mesh = mesh_of(model=model)
        program = programs.compile_traced(programs.gradients(spec, mesh, 1, 2048), mesh)
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    # what 16 more layers take, in inputs of their own
    grown = (sizes[1] - sizes[0]) / (16 * 2048 * tiny.CFG.D * 4)
    assert least < grown < most


AHEAD = """
import dataclasses
import tiny
from jax.experimental import topologies
from jaxdeep.parallel import mesh as meshes
from jaxdeep import programs
from jaxdeep.train import optim, state

cfg = dataclasses.replace(tiny.CFG, D=256, F=512, H=128, dtype="bfloat16", remat="full", chunk=256)
spec = state.Spec(cfg, tiny.SPEC, optim.OptimConfig(lr=1e-3, steps=10))
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
for axes in (dict(data=2, context=2, model=2), dict(data=8)):
    mesh = meshes.make_mesh(meshes.MeshConfig(**axes), devices)
    text = programs.compile_traced(programs.gradients(spec, mesh, 8, 8192), mesh).as_text()
    print("calls", text.count('custom_call_target="tpu_custom_call"'))
    for name in ("fwd", "dq", "dkv"):
        print("kernel", name, f"splash_mha_{name}" in text)
"""


@pytest.mark.slow
def test_the_gradient_compiles_for_tpus_with_the_kernel():
    pytest.importorskip("libtpu")
    paths = [str(pathlib.Path(tiny.__file__).parent), *filter(None, sys.path)]
    env = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("True") == 6 and "calls 0" not in done.stdout, done.stdout
    assert "Involuntary full rematerialization" not in done.stderr
