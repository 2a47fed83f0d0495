"""Banks of adapters: a row in a crowd is that row alone, and changing the crowd compiles
nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import decoder, lora
from jaxdeep.model import weights as model_weights
from jaxdeep.model.identity import Base, check

TOKENS = np.random.default_rng(0).integers(0, tiny.CFG.V, (4, 9))


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
        factors = jax.tree.map(
            lambda x, keys=keys: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh
        )
        adapters.append(lora.Adapter(factors, tiny.SPEC.scale))
    return cfg, params, adapters, jax.jit(lambda p, a: decoder.forward(p, a, TOKENS, cfg=cfg)[0])


def bank(adapters, *rows):
    return lora.stack(adapters, jnp.asarray(rows, jnp.float32))


def times(adapter, weight):
    return adapter.replace(scale=adapter.scale * weight)


def close(ours, want):
    np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(np.asarray(want)).max())


def test_mixed_rows_equal_each_alone_and_no_change_compiles(model):
    _, params, adapters, run = model
    alone = [run(params, adapter) for adapter in adapters]
    base = run(params, None)
    assert all(np.abs(a - base).max() > 0.1 for a in alone)
    mixed = run(params, bank(adapters, [0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]))
    for row, want in enumerate((alone[1], base, alone[2], alone[0])):
        close(mixed[row], want[row])
    before = run._cache_size()
    swapped = [adapters[2], adapters[0], adapters[1]]
    again = run(params, bank(swapped, [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]))
    for row, want in enumerate((alone[2], base, alone[0], alone[1])):
        close(again[row], want[row])
    assert run._cache_size() == before


def test_weights_compose_adapters(model):
    _, params, adapters, run = model
    weights = (0.7, -0.4, 1.1)
    merged = params
    for adapter, weight in zip(adapters, weights, strict=True):
        merged = lora.merge(merged, times(adapter, weight))
    composed = run(params, bank(adapters, *[weights] * 4))
    np.testing.assert_allclose(composed, run(merged, None), atol=5e-5)


def test_a_frozen_adapter_lies_under_a_trained_one(model):
    cfg, params, adapters, run = model
    frozen = bank(adapters[:1], *[[1]] * 4)
    both = run(params, (frozen, adapters[1]))
    merged = lora.merge(lora.merge(params, adapters[0]), adapters[1])
    np.testing.assert_allclose(both, run(merged, None), atol=5e-5)

    def loss(trained, frozen):
        return (decoder.forward(params, (frozen, trained), TOKENS, cfg=cfg)[0] ** 2).mean()

    grads = jax.jit(jax.grad(loss))(adapters[1], frozen)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_each_adapter_counts_by_its_own_scale(model):
    _, params, adapters, run = model
    louder, inverse = times(adapters[0], 3.0), times(adapters[0], -1.0)
    want = run(lora.merge(params, louder), None)
    np.testing.assert_allclose(run(params, louder), want, atol=5e-5)
    close(run(params, (louder, inverse, inverse)), run(params, adapters[0]))
    close(run(params, bank([adapters[1], louder], *[[0, 1]] * 4)), run(params, louder))


def test_a_sum_of_adapters_of_any_ranks_and_linears_is_one_adapter(model):
    cfg, params, adapters, run = model
    spec = lora.LoraConfig(3, 1.5, ("wk", "w_down"))
    fresh = lora.init(jax.random.key(7), cfg, spec)
    small = lora.Adapter(jax.tree.map(lambda x: x + 0.1, fresh), spec.scale)
    for parts in ((small, adapters[0]), (small,), (adapters[0], small, adapters[1])):
        joined = lora.concatenate(parts)
        rank = sum(part.config.rank for part in parts)
        targets = spec.targets if parts == (small,) else tiny.SPEC.targets
        assert joined.config == lora.LoraConfig(rank, float(rank), targets)
        assert joined.config == lora.concatenated([part.config for part in parts])
        close(run(params, joined), run(params, parts))


def test_an_adapter_knows_its_rank_alpha_and_linears():
    for spec in (tiny.SPEC, lora.LoraConfig(49, 1.0, ("wo",)), lora.LoraConfig(3, 10.0, ("wk",))):
        factors = lora.init(jax.random.key(0), tiny.CFG, spec)
        assert lora.Adapter(factors, spec.scale).config == spec


def test_what_an_adapter_was_trained_over_is_part_of_its_base():
    base, other = Base("owner/base", "aaaa-bbbb"), Base("owner/other", "cccc-dddd")
    one, two = tiny.scaled_adapter(), times(tiny.scaled_adapter(), 2.0)
    assert lora.base_over(base, ()) == base and lora.base_over(None, (one,)) is None
    over = [lora.base_over(base, under) for under in ((one,), (two,), (one, two), (two, one))]
    assert len({each.identity for each in (base, *over)}) == 5
    placed = lora.place(one, tiny.CFG, tiny.one_device())
    host = one.replace(factors=jax.device_get(one.factors))
    assert lora.base_over(base, (placed,)) == lora.base_over(base, (host,)) == over[0]
    check("it", over[0], over[0])
    check("it", over[0]._replace(identity="aaaa+" + over[0].identity.partition("+")[2]), over[0])
    for ours in (base, over[1]):
        with pytest.raises(CheckpointError, match=r"trained over owner/base .* set lora.under to"):
            check("it", over[0], ours)
    with pytest.raises(CheckpointError, match=r"set model\.path"):
        check("it", over[0], lora.base_over(other, (one,)))
    # adapters under the trained one: each is of the base, or of the base with those before it
    lora.check_under((one, two.replace(base=base)), base)
    lora.check_under((one, two.replace(base=over[0])), base)
    with pytest.raises(CheckpointError, match=r"lora.under\[0\] was trained over"):
        lora.check_under((two.replace(base=over[0]), one), base)
    with pytest.raises(CheckpointError, match=r"lora.under\[1\] belongs to the base owner/other"):
        lora.check_under((one, two.replace(base=other)), base)


def test_merging_and_unmerging_gives_the_base_back(model):
    _, params, adapters, _ = model
    back = lora.merge(lora.merge(params, adapters[0]), times(adapters[0], -1))
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
        lora.merge(quantized, adapters[0])


def test_adapters_of_another_rank_are_no_bank():
    other = lora.init(jax.random.key(0), tiny.CFG, lora.LoraConfig(rank=2, alpha=4.0))
    with pytest.raises(ConfigError, match="same linears and rank"):
        bank([tiny.scaled_adapter(), lora.Adapter(other, 2.0)], [1, 0])
