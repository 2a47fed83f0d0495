"""Rotary frequencies against those that transformers computes from the same config."""

import numpy as np
import pytest

from jaxdeep.errors import CheckpointError
from jaxdeep.model import rope
from jaxdeep.model.config import Config

PLAIN = dict(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
             max_position_embeddings=40960, model_type="qwen3", head_dim=128)  # fmt: skip
ORIGINAL = dict(original_max_position_embeddings=40960)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
ROPES = {
    "as published for long texts": dict(rope_type="yarn", factor=4.0)
    | dict(original_max_position_embeddings=32768),
    "attention factor": dict(rope_type="yarn", factor=2.5, attention_factor=1.3) | ORIGINAL,
    "betas": dict(rope_type="yarn", factor=8.0, beta_fast=16, beta_slow=2) | ORIGINAL,
    "not truncated": dict(rope_type="yarn", factor=4.0, truncate=False) | ORIGINAL,
    "mscale": dict(rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.1) | ORIGINAL,
    "linear": dict(rope_type="linear", factor=2.5),
    "llama 3.1": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    | dict(original_max_position_embeddings=8192),
    "llama 3.2": dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
    | dict(original_max_position_embeddings=8192),
    "other bounds": dict(rope_type="llama3", factor=3, low_freq_factor=2, high_freq_factor=9),
}


@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6, 1e7])
@pytest.mark.parametrize("name", ROPES)
def test_every_scaling_equals_transformers(name, theta):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = ROPES[name]
    hf = PLAIN | {"rope_parameters": scaling | {"rope_theta": theta}}
    compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    want, attention = compute(transformers.Qwen3Config(**hf), "cpu")
    cfg = Config.from_hf(hf)
    got = rope.frequencies(cfg.H, cfg.theta, cfg.scaling)
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
    assert cfg.scaling.attention == pytest.approx(attention, rel=1e-9)
    cos, _ = rope.angles(np.zeros((1, 1)), cfg.H, cfg.theta, cfg.scaling)
    np.testing.assert_allclose(cos, attention, rtol=1e-6)
    # the layout of earlier editions says the same, and so does the older name of the type
    old = PLAIN | {"rope_scaling": scaling, "rope_theta": theta}
    assert Config.from_hf(old) == cfg == Config.from_hf(cfg.to_hf())
    renamed = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
    assert Config.from_hf(old | {"rope_scaling": renamed}) == cfg


BOTH = {  # the keys of a config.json, and what they mean
    "yarn added to what transformers saved": (
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling=YARN),
        (1e6, "yarn"),
    ),
    "both the same": (
        dict(rope_parameters=YARN | {"rope_theta": 1e6}, rope_scaling=YARN | {"rope_theta": 1e6}),
        (1e6, "yarn"),
    ),
    "the same, by other words": (
        dict(rope_parameters=YARN | {"beta_fast": 32}, rope_scaling=YARN, rope_theta=1e6),
        (1e6, "yarn"),
    ),
    "no scaling": (dict(rope_parameters=YARN, rope_scaling=None, rope_theta=1e6), (1e6, "yarn")),
    "parameters of nothing": (
        dict(rope_parameters={}, rope_scaling=YARN, rope_theta=1e6),
        (1e6, "yarn"),
    ),
    "theta in the scaling": (dict(rope_scaling=YARN | {"rope_theta": 5e5}), (5e5, "yarn")),
    "theta alone": (dict(rope_scaling=None, rope_theta=1e4), (1e4, None)),
    "original length beside the settings": (
        dict(
            rope_scaling=dict(rope_type="yarn", factor=4.0),
            original_max_position_embeddings=32768,
            rope_theta=1e6,
        ),
        (1e6, "yarn"),
    ),
}


@pytest.mark.parametrize("name", BOTH)
def test_rope_scaling_goes_first_and_theta_is_taken_from_either(name):
    hf, (theta, kind) = BOTH[name]
    cfg = Config.from_hf(PLAIN | hf)
    want = rope.Yarn(4.0, 32768, attention=cfg.scaling.attention) if kind else None
    assert cfg.theta == theta and cfg.scaling == want
    assert cfg.limit == (131_072 if kind else 40_960)


REFUSED = {
    "two scalings": (
        dict(rope_parameters=YARN | {"factor": 2.0}, rope_scaling=YARN, rope_theta=1e6),
        r"rope_scaling=.*'factor': 4\.0.*rope_parameters=.*'factor': 2\.0.*disagree",
    ),
    "a scaling switched off": (
        dict(rope_parameters=YARN, rope_scaling={"rope_type": "default"}, rope_theta=1e6),
        "disagree",
    ),
    "two thetas": (
        dict(rope_parameters={"rope_theta": 1e6}, rope_scaling=YARN, rope_theta=1e4),
        r"rope_theta=10000, rope_parameters\.rope_theta=1e\+06, which disagree",
    ),
    "two types": (
        dict(rope_scaling=YARN | {"type": "linear"}, rope_theta=1e6),
        "'linear' and 'yarn'",
    ),
    "two original lengths": (
        dict(rope_scaling=YARN, rope_theta=1e6, original_max_position_embeddings=8192),
        "original_max_position_embeddings=8192 and .*32768 disagree",
    ),
    "a factor below one": (
        dict(rope_scaling=YARN | {"factor": 0.5}, rope_theta=1e6),
        r"factor=0\.5",
    ),
    "dynamic": (
        dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1e6),
        "type 'dynamic'; computed are default, linear, llama3, yarn",
    ),
    "a setting of another type": (
        dict(rope_scaling={"type": "linear", "factor": 2.0, "long_factor": [1]}, rope_theta=1e6),
        r"rope_scaling\.long_factor=\[1\] is no setting of the type 'linear'",
    ),
    "part of a head": (
        dict(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor=0\.5",
    ),
    "no factor": (dict(rope_scaling={"type": "linear"}, rope_theta=1e6), "lacks 'factor'"),
    "no number": (dict(rope_scaling=YARN | {"factor": "4"}, rope_theta=1e6), "factor='4' is not"),
    "no theta": (dict(rope_scaling=YARN), "lacks 'rope_theta'"),
    "theta of zero": (dict(rope_theta=0), "rope_theta=0 is not a positive number"),
    "bounds the wrong way round": (
        dict(
            rope_scaling={"rope_type": "llama3", "factor": 8.0}
            | dict(low_freq_factor=4.0, high_freq_factor=4.0),
            rope_theta=1e6,
        ),
        r"low_freq_factor=4\.0 must be below",
    ),
    "no dictionary": (dict(rope_scaling="yarn", rope_theta=1e6), "rope_scaling='yarn' is not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_with_its_key(name):
    hf, said = REFUSED[name]
    with pytest.raises(CheckpointError, match=said):
        Config.from_hf(PLAIN | hf)


def test_plain_frequencies_are_powers_of_theta():
    got = rope.frequencies(8, 10_000.0, None)
    np.testing.assert_allclose(got, [1, 1e-1, 1e-2, 1e-3], rtol=1e-6)
