"""The families of decoders that are computed: one row each, with what of a layer differs, the names
of its weights in published checkpoints, and what its `config.json` may say.

All of them have root-mean-square norms, rotary embedding over whole heads, grouped query heads and
a gated SiLU mlp. What a `config.json` asks for beyond that is refused by its key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

LINEARS = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
"""The linears of a layer by their names here, and the modules they are in published checkpoints."""

ATTENTION, MLP = ("wq", "wk", "wv", "wo"), ("w_gate", "w_up", "w_down")
FULL, SLIDING = "full_attention", "sliding_attention"  # the entries of `layer_types`


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a `model_type` have in common.

    `norms` come "before" attention and mlp, or "after" them, before the residual is added.
    `qk_norm` is over each "head" of queries and keys, over their whole "width", or "" for none.
    `biased` linears always have a bias; `attention_bias` and `mlp_bias` name those that the key of
    this name gives one. `window` says which layers may attend to a sliding window of positions
    only: "" none, "all" of them, those "chosen" by `layer_types`, or these where
    `use_sliding_window` is "on". `scaled_window` is False where windowed layers keep plain rotary
    frequencies. The `default_` of theta, of a head's width and of the window stand for absent keys,
    as in transformers; None and 0: the key must be there, the width of a model over its heads, and
    no window.
    """

    model_type: str
    architecture: str
    norms: str = "before"
    qk_norm: str = ""
    biased: tuple[str, ...] = ()
    attention_bias: tuple[str, ...] = ()
    mlp_bias: tuple[str, ...] = ()
    window: str = ""
    default_window: int = 0
    scaled_window: bool = True
    default_theta: float | None = 10_000.0
    default_head: int = 0
    kv_heads_optional: bool = False
    experts: bool = False  # in place of the mlp, in every layer

    @property
    def names(self) -> dict[str, str]:
        """The published module of each of a layer's weights: "self_attn.q_proj"."""
        norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        if self.norms == "after":
            norms = {"attn_norm": "post_attention_layernorm"}
            norms["mlp_norm"] = "post_feedforward_layernorm"
        own = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "router": "mlp.gate"}
        return LINEARS | own | norms


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm="head",
    attention_bias=ATTENTION,
    window="on",
    default_theta=None,
    default_head=128,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    norms="after",
    qk_norm="width",
    attention_bias=ATTENTION,
    kv_heads_optional=True,
)
FAMILIES = {
    family.model_type: family
    for family in (
        QWEN3,
        dataclasses.replace(
            QWEN3,
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            window="",
            default_head=0,
            experts=True,
        ),
        # also DeepSeek-R1-Distill-Qwen
        Family("qwen2", "Qwen2ForCausalLM", biased=("wq", "wk", "wv"), window="on"),
        # Llama 2 and 3, SmolLM2, DeepSeek-R1-Distill-Llama
        Family(
            "llama",
            "LlamaForCausalLM",
            attention_bias=ATTENTION,
            mlp_bias=MLP,
            kv_heads_optional=True,
        ),
        Family("mistral", "MistralForCausalLM", window="all", default_window=4096),
        OLMO2,
        dataclasses.replace(
            OLMO2,
            model_type="olmo3",
            architecture="Olmo3ForCausalLM",
            window="chosen",
            default_window=4096,
            scaled_window=False,
            default_theta=500_000.0,
        ),
    )
}

GEMMA = (
    "norms whose weight counts from one, before and after attention and mlp; an embedding scaled "
    "by the square root of hidden_size; a GELU gate; query_pre_attn_scalar; and soft caps on logits"
)
NOT_COMPUTED = {
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": f"{GEMMA} (RNJ-1 is of this type)",
    "mixtral": "another router, and experts under other names",
    "qwen2_moe": "experts that every token shares",
    "smollm3": "layers without a rotary embedding",
    "phi3": "queries, keys and values in one linear",
    "olmo": "norms without weights, and clipped queries, keys and values",
    "ministral": "layers of two kinds under another name",
    "deepseek_v3": "latent attention",
}
"""What is missing here for other values of `model_type` that are often asked for."""

READ = {  # keys of a config.json that `Config.from_hf` honours or compares
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("partial_rotary_factor", "attention_bias", "mlp_bias", "quantization_config"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "use_qk_norm",
}
READ_OF_EXPERTS = {
    *("moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    *("router_aux_loss_coef", "output_router_logits"),
}
HARMLESS = re.compile(
    # names, versions, how weights are stored, initialised or dropped out
    r"_.*|.*_token_ids?|.*_token_index|.*version|.*dropout|torch_dtype|dtype|initializer_range|"
    r"use_cache|pretraining_tp|auto_map|tokenizer_class|name_or_path|is_llama_config|"
    r"transformers\.js_config|unsloth.*|max_sequence_length|model_max_length|"
    r"cache_implementation|use_flash_attn.*|attn_implementation|use_bfloat16|torchscript|"
    # a head for other tasks, and settings of generation, as older editions wrote them
    r"id2label|label2id|problem_type|finetuning_task|task_specific_params|is_decoder|prefix|"
    r"return_dict.*|output_.*|max_length|min_length|do_sample|early_stopping|num_beam.*|"
    r"diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|"
    r"(encoder_)?no_repeat_ngram_size|num_return_sequences|chunk_size_feed_forward|"
    r"remove_invalid_values|tf_legacy_loss"
)
"""Keys that change nothing of what a model computes for given tokens."""
NEUTRAL = {  # other models' keys, and the values at which they change nothing
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "hidden_activation": "silu",
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
}


def unknown(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The entries of a `config.json` that are not known here: they may change what is computed.
    Null, false, zero and empty ones say that something is not there."""
    read = READ | READ_OF_EXPERTS if family.experts else READ
    return {
        key: value
        for key, value in hf.items()
        if key not in read and value and not HARMLESS.fullmatch(key) and NEUTRAL.get(key) != value
    }
