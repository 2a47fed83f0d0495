"""FLOPs counted from shapes, against XLA's own count and against known models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdeep.model import decoder, flops, lora
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.types import Batch

QWEN3_8B = dict(
    model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
    num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=40960, tie_word_embeddings=False,
)  # fmt: skip
NONE, ADAPTER = lora.LoraConfig(0, 1.0), lora.LoraConfig(8, 8.0)


def batch(lengths, B=1, T=64):
    """One row with packed sequences of these lengths, and padding."""
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    at = 0
    for number, length in enumerate(lengths, 1):
        segments[0, at : at + length] = number
        positions[0, at : at + length] = np.arange(length)
        at += length
    zeros = np.zeros((B, T), np.float32)
    return Batch(zeros, segments, positions, zeros, zeros, zeros)


def test_weights_a_token_goes_through():
    cfg = Config.from_hf(QWEN3_8B)
    embedding = cfg.V * cfg.D
    assert flops.per_token(cfg) == pytest.approx(
        model_weights.count(cfg) - embedding, rel=1e-4
    )  # no norms
    mixture = dataclasses.replace(tiny.CFG, E=8, top_k=2)
    one = dataclasses.replace(tiny.CFG, E=8, top_k=1)
    experts = 3 * tiny.CFG.L * tiny.CFG.D * tiny.CFG.F
    assert flops.per_token(mixture) - flops.per_token(one) == experts


def test_forward_is_what_xla_counts():
    # one layer, as XLA counts the body of a loop once; attention it computes for all pairs
    cfg = dataclasses.replace(tiny.CFG, L=1, attention="plain", remat="dots")
    tokens_BT = jnp.zeros((1, 64), jnp.int32)
    params = jax.eval_shape(lambda: model_weights.init(jax.random.key(0), cfg))

    def logits(params):
        hidden_BTD, _ = decoder.forward(params, None, tokens_BT, cfg=cfg)
        head = params["embed"].T if cfg.tie else params["head"]
        return hidden_BTD @ head

    counted = jax.jit(logits).lower(params).compile().cost_analysis()["flops"]
    pairs = 64 * 64
    ours = 2 * flops.per_token(cfg) * 64 + 4 * cfg.N * cfg.H * pairs
    assert counted == pytest.approx(ours, rel=0.1)  # the rest is norms, softmax and the like


def test_a_step_counts_gradients_only_where_there_are_any():
    cfg, one = tiny.CFG, batch([10, 20])
    linears = 2 * flops.per_token(cfg) * 30
    attention = 4 * cfg.L * cfg.N * cfg.H * (10 * 11 // 2 + 20 * 21 // 2)
    assert flops.of_step(cfg, NONE, [one]) == 3 * linears + 3 * attention
    half = dataclasses.replace(cfg, window=4, windowed=(True, False))
    windowed = 4 * cfg.N * cfg.H * (4 * 30 - 2 * 6)  # the first three of each see 3, 2, 1 fewer
    assert flops.of_step(half, NONE, [one]) == 3 * linears + 3 * (attention / 2 + windowed)
    factors = 2 * flops.of_adapter(cfg, ADAPTER) * 30
    adapted = 2 * linears + 3 * attention + 3 * factors
    assert flops.of_step(cfg, ADAPTER, [one]) == adapted
    assert flops.of_step(cfg, ADAPTER, [one, one], passes=2) == 4 * adapted
    forward = linears + attention + factors
    assert flops.of_step(cfg, ADAPTER, [one], forwards=2) == adapted + 2 * forward


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
        ("NVIDIA H1000", None),
        ("TPU v2", None),
    ],
)
def test_peaks_are_of_the_device_or_unknown(kind, peak):
    assert flops.peak(kind) == peak
