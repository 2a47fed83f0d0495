"""The architectures of published models, as their `config.json` files give them, to plan for a
model without a copy of it and without a network."""

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


QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32_768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32_768,
    "sliding_window": None,
}
OLMO = {
    "model_type": "olmo2",
    "vocab_size": 100_352,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "max_position_embeddings": 4096,
}
OLMO3 = OLMO | {
    "model_type": "olmo3",
    "vocab_size": 100_278,
    "max_position_embeddings": 65_536,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _sizes(
    common: dict[str, Any], width: int, mlp: int, layers: int, heads: int, **rest: Any
) -> dict[str, Any]:
    return {
        **common,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "moe_intermediate_size" if "num_experts" in common else "intermediate_size": mlp,
        **rest,
    }


TIED = {"tie_word_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _sizes(COMMON, 1024, 3072, 28, 16, **TIED),
    "Qwen/Qwen3-1.7B": _sizes(COMMON, 2048, 6144, 28, 16, **TIED),
    "Qwen/Qwen3-4B": _sizes(COMMON, 2560, 9728, 36, 32, **TIED),
    "Qwen/Qwen3-8B": _sizes(COMMON, 4096, 12_288, 36, 32),
    "Qwen/Qwen3-14B": _sizes(COMMON, 5120, 17_408, 40, 40),
    "Qwen/Qwen3-32B": _sizes(COMMON, 5120, 25_600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _sizes(MIXTURE, 2048, 768, 48, 32),
    "Qwen/Qwen3-235B-A22B": _sizes(MIXTURE, 4096, 1536, 94, 64),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": _sizes(
        MIXTURE, 6144, 2560, 62, 96, num_experts=160, num_key_value_heads=8, rope_theta=1e7,
        max_position_embeddings=262_144,
    ),
    "Qwen/Qwen2.5-0.5B": _sizes(
        QWEN2, 896, 4864, 24, 14, num_key_value_heads=2, max_position_embeddings=32_768, **TIED
    ),
    "Qwen/Qwen2.5-1.5B": _sizes(QWEN2, 1536, 8960, 28, 12, num_key_value_heads=2, **TIED),
    "Qwen/Qwen2.5-7B": _sizes(
        QWEN2, 3584, 18_944, 28, 28, num_key_value_heads=4, vocab_size=152_064
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _sizes(
        QWEN2, 1536, 8960, 28, 12, num_key_value_heads=2, rope_theta=1e4
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _sizes(
        LLAMA, 4096, 14_336, 32, 32, rope_scaling=_llama3(8.0)
    ),
    "meta-llama/Llama-2-7b-hf": _sizes(
        LLAMA, 4096, 11_008, 32, 32, vocab_size=32_000, num_key_value_heads=32,
        rope_theta=1e4, max_position_embeddings=4096,
    ),
    "meta-llama/Llama-3.1-8B": _sizes(LLAMA, 4096, 14_336, 32, 32, rope_scaling=_llama3(8.0)),
    "meta-llama/Llama-3.2-1B": _sizes(
        LLAMA, 2048, 8192, 16, 32, head_dim=64, rope_scaling=_llama3(32.0), **TIED
    ),
    "meta-llama/Llama-3.2-3B": _sizes(
        LLAMA, 3072, 8192, 28, 24, head_dim=128, rope_scaling=_llama3(32.0), **TIED
    ),
    "mistralai/Mistral-7B-v0.3": _sizes(MISTRAL, 4096, 14_336, 32, 32),
    "HuggingFaceTB/SmolLM2-135M": _sizes(SMOLLM2, 576, 1536, 30, 9, num_key_value_heads=3),
    "HuggingFaceTB/SmolLM2-360M": _sizes(SMOLLM2, 960, 2560, 32, 15, num_key_value_heads=5),
    "HuggingFaceTB/SmolLM2-1.7B": _sizes(
        SMOLLM2, 2048, 8192, 24, 32, num_key_value_heads=32, rope_theta=1.3e5
    ),
    "allenai/OLMo-2-1124-7B": _sizes(OLMO, 4096, 11_008, 32, 32),
    "allenai/Olmo-3-1025-7B": _sizes(OLMO3, 4096, 11_008, 32, 32),
}  # fmt: skip
