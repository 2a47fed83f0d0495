"""Rotary frequencies against those that transformers computes from the same config."""

import numpy as np
import pytest

from jaxdeep.errors import CheckpointError
from jaxdeep.model import rope
from jaxdeep.model.config import Config

PLAIN = dict(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
             max_position_embeddings=40960, model_type="qwen3", head_dim=128)  # fmt: skip
ROPES = {
    "as published for long texts": dict(factor=4.0, original_max_position_embeddings=32768),
    "attention factor": dict(factor=2.5, attention_factor=1.3),
    "betas": dict(factor=8.0, beta_fast=16, beta_slow=2),
    "not truncated": dict(factor=4.0, truncate=False),
    "mscale": dict(factor=4.0, mscale=0.7, mscale_all_dim=1.1),
}


@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6, 1e7])
@pytest.mark.parametrize("name", ROPES)
def test_yarn_equals_transformers(name, theta):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 40960} | ROPES[name]
    hf = PLAIN | {"rope_parameters": scaling | {"rope_theta": theta}}
    want, attention = ROPE_INIT_FUNCTIONS["yarn"](transformers.Qwen3Config(**hf), "cpu")
    cfg = Config.from_hf(hf)
    got = rope.frequencies(cfg.H, cfg.theta, cfg.yarn)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    assert cfg.yarn.attention == pytest.approx(attention, rel=1e-9)
    cos, _ = rope.angles(np.zeros((1, 1)), cfg.H, cfg.theta, cfg.yarn)
    np.testing.assert_allclose(cos, attention, rtol=1e-6)
    # the layout of earlier editions says the same
    old = PLAIN | {"rope_scaling": scaling, "rope_theta": theta}
    assert Config.from_hf(old) == cfg == Config.from_hf(cfg.to_hf())


def test_stretched_positions_are_allowed():
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
    cfg = Config.from_hf(PLAIN | {"rope_scaling": scaling, "rope_theta": 1e6})
    assert cfg.limit == 131_072
    assert Config.from_hf(PLAIN | {"rope_theta": 1e6}).limit == 40960


def test_plain_frequencies_are_powers_of_theta():
    got = rope.frequencies(8, 10_000.0, None)
    np.testing.assert_allclose(got, [1, 1e-1, 1e-2, 1e-3], rtol=1e-6)


def test_a_factor_below_one_is_refused():
    scaling = dict(rope_type="yarn", factor=0.5, original_max_position_embeddings=32768)
    with pytest.raises(CheckpointError, match=r"factor=0\.5"):
        Config.from_hf(PLAIN | {"rope_scaling": scaling, "rope_theta": 1e6})
