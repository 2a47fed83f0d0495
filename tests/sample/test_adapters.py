"""Adapters of different ranks and linears in one bank: each is what it is alone, and what fits
compiles nothing."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jaxdeep.errors import ConfigError
from jaxdeep.model import decoder, lora
from jaxdeep.model import weights as model_weights
from jaxdeep.parallel import mesh as meshes
from jaxdeep.sample.adapters import AdapterBank, rank_of
from jaxdeep.sample.engine import Engine, EngineConfig
from jaxdeep.types import Sampling


def made(rank, targets=model_weights.LINEARS, cfg=tiny.CFG, seed=0):
    """An adapter far from zero, of a scale of its own."""
    spec = lora.LoraConfig(rank, 3.0, tuple(targets))
    rng = np.random.default_rng([rank, len(targets), seed])
    fresh = lora.init(jax.random.key(seed), cfg, spec)
    factors = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), fresh)
    return lora.Adapter(factors, spec.scale)


SMALL = made(2, ("wq", "w_down"))
MIDDLE = made(4)
LARGE = made(8, ("wo", "w_up", "wv"))
EVERY = {"small": SMALL, "middle": MIDDLE, "large": LARGE}


def logps(tokens, weights):
    """By one plain forward pass with the weighted sum of adapters, [T]."""
    scaled = (  # all in every pass, so that there is one program
        adapter.replace(scale=weights.get(name, 0.0) * adapter.scale)
        for name, adapter in EVERY.items()
    )
    return tiny.logps(tokens, tuple(scaled))


def test_different_ranks_and_linears_side_by_side_are_each_what_they_are_alone():
    sizes = dict(slots=8, length=64, page=4, chunk=16, tile=8, steps=4, adapters=4, exact=True)
    engine = Engine(tiny.params(), tiny.CFG, tiny.one_device(), EngineConfig(**sizes))
    prompt = np.random.default_rng(0).integers(1, tiny.CFG.V, 20).tolist()

    def compiled(name, adapter):
        """Programs that are compiled once the name stands for the adapter."""
        before = engine.metrics()["compilations"]
        engine.set_adapter(adapter, name)
        engine.warm()
        return engine.metrics()["compilations"] - before

    async def ask(names):
        calls = (
            engine(prompt, seed=i, max_new=9, adapter=name, sampling=Sampling(1.0))
            for i, name in enumerate(names)
        )
        return await asyncio.gather(*calls)

    try:
        first = compiled("small", SMALL)
        before = asyncio.run(ask(["small"]))[0]
        # a larger rank and more linears: each program once more, and no more than that
        assert compiled("middle", MIDDLE) == compiled("large", LARGE) == 2 <= first
        assert compiled("other", made(3, ("wk", "w_gate"))) == compiled("other", None) == 0
        weights = {"small": 0.5, "middle": -0.4, "large": 1.1}
        engine.compose("all", weights)
        done = asyncio.run(ask([*EVERY, "all", ""]))
        compilations = engine.metrics()["compilations"]
        assert asyncio.run(ask(["small"]))[0].tokens == before.tokens == done[0].tokens
        assert engine.metrics()["compilations"] == compilations
    finally:
        engine.close()
    wanted = [{name: 1.0} for name in EVERY] + [weights, {}]
    seen = []
    for completion, want in zip(done, wanted, strict=True):
        seen.append(logps(prompt + completion.tokens, want)[len(prompt) :])
        np.testing.assert_allclose(completion.logps, seen[-1], atol=1e-5)
        if want:
            base = logps(prompt + completion.tokens, {})[len(prompt) :]
            assert np.abs(seen[-1] - base).max() > 0.05
    np.testing.assert_allclose(before.logps, seen[0], atol=1e-5)


@pytest.fixture(params=["dense", "experts"])
def cfg(request):
    if request.param == "dense":
        return tiny.CFG
    return dataclasses.replace(tiny.CFG, E=4, top_k=2, F=16)


def test_a_bank_of_one_shape_is_the_one_that_is_compiled_ahead(cfg):
    bank = AdapterBank(cfg, 3)
    for seed in range(3):
        bank.put(str(seed), made(4, cfg=cfg, seed=seed), 0, [])
        leaves = lora.leaves(cfg, lora.LoraConfig(4, 1.0), adapters=3)
        want = jax.tree.map(lambda leaf: leaf.shape, leaves, is_leaf=model_weights.is_leaf)
        assert jax.tree.map(lambda x: x.shape, bank.factors) == want


def test_padding_adds_nothing_and_a_slot_keeps_nothing_of_the_adapter_before(cfg):
    adapters = [made(8, cfg=cfg), made(2, ("wq", "w_up"), cfg), made(4, ("w_up", "w_down"), cfg)]
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    tokens = np.random.default_rng(0).integers(0, cfg.V, (1, 9))
    run = jax.jit(lambda lora: decoder.forward(params, lora, tokens, cfg=cfg)[0])

    bank = AdapterBank(cfg, 2)
    for turn, adapter in enumerate([*adapters, *adapters[::-1]]):
        name = str(turn % 2)
        bank.put(name, adapter, turn, [])
        got = run(lora.Bank(bank.factors, bank[name].mix_A[None]))
        want = run(adapter)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        assert np.abs(got - run(None)).max() > 0.01 and bank[name].version == turn


@pytest.mark.parametrize("shape", [dict(data=4, model=2), dict(data=2, context=2, model=2)])
def test_a_bank_that_grows_keeps_its_sharding(shape):
    cfg, mesh = tiny.CFG, meshes.make_mesh(meshes.MeshConfig(**shape))
    bank = AdapterBank(cfg, 2)
    for rank, targets in (
        (2, ("wq", "w_down")),
        (4, model_weights.LINEARS),
        (4, model_weights.LINEARS),
        (2, ("wk",)),
    ):
        adapter = made(rank, targets)
        spec = lora.LoraConfig(rank, 1.0, targets)
        placed = model_weights.shardings(cfg, mesh, lora.leaves(cfg, spec))
        bank.put("", adapter.replace(factors=jax.device_put(adapter.factors, placed)), 0, [])
        names = tuple(bank.factors)
        spec = lora.LoraConfig(rank_of(bank.factors), 1.0, names)
        want = model_weights.shardings(cfg, mesh, lora.leaves(cfg, spec, adapters=2))
        same = jax.tree.map(
            lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), bank.factors, want
        )
        assert all(jax.tree.leaves(same))


def test_a_slot_is_taken_while_a_name_or_a_request_uses_it():
    bank = AdapterBank(tiny.CFG, 2)
    assert bank.put("a", SMALL, 1, []) is None
    first = bank["a"]
    assert first.named and first.version == 1 and np.flatnonzero(first.mix_A).tolist() == [0]
    assert bank.put("a", SMALL, 2, [first]) is first  # both versions at once
    assert not first.named and np.flatnonzero(bank["a"].mix_A).tolist() == [1]
    with pytest.raises(RuntimeError, match=r"no room for adapter 'b'.*EngineConfig\.adapters=2"):
        bank.put("b", SMALL, 1, [first])
    bank.put("b", SMALL, 1, [])  # once nobody waits for the first version
    assert np.flatnonzero(bank["b"].mix_A).tolist() == [0]
    bank.compose("both", {"a": 2.0, "b": -1.0})
    np.testing.assert_allclose(bank["both"].mix_A, [-SMALL.scale, 2 * SMALL.scale])
    bank.put("a", None, 3, [])
    assert not bank["a"].mix_A.any() and bank["both"].mix_A.any()
    with pytest.raises(ValueError, match="no adapter 'c', only '', 'a', 'b', 'both'"):
        bank["c"]


def test_a_name_that_is_removed_leaves_its_place():
    bank = AdapterBank(tiny.CFG, 1)
    bank.put("a", SMALL, 1, [])
    gone = bank.remove("a")
    assert not gone.named and list(bank.mixes) == [""]
    with pytest.raises(RuntimeError, match="no room"):
        bank.put("b", SMALL, 1, [gone])  # while a request still uses it
    bank.put("b", SMALL, 1, [])
    for name, said in (("a", "no adapter 'a', only '', 'b'"), ("", "let it stand for the base")):
        with pytest.raises(ValueError, match=said):
            bank.remove(name)


def test_processes_take_a_slot_that_is_free_in_all_of_them():
    bank = AdapterBank(tiny.CFG, 3, lambda used: [used, [False, True, False]])
    bank.put("a", SMALL, 0, [])
    bank.put("b", SMALL, 0, [])
    assert [np.flatnonzero(bank[name].mix_A).tolist() for name in "ab"] == [[0], [2]]


def test_an_adapter_of_another_model_is_refused_and_changes_nothing():
    bank = AdapterBank(tiny.CFG, 2)
    other = made(2, ("wq", "w_up"), dataclasses.replace(tiny.CFG, F=64))
    with pytest.raises(
        ConfigError, match=r"w_up\.b is \(2, 2, 64\), and the model takes \(2, 2, 48\)"
    ):
        bank.put("a", other, 0, [])
    with pytest.raises(ConfigError, match=r"lora\.targets=\('head',\)"):
        bank.put("a", lora.Adapter({"head": SMALL.factors["wq"]}, 1.0), 0, [])
    assert bank.factors is None and list(bank.mixes) == [""]
