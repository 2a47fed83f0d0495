"""Attention to pages against the kernel's own reference, a loop, and one device."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

from jaxdeep.model import attention, decoder, paged
from jaxdeep.model import weights as model_weights
from jaxdeep.model.rope import Yarn
from jaxdeep.parallel import mesh as meshes


def inputs(B, T, N, K, H, S, X, seed=0, spare=3):
    rng = np.random.default_rng(seed)
    P = B * X + spare
    held = rng.integers(0, X * S - T + 1, B).astype(np.int32)
    held[0], held[-1] = 0, X * S - T
    table = rng.permutation(P)[: B * X].reshape(B, X).astype(np.int32)
    q = rng.standard_normal((B, T, N, H), np.float32)
    return q, rng.standard_normal((P, S, 2 * K, H), np.float32), table, held


@pytest.mark.parametrize(
    ("B", "T", "N", "K", "H", "S", "X", "width"),
    [
        (5, 1, 4, 2, 16, 8, 20, 0),
        (3, 7, 6, 2, 8, 16, 9, 0),
        (2, 16, 2, 2, 32, 128, 9, 0),
        (2 * paged.GROUP, 1, 4, 2, 16, 8, 6, 0),
        (1, 3, 4, 1, 8, 4, 1, 0),
        (5, 1, 4, 2, 16, 8, 20, 70),
        (3, 7, 6, 2, 8, 16, 9, 5),
        (2 * paged.GROUP, 1, 4, 2, 16, 8, 6, 12),
    ],
)
@pytest.mark.parametrize("there", ["cpu", "gpu"])
def test_plain_is_what_the_kernel_is_meant_to_compute(
    B, T, N, K, H, S, X, width, there, monkeypatch
):
    monkeypatch.setattr(attention, "platform", lambda: there)
    q, kv, table, held = inputs(B, T, N, K, H, S, X)
    want = ragged.ref_ragged_paged_attention(
        q.reshape(B * T, N, H),
        kv,
        held + T,
        table,
        np.arange(B + 1, dtype=np.int32) * T,
        np.array([B], np.int32),
        sm_scale=H**-0.5,
        sliding_window=width or None,
    )
    window = attention.Window.of(width, None)
    # a function of its own: what was traced for another device is not taken
    got = jax.jit(lambda *args: paged.plain(*args, window))(q, kv, table, held)
    np.testing.assert_allclose(got.reshape(B * T, N, H), want, atol=2e-6)


@pytest.mark.parametrize("width", [0, 30])
def test_a_row_is_the_same_beside_a_longer_one(width):
    q, kv, table, _ = inputs(2, 1, 4, 2, 16, 8, 40)
    run = jax.jit(lambda *args: paged.plain(*args, attention.Window.of(width, None)))
    short = run(q, kv, table, np.array([9, 0], np.int32))
    beside = run(q, kv, table, np.array([9, 300], np.int32))
    np.testing.assert_array_equal(short[0], beside[0])


def test_many_rows_are_the_same_as_few():
    """Groups of rows need blocks as the longest of each does."""
    q, kv, table, held = inputs(3 * paged.GROUP, 1, 4, 2, 16, 8, 20)
    run = jax.jit(paged.plain)
    parts = np.arange(3 * paged.GROUP).reshape(3, -1)
    few = [run(q[part], kv, table[part], held[part]) for part in parts]
    np.testing.assert_allclose(run(q, kv, table, held), np.concatenate(few), atol=1e-6)


def conversation(cfg, mesh):
    """Hidden states of rows whose tokens come in three parts, by pages on the mesh and by a plain
    forward pass; the second part comes as two rows of one call."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.V, (8, 24)).astype(np.int32)
    shards = mesh.shape["replica"] * mesh.shape["data"]
    B, S, X = len(tokens), 4, 7
    per = B // shards
    # each shard numbers its own pages
    table = np.concatenate([rng.permutation(per * X).reshape(per, X) for _ in range(shards)])
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    whole, _ = jax.jit(lambda x: decoder.forward(params, None, x, cfg=cfg))(tokens)
    params = jax.device_put(params, model_weights.shardings(cfg, mesh))

    @jax.jit
    def run(kv, table, held, part):
        pages = paged.Pages(kv, table, held)
        hidden, pages = decoder.forward(params, None, part, cfg=cfg, cache=pages)
        return hidden, pages.kv_LPSJH

    out = []
    with meshes.use(mesh):
        kv = paged.empty(cfg, mesh, B * X, S)
        for start, end in ((0, 10), (10, 22), (22, 24)):
            two = np.stack((tokens[:, start:end],) * 2, 1).reshape(2 * B, -1)
            half = (end - start) // 2
            two = np.where(np.arange(2 * B)[:, None] % 2, two[:, half:], two[:, :half])
            held = np.tile([start, start + half], B).astype(np.int32)
            hidden, kv = run(kv, np.repeat(table, 2, axis=0).astype(np.int32), held, two)
            out.append(np.asarray(hidden).reshape(B, end - start, cfg.D))
    return np.concatenate(out, 1), np.asarray(whole), kv


MESHES = [
    dict(data=8),
    dict(data=2, model=4),
    dict(replica=2, data=2, model=2),
    dict(context=4, model=2),
]


OLMO = dict(family="olmo3", window=6, windowed=(True, False), scaling=Yarn(4.0, 16))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [*((shape, {}) for shape in (dict(data=1), *MESHES)), (MESHES[1], OLMO)],
    ids=str,
)
def test_pages_on_a_mesh_hold_what_a_forward_pass_computes(shape, changes):
    devices = jax.devices()[: 1 if shape == dict(data=1) else 8]
    mesh = meshes.make_mesh(meshes.MeshConfig(**({"data": 1} | shape)), devices)
    got, want, kv = conversation(dataclasses.replace(tiny.CFG, **changes), mesh)
    np.testing.assert_allclose(got, want, atol=1e-5)
    local = kv.addressable_shards[0].data
    # each device has its rows' pages, of the kv heads that its query heads need
    rows, model = mesh.shape["replica"] * mesh.shape["data"], mesh.shape["model"]
    assert local.shape[1] == kv.shape[1] // rows
    assert local.shape[3] == 2 * max(tiny.CFG.K // model, 1)


AHEAD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jaxdeep.parallel import mesh as meshes
from jaxdeep.model import paged
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.sample import sampler
import tiny

cfg = Config(**dict(V=512, D=256, F=256, L=2, N=4, K=2, H=128, theta=1e6, eps=1e-6, tie=True,
    limit=65536) | tiny.HOW | dict(dtype="bfloat16"))
for name in sys.argv[1:]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = meshes.make_mesh(meshes.MeshConfig(data=len(devices) // 2, model=2), devices)
    rows = jax.sharding.NamedSharding(mesh, jax.P(meshes.ROWS))
    def like(shape, dtype, sharding=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or meshes.replicated(mesh))
    B, X, S = 8, 64, 64
    kv = like((cfg.L, 64 * len(devices), S, 2 * cfg.K, cfg.H), jnp.bfloat16,
        jax.sharding.NamedSharding(mesh, jax.P(None, meshes.ROWS, None, "model")))
    params = jax.tree.map(lambda leaf, to: like(leaf.shape, jnp.bfloat16, to), model_weights.leaves(cfg),
        model_weights.shardings(cfg, mesh), is_leaf=model_weights.is_leaf)
    f, i = lambda *shape: like(shape, jnp.float32), lambda *shape: like(shape, jnp.int32)
    prefill, decode = sampler.compiled(cfg, 4)
    with meshes.use(mesh):
        for T in (64, 1):
            how = sampler.DrawParams(like((B,), jnp.uint32), f(B), f(B), i(B), f(B), i(B, 8, 8), i(B, 8), i(B), i(B))
            rest = (i(B, T), i(B), how) if T > 1 else (i(B), how)
            program = (prefill if T > 1 else decode).lower(params, None, kv, i(B, X), i(B), *rest)
            program.compile()
            # of what was lowered: what a newer chip compiled to, this version may not be able to
            # print
            print(name, T, "ragged", "ragged_paged_attention" in program.as_text(), flush=True)
"""


@pytest.mark.slow
def test_prefill_and_decode_compile_for_tpus_with_the_kernel():
    pytest.importorskip("libtpu")
    paths = [str(pathlib.Path(tiny.__file__).parent), *filter(None, sys.path)]
    env = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", AHEAD, "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ragged True") == 8, done.stdout
