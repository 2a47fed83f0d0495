"""The architecture of a model, from a Hugging Face `config.json`, and how to compute it.

The names of arrays end in the letters of their dimensions: `x_BTD` is [B, T, D]. The letters are

    A  adapters in a bank                    N  query heads
    B  rows of a batch or of a call          P  pages (in the host half: prompts)
    C  devices along the axis `context`      Q  queries: positions that attend
    D  width                                 R  rank of an adapter
    E  experts                               S  slots of a page; keys that are attended to
    F  width of the mlp (of one expert)      T  positions of a row
    G  rollouts of a prompt                  V  vocabulary
    H  width of a head                       W  tokens of a stop sequence
    J  keys and values of the kv heads, 2 K  X  pages in a row's table
    K  kv heads                              Y  slots of the pages that are read together
    L  layers                                Z  stop sequences of a row
    M  query heads of a kv head

A small letter is a part of its capital: a device's share inside `shard_map` (`tokens_bt`), or one
block of a loop (`q_BNqH`). Some are sizes of their own, where their capital does not occur: `i` and
`o` the inputs and outputs of any linear, `y` and `z` numbers of blocks, and in a mixture `k` the
experts of a token, `n` the (token, expert) pairs, `m` those of one block. A digit is a dimension of
that size. A function that runs on one device's shard may write what it was given in capitals: the
rows it sees are its B.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import attention, rope

REMAT = {"dots": ("linear", "attention"), "attention": ("attention",), "full": ()}
"""The named values of a layer that are kept for the backward pass, beside the layer's input, by
`model.remat`; everything else is recomputed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture, and how to compute it. It knows nothing of adapters."""

    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    theta: float
    eps: float
    tie: bool  # the embedding is also the head
    limit: int  # positions the model is made for
    E: int = 0  # 0: dense
    top_k: int = 0  # experts per token
    norm_top_k: bool = True  # whether the weights of a token's experts are scaled to sum to one
    scaling: rope.Scaling | None = None  # of the rotary frequencies; None: plain
    dtype: str = "bfloat16"
    quant: str = ""  # "int8": the frozen linears are stored as int8, one scale per output
    remat: str = "full"  # the backward pass recomputes everything but REMAT[remat]
    attention: str = "auto"  # the kernel, one of attention.KINDS
    chunk: int = 256  # positions whose logits exist at one time

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ConfigError(f"model.remat={self.remat!r}: choose one of {', '.join(REMAT)}")
        if self.attention not in attention.KINDS:
            raise ConfigError(
                f"model.attention={self.attention!r}: choose one of {', '.join(attention.KINDS)}"
            )
        if self.quant not in ("", "int8"):
            raise ConfigError(f"model.quant={self.quant!r}: choose '' or 'int8'")

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | Mapping[str, Any], **changes: Any) -> Config:
        """The configuration in `source`: a config.json, its folder, or its content.

        `changes` replaces fields. CheckpointError for an architecture this package cannot compute.
        """
        hf, name = _read(source)
        mixture = hf.get("model_type") == "qwen3_moe"
        _refuse_unknown(hf, name)

        def size(key: str, default: int | None = None) -> int:
            value = default if hf.get(key) is None else hf[key]
            if value is None:
                raise CheckpointError(f"{name} lacks {key!r}: is it a Qwen3 config.json?")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name}: {key}={value!r} is not a whole number above 0")
            return value

        heads = size("num_attention_heads")
        values = dict(
            V=size("vocab_size"),
            D=size("hidden_size"),
            F=size("moe_intermediate_size" if mixture else "intermediate_size"),
            L=size("num_hidden_layers"),
            N=heads,
            # null: each query head has a kv head of its own
            K=size("num_key_value_heads", heads if "num_key_value_heads" in hf else None),
            # Qwen3's heads are wider than hidden_size / heads
            H=size("head_dim", size("hidden_size") // heads),
            eps=_number(hf, "rms_norm_eps", name),
            tie=bool(hf.get("tie_word_embeddings", False)),
            limit=size("max_position_embeddings"),
        )
        values["theta"], scaling = rope.read(hf, name)
        values["scaling"] = scaling
        if isinstance(scaling, rope.Yarn):
            values["limit"] = max(values["limit"], int(scaling.factor * scaling.original))
        if mixture:
            values |= dict(
                # the name differs between versions of transformers
                E=size("num_experts" if "num_experts" in hf else "num_local_experts"),
                top_k=size("num_experts_per_tok"),
                norm_top_k=bool(hf.get("norm_topk_prob", False)),
            )
        if values["N"] % values["K"]:
            raise CheckpointError(
                f"{name}: num_attention_heads={values['N']} is not a multiple of "
                f"num_key_value_heads={values['K']}"
            )
        if mixture and not 0 < values["top_k"] <= values["E"]:
            raise CheckpointError(
                f"{name}: num_experts_per_tok={values['top_k']} of {values['E']} experts"
            )
        return cls(**values | changes)

    def to_hf(self) -> dict[str, Any]:
        """The same architecture as the content of a Hugging Face `config.json`."""
        hf = {
            "architectures": ["Qwen3MoeForCausalLM" if self.E else "Qwen3ForCausalLM"],
            "model_type": "qwen3_moe" if self.E else "qwen3",
            "vocab_size": self.V,
            "hidden_size": self.D,
            "intermediate_size": self.F,
            "num_hidden_layers": self.L,
            "num_attention_heads": self.N,
            "num_key_value_heads": self.K,
            "head_dim": self.H,
            "rope_theta": self.theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tie,
            "max_position_embeddings": self.limit,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": self.dtype,
        }
        if self.E:
            hf |= {
                "num_experts": self.E,
                "num_experts_per_tok": self.top_k,
                "norm_topk_prob": self.norm_top_k,
                "moe_intermediate_size": self.F,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if self.scaling:
            hf["rope_scaling"] = self.scaling.to_hf() | {"rope_theta": self.theta}
        return hf


def _read(source: str | pathlib.Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The content of a config.json, and what error messages call it."""
    if isinstance(source, Mapping):
        return source, "the given config"
    path = pathlib.Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(path.read_text()), str(path)
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: no readable config.json ({error})") from error


def _number(hf: Mapping[str, Any], key: str, name: str) -> float:
    value = hf.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"{name}: {key}={value!r} is not a number from 0 to 1")
    return float(value)


def _refuse_unknown(hf: Mapping[str, Any], name: str) -> None:
    """CheckpointError with every setting that would make `forward` compute another model."""
    mixture = hf.get("model_type") == "qwen3_moe"
    unknown = {
        "model_type": hf.get("model_type") not in ("qwen3", "qwen3_moe"),
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "mlp_only_layers": mixture and bool(hf.get("mlp_only_layers")),
        "decoder_sparse_step": mixture and hf.get("decoder_sparse_step", 1) != 1,
        "quantization_config": bool(hf.get("quantization_config")),
    }
    if any(unknown.values()):
        keys = ", ".join(f"{key}={hf.get(key)!r}" for key, bad in unknown.items() if bad)
        raise CheckpointError(f"{name} is not a Qwen3 that this package computes: {keys}")
