"""Banks of adapters: a row in a crowd is that row alone, and changing the crowd compiles nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdeep.errors import ConfigError
from jaxdeep.model import decoder, lora
from jaxdeep.model import weights as model_weights

TOKENS = np.random.default_rng(0).integers(0, tiny.CFG.V, (4, 9))
SCALE = tiny.SPEC.scale


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request):
    """A configuration, its weights, three adapters, and the forward pass as one function."""
    cfg = tiny.CFG
    if request.param == "experts":
        cfg = dataclasses.replace(cfg, E=4, top_k=2, F=16)
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    adapters = []
    for seed in range(3):
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        fresh = lora.init(next(keys), cfg, tiny.SPEC)
        adapters.append(
            jax.tree.map(
                lambda x, keys=keys: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh
            )
        )
    return cfg, params, adapters, jax.jit(lambda p, a: decoder.forward(p, a, TOKENS, cfg=cfg)[0])


def bank(adapters, *rows):
    return lora.Bank(lora.stack(adapters), jnp.asarray(rows, jnp.float32))


def close(ours, want):
    np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(np.asarray(want)).max())


def test_mixed_rows_equal_each_alone_and_no_change_compiles(model):
    _, params, adapters, run = model
    alone = [run(params, adapter) for adapter in adapters]
    base = run(params, None)
    assert all(np.abs(a - base).max() > 0.1 for a in alone)
    mixed = run(params, bank(adapters, [0, SCALE, 0], [0, 0, 0], [0, 0, SCALE], [SCALE, 0, 0]))
    for row, want in enumerate((alone[1], base, alone[2], alone[0])):
        close(mixed[row], want[row])
    before = run._cache_size()
    swapped = [adapters[2], adapters[0], adapters[1]]
    again = run(params, bank(swapped, [SCALE, 0, 0], [0, 0, 0], [0, SCALE, 0], [0, 0, SCALE]))
    for row, want in enumerate((alone[2], base, alone[0], alone[1])):
        close(again[row], want[row])
    assert run._cache_size() == before


def test_weights_compose_adapters(model):
    _, params, adapters, run = model
    weights = (0.7, -0.4, 1.1)
    merged = params
    for adapter, weight in zip(adapters, weights, strict=True):
        merged = lora.merge(merged, adapter, weight * SCALE)
    composed = run(params, bank(adapters, *[[w * SCALE for w in weights]] * 4))
    np.testing.assert_allclose(composed, run(merged, None), atol=5e-5)


def test_a_frozen_adapter_lies_under_a_trained_one(model):
    cfg, params, adapters, run = model
    frozen = bank(adapters[:1], *[[SCALE]] * 4)
    both = run(params, (frozen, adapters[1]))
    merged = lora.merge(lora.merge(params, adapters[0], SCALE), adapters[1], SCALE)
    np.testing.assert_allclose(both, run(merged, None), atol=5e-5)

    def loss(trained, frozen):
        return (decoder.forward(params, (frozen, trained), TOKENS, cfg=cfg)[0] ** 2).mean()

    grads = jax.jit(jax.grad(loss))(adapters[1], frozen)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_merging_and_unmerging_gives_the_base_back(model):
    _, params, adapters, _ = model
    back = lora.merge(lora.merge(params, adapters[0], SCALE), adapters[0], -SCALE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, params)


def test_int8_weights_stay_close_and_hold_a_quarter(model):
    cfg, params, adapters, run = model
    small = dataclasses.replace(cfg, quant="int8")
    quantized = jax.jit(lambda: model_weights.init(jax.random.key(0), small))()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), quantized)
    wanted = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype or "float32"),
        model_weights.leaves(small),
        is_leaf=model_weights.is_leaf,
    )
    assert shapes == wanted
    for name in model_weights.LINEARS:
        whole, part = params["layers"][name], quantized["layers"][name]
        back = part["q"] * part["scale"][..., None, :]
        assert np.abs(back - whole).max() <= 0.5001 * part["scale"].max()
        assert part["q"].nbytes == whole.nbytes // 4
    want, got = run(params, adapters[0]), run(quantized, adapters[0])
    assert 0 < np.abs(got - want).mean() < 0.05 * np.abs(want).mean()
    with pytest.raises(ConfigError, match="int8"):
        lora.merge(quantized, adapters[0], SCALE)


def test_adapters_of_another_rank_are_no_bank():
    other = lora.init(jax.random.key(0), tiny.CFG, lora.LoraConfig(rank=2, alpha=4.0))
    with pytest.raises(ConfigError, match="same linears and rank"):
        lora.stack([tiny.adapter(), other])
