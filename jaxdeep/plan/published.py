"""The architectures of the published Qwen3 models, as their `config.json` files give them, to plan
for a model without a copy of it and without a network."""

from __future__ import annotations

from typing import Any

COMMON = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
MIXTURE = COMMON | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


def _dense(width: int, mlp: int, layers: int, heads: int, *, tie: bool = False) -> dict[str, Any]:
    return COMMON | {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tie,
    }


def _mixture(width: int, mlp: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {
        **MIXTURE,
        "hidden_size": width,
        "moe_intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **rest,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _dense(1024, 3072, 28, 16, tie=True),
    "Qwen/Qwen3-1.7B": _dense(2048, 6144, 28, 16, tie=True),
    "Qwen/Qwen3-4B": _dense(2560, 9728, 36, 32, tie=True),
    "Qwen/Qwen3-8B": _dense(4096, 12_288, 36, 32),
    "Qwen/Qwen3-14B": _dense(5120, 17_408, 40, 40),
    "Qwen/Qwen3-32B": _dense(5120, 25_600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _mixture(2048, 768, 48, 32),
    "Qwen/Qwen3-235B-A22B": _mixture(4096, 1536, 94, 64),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": _mixture(
        *(6144, 2560, 62, 96), num_experts=160, num_key_value_heads=8, rope_theta=1e7,
        max_position_embeddings=262_144,
    ),
}  # fmt: skip
