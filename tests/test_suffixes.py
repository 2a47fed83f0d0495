"""The shape suffixes of names tell the truth: in training and sampling, dense and as a mixture, on
one device and on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from shape_suffix import checked, lies, suffix

from jaxdeep import programs
from jaxdeep.data.pack import pack_bins
from jaxdeep.model import attention, decoder, head, lora, paged, rope
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl.objective import SFT, Clip, Correction, Kl, Objective
from jaxdeep.sample import sampler, sizes
from jaxdeep.train import losses, optim
from jaxdeep.train import state as states
from jaxdeep.types import Row


def test_the_check_finds_a_lie():
    x = np.zeros((2, 3, 4))
    assert lies({"x_BTD": x, "y_BT": x[..., 0], "step": 3}) == ([], 2)
    assert (
        lies({"x_BT": x})[0] and lies({"x_BTD": x, "y_BD": x[..., 0]})[0] and lies({"x_B11": x})[0]
    )
    # a small letter is a size of its own, and a part of its capital
    assert lies({"x_BTD": x, "y_btd": x[:1], "z_Bt": x[..., 0]}) == ([], 3)
    assert lies({"x_btD": x, "y_bt": x[0]})[0] and lies({"x_BTD": x, "y_b": np.zeros(3)})[0]
    assert lies({"x_2TD": x}) == ([], 1) and lies({"x_3TD": x})[0]
    assert "legend" in lies({"x_BTU": x})[0][0]
    names = ("held", "last_block", "in_specs", "x_mi", "top_k", "kv_LpSjH", "bits_2")
    assert [suffix(name) for name in names] == ["", "", "", "mi", "k", "LpSjH", "2"]


OBJECTIVES = [
    SFT,
    Objective("clip", clip=Clip(dual=2.0), aggregate="sequence", entropy=0.1),
    Objective("gspo", kl=Kl("k3", 0.1), correction=Correction("mask")),
    Objective("cispo"),
    Objective("binary_tv"),
]


@pytest.mark.slow
def test_no_suffix_lies():
    B, T = 3, 13  # shapes that no other test traces
    learn = np.ones(T - 2, np.float32)
    learn[0] = 0
    row = Row(np.arange(T - 2, dtype=np.int32), learn, learn * -4, learn)
    batch = pack_bins([[row]] * B, B, T)

    def train(params, adapter, batch):
        logp_BT, entropy_BT = losses.score(params, adapter, batch, cfg=tiny.CFG)
        before = losses.ReferenceLogps(logp_BT, logp_BT)
        for objective in OBJECTIVES:
            losses.loss(logp_BT, entropy_BT, batch, before, objective=objective)
        return logp_BT

    how = sampler.idle(B, 4, 5)
    with checked() as (wrong, seen):
        jax.jit(train).lower(tiny.params(), tiny.scaled_adapter(), batch)
        cache = tiny.pages(tiny.CFG, B, 30, S=3)
        count = np.full(B, T, np.int32)
        jax.jit(functools.partial(sampler.prefill, cfg=tiny.CFG)).lower(
            tiny.params(), None, cache, batch.tokens_BT, count, how
        )
        jax.jit(functools.partial(sampler.decode, cfg=tiny.CFG, steps=7)).lower(
            tiny.params(), None, cache, count, how
        )
    assert wrong == []
    every = (
        *(decoder.forward, attention.attend, attention.plain, paged.extend, paged.write),
        *(head.token_logps, rope.rotate, rope.angles),
        *(losses.score, losses.loss, losses.policy_loss, losses.sampler_mismatch),
        *(
            losses.clip_by_probability,
            losses.clipped_surrogate,
            losses.entropy_bonus,
            losses.sequence_tokens,
        ),
        *(sampler.prefill, sampler.decode, sampler.draw),
    )
    assert {function.__name__ for function in every} | {"layer_step", "row", "one"} <= seen


KINDS = {
    "dense": ({}, dict(data=2, context=2, model=2)),
    "mixture": (dict(E=4, top_k=2, F=16), dict(data=2, model=4)),
    "int8": (dict(quant="int8"), dict(data=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_suffix_lies_in_any_program_of_a_run(kind):
    changes, axes = KINDS[kind]
    mesh = meshes.make_mesh(meshes.MeshConfig(**axes), jax.devices()[: np.prod([*axes.values()])])
    cfg = dataclasses.replace(tiny.CFG, **changes, chunk=24)  # which no other test traces
    spec = states.Spec(cfg, tiny.SPEC, optim.OptimConfig(lr=1e-2, steps=10), OBJECTIVES[2])
    # rows long enough for attention in blocks, and a frozen adapter under the trained one
    work = programs.Workload(
        "x",
        spec,
        rows=8,
        length=320,
        passes=2,
        under=(lora.LoraConfig(2, 4.0),),
        engine=sizes.EngineConfig(slots=8, length=128, page=4, chunk=16, tile=4, adapters=3),
    )
    with checked() as (wrong, seen):
        programs.trace_all(work, mesh, mesh)
    assert wrong == []
    assert {"attend", "_blocked_backward", "extend", "local", "token_logps"} <= seen
    if kind == "mixture":
        assert {"route", "_experts", "_ragged", "swiglu", "mlp"} <= seen
