"""The shape suffixes of names tell the truth, in forward, loss, prefill and decode."""

import functools

import jax
import numpy as np
import pytest
import tiny
from shape_suffix import checked, lies

from jaxdeep.data.pack import pack_bins
from jaxdeep.rl.objective import SFT, Clip, Correction, Kl, Objective
from jaxdeep.sample import sampler
from jaxdeep.train import losses
from jaxdeep.types import Row


def test_the_check_finds_a_lie():
    x = np.zeros((2, 3, 4))
    assert lies({"x_BTD": x, "y_BT": x[..., 0], "step": 3}) == ([], 2)
    assert (
        lies({"x_BT": x})[0] and lies({"x_BTD": x, "y_BD": x[..., 0]})[0] and lies({"x_B11": x})[0]
    )


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
        jax.jit(train).lower(tiny.params(), tiny.adapter(), batch)
        cache = tiny.pages(tiny.CFG, B, 30, S=3)
        count = np.full(B, T, np.int32)
        jax.jit(functools.partial(sampler.prefill, cfg=tiny.CFG)).lower(
            tiny.params(), None, cache, batch.tokens_BT, count, how
        )
        jax.jit(functools.partial(sampler.decode, cfg=tiny.CFG, steps=7)).lower(
            tiny.params(), None, cache, count, how
        )
    assert wrong == []
    assert {
        "forward",
        "layer_step",
        "attend",
        "extend",
        "write",
        "plain",
        "score",
        "loss",
        "draw",
    } <= seen
    assert {"policy_loss", "mismatch", "clipped", "trusted", "bonus", "sizes", "row"} <= seen
    assert {"token_logps", "prefill", "decode", "one", "rotate", "angles"} <= seen
