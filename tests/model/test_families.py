"""Which config.json is read as what, which is refused by its key, and how large published models
are."""

import pytest

from jaxdeep.errors import CheckpointError
from jaxdeep.model import families
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.plan import published

COUNTS = {  # parameters, as the hub counts the tensors of the published files
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_configurations_have_the_published_counts(name):
    cfg = Config.from_hf(published.CONFIGS[name])
    assert model_weights.count(cfg) == COUNTS[name]
    assert Config.from_hf(cfg.to_hf()) == cfg


def config(kind, **changes):
    """A small config.json of a `model_type`."""
    hf = dict(
        model_type=kind, vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e4,
        max_position_embeddings=512, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    if kind != "qwen3_moe":
        hf = {k: v for k, v in hf.items() if "expert" not in k and "moe" not in k}
    return {k: v for k, v in (hf | changes).items() if v != "absent"}


SLIDE, FULL = families.SLIDING, families.FULL
WINDOWS = {  # what a config.json says, and how far each of four layers sees (0: everything)
    "qwen3": (dict(sliding_window=8), (0, 0, 0, 0)),
    "qwen3, off": (dict(sliding_window=8, use_sliding_window=False), (0, 0, 0, 0)),
    "qwen2, the last layers": (
        dict(sliding_window=8, use_sliding_window=True, max_window_layers=3),
        (0, 0, 0, 8),
    ),
    "qwen2, none of so few": (dict(sliding_window=8, use_sliding_window=True), (0, 0, 0, 0)),
    "qwen3, by layer": (
        dict(sliding_window=8, use_sliding_window=True, layer_types=[SLIDE, FULL, SLIDE, FULL]),
        (8, 0, 8, 0),
    ),
    "llama": (dict(sliding_window=None, layer_types=[FULL] * 4), (0, 0, 0, 0)),
    "mistral, v0.3": (dict(sliding_window=None), (0, 0, 0, 0)),
    "mistral, v0.1": (dict(sliding_window=8), (8, 8, 8, 8)),
    "mistral": ({}, (4096, 4096, 4096, 4096)),
    "olmo2": ({}, (0, 0, 0, 0)),
    "olmo3": ({}, (4096, 4096, 4096, 0)),
    "olmo3, by layer": (
        dict(sliding_window=8, layer_types=[FULL, FULL, SLIDE, FULL]),
        (0, 0, 8, 0),
    ),
    "olmo3, none": (dict(sliding_window=None, layer_types=[FULL] * 4), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_each_layer_has_the_window_that_transformers_gives_it(name):
    transformers = pytest.importorskip("transformers")
    changes, want = WINDOWS[name]
    hf = config(name.partition(",")[0], **changes)
    cfg = Config.from_hf(hf)
    assert cfg.windows == want and Config.from_hf(cfg.to_hf()) == cfg
    theirs = transformers.AutoConfig.for_model(**hf)
    window, types = getattr(theirs, "sliding_window", None), getattr(theirs, "layer_types", None)
    types = types or [SLIDE] * 4
    assert cfg.windows == tuple((window or 0) * (kind == SLIDE) for kind in types)


READ = {  # what else published files say, and the fields it sets
    "qwen2": (dict(use_mrope=False, attention_dropout=0.0, eos_token_id=[1, 2]), {}),
    "llama": (
        dict(num_key_value_heads="absent", rope_theta="absent", pretraining_tp=1),
        dict(K=4, theta=1e4),
    ),
    "llama, biases": (
        dict(attention_bias=True, mlp_bias=True),
        dict(biases=(*families.ATTENTION, *families.MLP)),
    ),
    "llama, SmolLM2": (
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
        dict(H=16),
    ),
    "llama, wide heads": (dict(head_dim=32, unsloth_fixed=True, _name_or_path="x"), dict(H=32)),
    "llama, old": (dict(architectures=["LLaMAForCausalLM"], hidden_act="swish"), {}),
    "mistral": (dict(sliding_window=None, embedding_multiplier=1.0), dict(window=0)),
    "qwen3": (dict(head_dim="absent"), dict(H=128)),
    "qwen3_moe": (dict(head_dim="absent", output_router_logits=True), dict(H=16, E=4)),
    "olmo2": (dict(num_key_value_heads=None, clip_qkv=None), dict(K=4)),
    "olmo3": (
        dict(
            rope_theta="absent",
            rope_parameters={
                FULL: dict(rope_type="linear", factor=2.0, rope_theta=3e4),
                SLIDE: dict(rope_type="default", rope_theta=3e4),
            },
        ),
        dict(theta=3e4, scaling=(2.0,)),
    ),
    "olmo3, no theta": (dict(rope_theta="absent"), dict(theta=5e5, scaling=None)),
}


@pytest.mark.parametrize("name", READ)
def test_what_published_files_say_beside_the_sizes_is_read_or_does_not_matter(name):
    changes, fields = READ[name]
    cfg = Config.from_hf(config(name.partition(",")[0], **changes))
    assert cfg.family == name.partition(",")[0].removesuffix("_moe")
    assert {key: getattr(cfg, key) for key in fields} == fields
    assert Config.from_hf(cfg.to_hf()) == cfg


REFUSED = {
    "gpt2": ({}, "model_type='gpt2', which is not computed here. Computed are qwen3, qwen3_moe"),
    "gemma3_text": ({}, "GELU gate.*RNJ-1 is of this type"),
    "qwen2_moe": ({}, "experts that every token shares"),
    "llama": (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "llama, another head": (
        dict(architectures=["LlamaForSequenceClassification"]),
        "architectures=.*LlamaForSequenceClassification",
    ),
    "llama, a window": (dict(sliding_window=8), "sliding_window=8.*not computed for a llama"),
    "llama, a soft cap": (dict(final_logit_softcapping=30.0), r"final_logit_softcapping=30\.0"),
    "llama, a multiplier": (dict(embedding_multiplier=12), "embedding_multiplier=12"),
    "llama, part of a head": (dict(partial_rotary_factor=0.5), r"partial_rotary_factor=0\.5"),
    "llama, dynamic": (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic'"),
    "llama, layers by name": (dict(layer_types=[SLIDE] * 4), "layer_types=.*for a llama"),
    "llama, layers of another kind": (dict(layer_types=["linear_attention"] * 4), "layer_types="),
    "llama, odd heads": (dict(head_dim=15), "heads of 15 numbers"),
    "llama, no sizes": (dict(vocab_size="absent"), "lacks 'vocab_size'.*of a llama"),
    "qwen2, too few layers": (dict(layer_types=[FULL] * 3), "for each of 4 layers"),
    "qwen2, mlp biases": (dict(mlp_bias=True), "mlp_bias=True"),
    "qwen2, experts": (dict(num_experts=4), "num_experts=4, which is not known of a qwen2"),
    "qwen3, no kv heads": (dict(num_key_value_heads="absent"), "lacks 'num_key_value_heads'"),
    "qwen3, quantized": (dict(quantization_config={"bits": 4}), "quantization_config="),
    "qwen3_moe, dense layers": (dict(mlp_only_layers=[0]), r"mlp_only_layers=\[0\]"),
    "qwen3_moe, a shared expert": (
        dict(shared_expert_intermediate_size=64),
        "shared_expert_intermediate_size=64",
    ),
    "qwen3, windows without a switch": (
        dict(layer_types=[SLIDE] * 4, sliding_window=8),
        "use_sliding_window=None is not computed",
    ),
    "mistral": (dict(attention_bias=True), "attention_bias=True"),
    "mistral, switched off": (dict(sliding_window=8, use_sliding_window=False), "not computed"),
    "mistral, a window of text": (dict(sliding_window="8"), "sliding_window='8' is not a whole"),
    "olmo2": (dict(clip_qkv=8.0), r"clip_qkv=8\.0"),
    "olmo3, two thetas": (
        dict(
            rope_parameters={FULL: dict(rope_theta=1e4), SLIDE: dict(rope_theta=5e5)},
        ),
        r"rope_theta=500000, .*10000|must be plain",
    ),
    "olmo3, windows stretched": (
        dict(rope_parameters={SLIDE: dict(rope_type="linear", factor=2.0, rope_theta=1e4)}),
        "sliding_attention=.*: it must be plain",
    ),
    "qwen3, settings by layer": (
        dict(rope_parameters={FULL: dict(rope_theta=1e4)}),
        r"rope_parameters\.full_attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_its_key(name):
    changes, said = REFUSED[name]
    with pytest.raises(CheckpointError, match=said):
        Config.from_hf(config(name.partition(",")[0], **changes))
