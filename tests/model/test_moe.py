"""Experts against a loop over tokens in float64, and spread over a mesh against one device."""

import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdeep.errors import CheckpointError
from jaxdeep.model import decoder, head, linear, lora, moe
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes

CFG = dataclasses.replace(tiny.CFG, E=8, top_k=3, F=24, tie=False)
SPEC = lora.LoraConfig(rank=2, alpha=4.0)
TOKENS = np.random.default_rng(0).integers(0, CFG.V, (8, 12))
MESHES = {
    "data=8": dict(data=8),
    "data=2 model=4": dict(data=2, model=4),
    "replica=2 data=2 model=2": dict(replica=2, data=2, model=2),
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: model_weights.init(jax.random.key(3), CFG))()


@pytest.fixture(scope="module")
def adapter():
    fresh = lora.init(jax.random.key(1), CFG, SPEC)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    factors = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)
    return lora.Adapter(factors, SPEC.scale)


def first_layer(tree):
    return jax.tree.map(lambda x: x[0], tree)


def token_by_token(x_BTD, weights, adapter, norm):
    """The mixture in float64, one token and one expert at a time."""
    as64 = jax.tree.map(lambda x: np.asarray(x, np.float64), (weights, adapter))
    weights, adapter = as64
    through = {n: weights[n] + 2 * adapter[n]["a"] @ adapter[n]["b"] for n in model_weights.EXPERTS}
    out = np.zeros(x_BTD.shape)
    for at in np.ndindex(*x_BTD.shape[:2]):
        x = np.asarray(x_BTD[at], np.float64)
        score = np.exp(x @ weights["router"])
        score /= score.sum()
        best = np.argsort(-score)[: CFG.top_k]
        weight = score[best] / (score[best].sum() if norm else 1)
        for e, w in zip(best, weight, strict=True):
            gate, up = x @ through["w_gate"][e], x @ through["w_up"][e]
            out[at] += w * (gate / (1 + np.exp(-gate)) * up) @ through["w_down"][e]
    return out


@pytest.mark.parametrize("norm", [True, False])
def test_equals_a_loop_over_tokens(params, adapter, norm):
    cfg = dataclasses.replace(CFG, norm_top_k=norm)
    x_BTD = jax.random.normal(jax.random.key(5), (2, 7, CFG.D))
    weights, factors = first_layer(params["layers"]), first_layer(adapter.factors)
    layer = linear.Layer(weights, (factors,), (SPEC.scale,))
    want = token_by_token(x_BTD, weights, factors, norm)
    np.testing.assert_allclose(moe.mlp(x_BTD, layer, cfg), want, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def alone(params, adapter):
    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, (0, 1)))(params, adapter))


def loss(params, adapter, tokens=TOKENS):
    hidden, _ = decoder.forward(params, adapter, tokens, cfg=CFG)
    return -head.token_logps(params, hidden, tokens, cfg=CFG)[0].mean()


QUICK = [("data=8", 256), ("data=2 model=4", 1)]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        pytest.param(
            *case,
            marks=() if case in QUICK else pytest.mark.slow,
            id=f"{case[0]}-{'blocks' if case[1] == 1 else 'at once'}",
        )
        for case in itertools.product(MESHES, (1, 256))
    ],
)
def test_experts_on_a_mesh_equal_one_device(name, least, params, adapter, alone, monkeypatch):
    monkeypatch.setattr(moe, "MIN_BLOCK_ROWS", least)
    if least == 1 and MESHES[name].get("model"):
        assert moe.blocks_of(4 * 12 * CFG.top_k, MESHES[name]["model"]) > 2
    mesh = meshes.make_mesh(meshes.MeshConfig(**MESHES[name]))
    with meshes.use(mesh):
        params = jax.device_put(params, model_weights.shardings(CFG, mesh))
        adapter = lora.place(adapter, CFG, mesh)
        tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, jax.P(meshes.ROWS, "context")))
        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, adapter, tokens)
    np.testing.assert_allclose(value, alone[0], rtol=1e-5)

    def close(ours, want):  # of every weight too, the router and the experts among them
        np.testing.assert_allclose(ours, want, atol=1e-4 * np.abs(want).max())

    jax.tree.map(close, grads, alone[1])


def test_experts_are_spread_and_each_holds_only_its_own(params):
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2, model=4))
    held = jax.device_put(params, model_weights.shardings(CFG, mesh))["layers"]["w_up"]
    assert held.addressable_shards[0].data.shape == (CFG.L, CFG.E // 4, CFG.D // 2, CFG.F)


def test_a_cache_holds_what_a_forward_computes(params, adapter):
    whole, _ = decoder.forward(params, adapter, TOKENS[:2], cfg=CFG)
    cache = tiny.pages(CFG, 2, 12)
    first, cache = decoder.forward(params, adapter, TOKENS[:2, :7], cfg=CFG, cache=cache)
    rest, _ = decoder.forward(params, adapter, TOKENS[:2, 7:], cfg=CFG, cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=2e-5)


def test_a_config_of_experts_goes_out_and_in_again():
    assert Config.from_hf(CFG.to_hf(), **tiny.HOW) == CFG
    for change, said in (
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 of 8"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Config.from_hf(CFG.to_hf() | change)


AHEAD = """
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxdeep.model import moe

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
shapes = dict(x=((4096, 1024), "bfloat16"), w=((32, 1024, 512), "bfloat16"),
              size=((32,), "int32"), expert=((4096,), "int32"))
args = {name: jax.ShapeDtypeStruct(*of, sharding=SingleDeviceSharding(device))
        for name, of in shapes.items()}
run = jax.jit(lambda x, w, size, expert: moe._ragged(x, w, size, expert))
done = run.lower(**args).compile()
print(int(done.cost_analysis()["flops"]), "tpu_custom_call" in done.as_text())
"""


@pytest.mark.slow
def test_tpus_compute_each_row_with_its_own_expert_alone():
    pytest.importorskip("libtpu")
    env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", AHEAD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(2 * 4096 * 1024 * 512), "True"]
