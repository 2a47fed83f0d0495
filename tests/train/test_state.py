"""A training step: packed = padded, microbatches = one batch, sharded = one device, saved = not
stopped; and the frozen base costs no gradient."""

import asyncio
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import tiny

from jaxdeep import programs
from jaxdeep.data.pack import pack, pack_bins
from jaxdeep.errors import ConfigError
from jaxdeep.model import lora
from jaxdeep.model import weights as model_weights
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl.objective import Correction, Kl, Objective
from jaxdeep.sample.engine import Engine, EngineConfig
from jaxdeep.train import checkpoint, losses, optim
from jaxdeep.train import state as states
from jaxdeep.types import Row

OPTIM = optim.OptimConfig(lr=1e-2, steps=10, warmup=2)
SFT = states.Spec(tiny.CFG, tiny.SPEC, OPTIM)
GRPO = states.Spec(tiny.CFG, tiny.SPEC, OPTIM, Objective())
GSPO = states.Spec(  # with all that a step can do beside
    tiny.CFG,
    tiny.SPEC,
    OPTIM,
    Objective(
        "gspo",
        aggregate="sequence",
        kl=Kl("k3", 0.1),
        entropy=0.1,
        correction=Correction("truncate", high=1.2),
    ),
)
FULL = states.Spec(tiny.CFG, lora.LoraConfig(0, 1.0), OPTIM)


def rows(n=13, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        T = int(rng.integers(5, 30))
        learn = (rng.random(T) < 0.5).astype(np.float32)
        learn[0], learn[-1] = 0, 1
        logp = (-4.5 + 0.3 * rng.standard_normal(T)).astype(np.float32) * learn
        tokens = rng.integers(0, tiny.CFG.V, T).astype(np.int32)
        out.append(Row(tokens, learn, logp, learn * np.float32(rng.normal())))
    return out


def ready(spec, mesh=None):
    """A step on the mesh as a function: batches to gradients and metrics on the host."""
    mesh = mesh or tiny.one_device()
    trained = tiny.params() if spec.full else tiny.adapter()
    state = states.init(jax.random.key(0), spec, mesh, trained)
    params = None
    if not spec.full:
        params = jax.device_put(tiny.params(), model_weights.shardings(tiny.CFG, mesh))
    step = states.Step(spec, mesh)

    def run(batches):
        grads, metrics = step.gradients(state, states.Frozen(params), batches)
        assert shardings(grads) == shardings(state.trained)
        return jax.device_get((grads, metrics))

    return run


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def gradients(spec, batches):
    return ready(spec)(batches)


def same(a, b, tolerance=1e-5):
    (grads_a, metrics_a), (grads_b, metrics_b) = a, b
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads_a))
    assert scale > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance * scale), grads_a, grads_b
    )
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(SFT, id="sft", marks=pytest.mark.slow),
        pytest.param(GRPO, id="grpo", marks=pytest.mark.slow),
        pytest.param(GSPO, id="gspo"),
        pytest.param(FULL, id="full"),
    ],
)
def test_packed_equals_one_row_each_and_microbatches_equal_one_batch(spec):
    run, plain = ready(spec), rows()
    counts = np.random.default_rng(1).choice(np.float32([0.25, 0.5, 1.0, 3.0]), (len(plain), 30))
    weighed = [
        row._replace(learn=row.learn * part, advantage=row.advantage * part)
        for row, weights in zip(plain, counts, strict=True)
        for part in [weights[: len(row.learn)]]
    ]
    found = []
    for every in (plain, weighed):
        padded = pack_bins([[row] for row in every], 16, 32)
        packed = pack(every, B=16, T=48)
        small = pack(every, B=2, T=32)
        assert len(packed) == 1 and len(small) > 3
        found.append(run([padded]))
        same(found[-1], run(packed))
        same(found[-1], run(small))
    assert found[0][1]["loss"] != pytest.approx(found[1][1]["loss"], rel=0.01)


def test_padding_and_other_segments_change_nothing():
    batch = pack(rows(), B=8, T=64)[0]
    noise = np.random.default_rng(1).integers(0, tiny.CFG.V, batch.tokens_BT.shape)
    padding = batch.segments_BT == 0
    assert padding.sum() > 20
    changed = batch._replace(
        tokens_BT=np.where(padding, noise, batch.tokens_BT).astype(np.int32),
        logp_BT=np.where(padding, np.float32(-300), batch.logp_BT),
    )
    want, got = gradients(GRPO, [batch]), gradients(GRPO, [changed])
    jax.tree.map(np.testing.assert_array_equal, want, got)


@functools.cache
def alone(spec):
    """On one device, for comparing with."""
    return gradients(spec, pack(rows(), B=8, T=64))


@functools.cache
def scored():
    """A batch that learns every token, each with the log-probability it has on one device."""
    batch = pack(rows(), B=8, T=64)[0]
    batch = batch._replace(learn_BT=(batch.positions_BT > 0).astype(np.float32))
    score = jax.jit(functools.partial(losses.score, cfg=tiny.CFG))
    logp_BT, _ = score(tiny.params(), tiny.scaled_adapter(), batch)
    return batch._replace(logp_BT=np.asarray(logp_BT) * batch.learn_BT)


MESHES = [
    dict(data=8),
    dict(data=1, model=8),
    dict(data=2, model=4),  # more devices than kv heads
    dict(replica=2, data=2, model=2),
    dict(data=2, context=2, model=2),
]
SPECS = {"sft": SFT, "grpo": GRPO, "gspo": GSPO, "full": FULL}
# each objective on a mesh, each axis divided; the other pairs take minutes
QUICK = [("grpo", 1), ("sft", 2), ("full", 3), ("gspo", 4)]
CASES = [
    pytest.param(name, MESHES[n], marks=() if (name, n) in QUICK else pytest.mark.slow)
    for name, n in [*itertools.product(("sft", "grpo"), range(5)), ("gspo", 4), ("full", 3)]
]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_a_mesh_equals_one_device(name, shape):
    spec, mesh = SPECS[name], meshes.make_mesh(meshes.MeshConfig(**shape))
    assert spec.model.K < 4 and spec.model.N == 8
    run = ready(spec, mesh)
    same(alone(spec), run(pack(rows(), B=8, T=64)))
    if (
        spec.objective.kind != "likelihood"
    ):  # the forward pass too, by the token for which it differs most
        assert alone(spec)[1]["max_logp_diff"] > 0.1
        assert run([scored()])[1]["max_logp_diff"] < 1e-5


def test_an_update_on_a_mesh_keeps_its_shards_and_equals_one_device():
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2, model=4))
    grads, _ = alone(SFT)
    found = []
    for each in (tiny.one_device(), mesh):
        state = states.init(jax.random.key(0), SFT, each, tiny.adapter())
        placed = jax.device_put(grads, shardings(state.trained))
        before = shardings(state)
        after, _ = states.Step(SFT, each).update(state, placed)
        assert shardings(after) == before
        assert all(x.is_deleted() for x in jax.tree.leaves(state)), "the old state is held too"
        found.append(jax.device_get(after))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)
    assert after.trained["wq"]["b"].sharding.spec[2] == "model"
    assert after.trained["wo"]["a"].sharding.spec[1] == "model"
    moments = [x for x in jax.tree.leaves(after.opt) if x.ndim == 3]
    assert len(moments) == 2 * 14 and any("model" in str(x.sharding.spec) for x in moments)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gradient_memory(adapter, L):
    """What the gradient program of a model with wide layers and few tokens takes; the base's
    bytes."""
    cfg = dataclasses.replace(tiny.CFG, V=64, D=256, F=1024, L=L, H=32)
    spec = states.Spec(cfg, adapter, OPTIM)
    mesh = tiny.one_device()
    memory = programs.compile_traced(programs.gradients(spec, mesh, 1, 4), mesh).memory_analysis()
    # the sum so far is written over, never held twice
    assert memory.alias_size_in_bytes == size(
        programs.state_shapes(spec, tiny.one_device()).trained
    )
    return memory, 4 * model_weights.count(cfg)


def parts_of_the_base(adapter):
    """What a gradient returns and takes beside its arguments, and what the latter grows by with
    more layers, each as a part of the base's bytes."""
    (few, less), (many, base) = (gradient_memory(adapter, L) for L in (4, 16))
    growth = many.temp_size_in_bytes - few.temp_size_in_bytes
    return (
        many.output_size_in_bytes / base,
        many.temp_size_in_bytes / base,
        growth / (base - less),
    )


def test_the_base_has_no_gradient_in_memory():
    assert max(parts_of_the_base(lora.LoraConfig(2, 4.0))) < 0.2
    assert min(parts_of_the_base(FULL.lora)) > 0.9  # the same numbers where it has


def test_an_update_is_written_over_the_old_state():
    program = programs.compile_traced(programs.update(SFT, tiny.one_device()), tiny.one_device())
    state = programs.state_shapes(SFT, tiny.one_device())
    assert program.memory_analysis().alias_size_in_bytes == size(state)


def train(spec, steps, start=None, mesh=None):
    mesh = mesh or tiny.one_device()
    step = states.Step(spec, mesh)
    state = start or states.init(jax.random.key(0), spec, mesh)
    frozen = states.Frozen(None if spec.full else tiny.params())
    history = []
    for n in steps:
        grads, metrics = step.gradients(state, frozen, pack(rows(seed=n), B=4, T=64))
        state, more = step.update(state, grads)
        history.append(jax.device_get(metrics | more))
    return state, history


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    before = jax.device_get(tiny.params())
    fixed = [3] * 8
    spec = states.Spec(tiny.CFG, tiny.SPEC, optim.OptimConfig(lr=2e-2, steps=8, warmup=2))
    good = [r._replace(advantage=r.learn) for r in rows(seed=3)]
    step = states.Step(spec, tiny.one_device())
    state, seen = states.init(jax.random.key(0), spec, tiny.one_device()), []
    for _ in fixed:
        grads, metrics = step.gradients(state, states.Frozen(tiny.params()), pack(good, B=4, T=64))
        state, more = step.update(state, grads)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] - 0.2
    assert float(more["lr"]) == pytest.approx(
        2e-2 / 6
    )  # the last of 6 falling steps after 2 rising
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(tiny.params()))


@pytest.mark.parametrize("spec", [SFT, FULL], ids=["adapter", "all weights"])
def test_saved_and_restored_equals_uninterrupted(spec, tmp_path):
    whole, history = train(spec, range(6))
    half, _ = train(spec, range(3))
    saved = checkpoint.Checkpoints(tmp_path, spec)
    saved.save(3, half, {"read": 17, "skipped": 2})
    saved.close()
    again = checkpoint.Checkpoints(tmp_path, spec)
    fresh = states.init(jax.random.key(9), spec, tiny.one_device())
    step, state, position = again.restore(fresh)
    assert step == 3 and position == {"read": 17, "skipped": 2}
    state, rest = train(spec, range(3, 6), state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(state))
    assert rest == history[3:]


def test_any_number_of_microbatches_runs_the_same_two_programs():
    states.compiled.cache_clear()  # other tests have other shapes
    step, compiled = (f(SFT, tiny.one_device()) for f in (states.Step, states.compiled))
    state = states.init(jax.random.key(0), SFT, tiny.one_device())
    for n in (1, 3, 2):
        batches = list(itertools.islice(itertools.cycle(pack(rows(), B=4, T=64)), n))
        grads, _ = step.gradients(state, states.Frozen(tiny.params()), batches)
        state, _ = step.update(state, grads)
    assert compiled.accumulate._cache_size() == compiled.update._cache_size() == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_every_optimizer_moves_every_weight(name, decay):
    cfg = optim.OptimConfig(lr=1e-2, steps=4, warmup=1, decay=decay, name=name, weight_decay=0.1)
    spec = states.Spec(tiny.CFG, lora.LoraConfig(0, 1.0), cfg)
    step = states.Step(spec, tiny.one_device())
    state = states.init(jax.random.key(0), spec, tiny.one_device())
    before = jax.device_get(state.trained)
    grads, _ = step.gradients(state, states.Frozen(None), pack(rows(), B=4, T=64))
    state, _ = step.update(state, grads)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.trained))
    assert all(x > 1e-4 for x in jax.tree.leaves(moved))


BAD_SIZES = {
    "heads=8 does not divide by model=3": (dict(data=1, model=3), {}),
    "embed_table=32 does not divide by data=5": (dict(data=5), {}),
    "vocab=97 does not divide by model=2": (dict(data=1, model=2), dict(V=97)),
    "mlp=49 does not divide by model=2": (dict(data=1, model=2), dict(F=49)),
    "experts=3 does not divide by model=2": (dict(data=1, model=2), dict(E=3, top_k=1)),
}


@pytest.mark.parametrize("said", BAD_SIZES)
def test_weights_that_do_not_divide_are_refused_with_their_numbers(said):
    axes, changes = BAD_SIZES[said]
    mesh = meshes.make_mesh(meshes.MeshConfig(**axes), jax.devices()[: np.prod([*axes.values()])])
    cfg = dataclasses.replace(tiny.CFG, **changes)
    with pytest.raises(ConfigError, match=said):
        model_weights.shardings(cfg, mesh)


def test_bad_settings_are_refused_with_their_values():
    with pytest.raises(
        ConfigError, match=r"'data': 3, .*'model': 2.* needs 6 devices, there are 8"
    ):
        meshes.make_mesh(meshes.MeshConfig(data=3, model=2))
    with pytest.raises(ConfigError, match="decay is 'cubic', none of 'linear'"):
        optim.OptimConfig(lr=1.0, steps=1, decay="cubic")
    with pytest.raises(ConfigError, match=r"w_q.*q_proj"):
        lora.LoraConfig(4, 4.0, ("w_q",))
    assert lora.LoraConfig(4, 4.0, ("q_proj", "wv", "wq")).targets == ("wq", "wv")
    assert lora.LoraConfig(4, 4.0, "wq, wv").targets == ("wq", "wv")
    assert lora.LoraConfig(4, 4.0, ("all-linear",)) == lora.LoraConfig(4, 4.0)
    with pytest.raises(ConfigError, match="3 rows"):
        meshes.put(meshes.make_mesh(), pack(rows(), B=3, T=64)[0])
    empty = [r._replace(learn=r.learn * 0) for r in rows()]
    with pytest.raises(ConfigError, match="without a single token"):
        gradients(SFT, pack(empty, B=4, T=64))


def test_reference_logps_are_what_the_state_and_the_base_alone_give():
    mesh, batch, frozen = tiny.one_device(), scored(), states.Frozen(tiny.params())
    step = states.Step(GSPO, mesh)
    state = states.init(jax.random.key(0), GSPO, mesh, tiny.adapter())
    (found,) = step.reference_logps(state, frozen, [batch], old=True)
    learned = batch.learn_BT > 0
    np.testing.assert_allclose(np.asarray(found.old_BT)[learned], batch.logp_BT[learned], atol=1e-5)
    score = jax.jit(functools.partial(losses.score, cfg=tiny.CFG))
    base_BT, _ = score(tiny.params(), None, batch)
    np.testing.assert_allclose(found.base_BT, base_BT, atol=1e-5)
    assert np.abs(found.base_BT - found.old_BT).max() > 0.1
    (found,) = step.reference_logps(state, frozen, [batch])
    assert found.old_BT is None and found.base_BT is not None
    step = states.Step(GRPO, mesh)  # nothing is asked for: nothing is computed
    assert step.reference_logps(state, frozen, [batch]) == [losses.NO_REFERENCE]


def test_only_a_ratio_that_stays_with_the_sampler_needs_no_old_logps():
    state = states.init(jax.random.key(0), GRPO, tiny.one_device(), tiny.adapter())
    frozen, batches = states.Frozen(tiny.params()), [scored()]
    for kind, asked in (("clip", True), ("gspo", True), ("cispo", True), ("binary_tv", False)):
        spec = dataclasses.replace(GRPO, objective=Objective(kind))
        assert spec.objective.needs_old(2) == asked and not spec.objective.needs_old(1)
        step = states.Step(spec, tiny.one_device())
        if kind == "binary_tv":
            found = step.reference_logps(state, frozen, batches, old=True)
            assert found == [losses.NO_REFERENCE]
        assert programs.Workload("x", spec, passes=2).forwards == asked
        more = step.flops(batches, passes=2) - 2 * step.flops(batches)
        assert (more > 0) == asked


def under():
    """Two frozen adapters, far from zero, of other ranks and linears than the trained one."""
    rng, found = np.random.default_rng(5), []
    for rank, targets in ((3, tiny.SPEC.targets), (2, ("wq", "w_down"))):
        spec = lora.LoraConfig(rank, 2.0 * rank, targets)
        factors = jax.tree.map(
            lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
            lora.leaves(tiny.CFG, spec),
            is_leaf=model_weights.is_leaf,
        )
        found.append(lora.Adapter(factors, spec.scale))
    return tuple(found)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        pytest.param(SFT, None, id="sft", marks=pytest.mark.slow),
        pytest.param(GSPO, dict(data=2, context=2, model=2), id="gspo on a mesh"),
        pytest.param(GSPO, None, id="gspo", marks=pytest.mark.slow),
    ],
)
def test_training_over_frozen_adapters_is_training_over_the_base_they_are_merged_into(spec, shape):
    mesh = meshes.make_mesh(meshes.MeshConfig(**shape)) if shape else tiny.one_device()
    params = jax.device_put(tiny.params(), model_weights.shardings(tiny.CFG, mesh))
    merged = functools.reduce(lora.merge, under(), params)
    over = states.Frozen(params, tuple(lora.place(x, tiny.CFG, mesh) for x in under()))
    step = states.Step(spec, mesh)
    state = states.init(jax.random.key(0), spec, mesh, tiny.adapter())
    batches = pack(rows(), B=8, T=64)
    found = []
    for frozen in (states.Frozen(merged), over, states.Frozen(params)):
        (reference,) = step.reference_logps(state, frozen, batches, old=True)
        grads, metrics = step.gradients(state, frozen, batches, [reference])
        assert jax.tree.structure(grads) == jax.tree.structure(state.trained)
        found.append(jax.device_get((grads, metrics, reference)))
    want, got, without = found
    same(want[:2], got[:2])
    for name in ("old_BT", "base_BT"):
        ours, theirs = (getattr(x[2], name) for x in (got, want))
        assert (
            (ours is None) == (theirs is None) == (name == "base_BT" and not spec.objective.kl.coef)
        )
        if (
            ours is not None
        ):  # the reference of KL is the base with the adapters under the trained one
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
            assert np.abs(ours - getattr(without[2], name)).max() > 0.1


def test_frozen_adapters_are_neither_trained_nor_donated_nor_in_the_state():
    mesh = tiny.one_device()
    frozen = states.Frozen(tiny.params(), tuple(lora.place(x, tiny.CFG, mesh) for x in under()))
    before = jax.device_get(frozen)
    step = states.Step(SFT, mesh)
    state = states.init(jax.random.key(0), SFT, mesh)
    shapes = jax.tree.map(jax.numpy.shape, state)
    for _ in range(2):
        grads, _ = step.gradients(state, frozen, pack(rows(), B=4, T=64))
        state, _ = step.update(state, grads)
    assert jax.tree.map(jax.numpy.shape, state) == shapes  # as without any
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen))


def test_programs_over_frozen_adapters_are_compiled_for_any_scale():
    mesh = tiny.one_device()
    configs = tuple(adapter.config for adapter in under())
    batches, state = pack(rows(), B=4, T=64), states.init(jax.random.key(0), GSPO, mesh)
    work = programs.Workload("x", GSPO, 4, 64, passes=2, under=configs)
    traced = {name: each for name, each, _ in programs.trace_all(work, mesh, None)}
    step = states.Step(GSPO, mesh)
    compiled = states.compiled(GSPO, mesh)
    for weight in (1.0, 0.5):
        adapters = [x.replace(scale=x.scale * weight) for x in under()]
        placed = tuple(lora.place(x, tiny.CFG, mesh) for x in adapters)
        frozen = states.Frozen(tiny.params(), placed)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), frozen)
        assert shapes == jax.tree.map(
            lambda x: (x.shape, x.dtype.name), programs.frozen_shapes(GSPO, mesh, configs)
        )
        references = step.reference_logps(state, frozen, batches, old=True)
        step.gradients(state, frozen, batches, references)
        counts = [x._cache_size() for x in (compiled.accumulate, compiled.reference_logps)]
        if weight == 1.0:
            first = counts
    assert counts == first and set(traced) == {"gradients", "before", "update"}


def test_the_engine_samples_from_what_is_trained_over_frozen_adapters():
    mesh = tiny.one_device()
    placed = tuple(lora.place(x, tiny.CFG, mesh) for x in under())
    params, adapters = states.policy(SFT, tiny.params(), tiny.adapter(), placed)
    size = EngineConfig(slots=4, length=64, page=4, chunk=16, tile=4)
    engine = Engine(params, tiny.CFG, mesh, size)
    engine.set_adapter(lora.concatenate(adapters), version=3)
    prompt = [5, 6, 7, 8]
    said = asyncio.run(engine(prompt, seed=0, max_new=12))
    engine.close()
    assert said.version == 3
    for adapter, same in ((adapters, True), (tiny.scaled_adapter(), False)):
        want = tiny.logps(prompt + said.tokens, adapter)[len(prompt) :]
        assert (np.abs(want - said.logps).max() < 1e-5) == same


def test_an_adapter_cannot_lie_under_weights_that_are_trained():
    with pytest.raises(ConfigError, match=r"lora.under=\('runs/a',\) .* lora.rank=0"):
        lora.LoraConfig(0, 1.0, under=("runs/a",))


def test_kl_towards_weights_that_are_trained_is_refused():
    with pytest.raises(ConfigError, match=r"kl.coef=0.1 .* lora.rank=0"):
        dataclasses.replace(GSPO, lora=lora.LoraConfig(0, 1.0))
