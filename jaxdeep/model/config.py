"""HEADER"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import attention
from jaxdeep.model.rope import Yarn

REMAT = {"dots": ("linear", "attention"), "attention": ("attention",), "full": ()}
"""What of a layer is kept for the backward pass beside its input; the rest is computed again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture, and how to compute it."""

    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    theta: float
    eps: float
    tie: bool
    limit: int  # positions the model is made for
    E: int = 0  # 0: dense
    top_k: int = 0  # experts per token
    norm_top_k: bool = True  # whether their weights sum to one
    yarn: Yarn | None = None
    dtype: str = "bfloat16"
    quant: str = ""  # "int8": the frozen linears are held as int8, one scale per output
    remat: str = "full"  # what the backward pass computes again: all but REMAT[remat]
    attention: str = "auto"  # which kernel, one of attention.KINDS
    chunk: int = 256  # positions whose logits exist at one time
    lora_scale: float = 1.0  # alpha / rank of whichever adapter is trained

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

        `changes` replaces fields. An architecture this package does not compute is refused.
        """
        hf, name = source, "the given config"
        if not isinstance(source, Mapping):
            path = pathlib.Path(source)
            path = path / "config.json" if path.is_dir() else path
            name = str(path)
            try:
                hf = json.loads(path.read_text())
            except (OSError, json.JSONDecodeError) as error:
                raise CheckpointError(f"{path}: no readable config.json ({error})") from error
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        mixture = hf.get("model_type") == "qwen3_moe"
        refused = {
            "model_type": hf.get("model_type") not in ("qwen3", "qwen3_moe"),
            "hidden_act": hf.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(hf.get("attention_bias")),
            "use_sliding_window": bool(hf.get("use_sliding_window")),
            "rope_scaling": kind not in ("default", "yarn"),
            "mlp_only_layers": mixture and bool(hf.get("mlp_only_layers")),
            "decoder_sparse_step": mixture and hf.get("decoder_sparse_step", 1) != 1,
            "quantization_config": bool(hf.get("quantization_config")),
        }
        if any(refused.values()):
            keys = ", ".join(f"{k}={hf.get(k, rope)!r}" for k, bad in refused.items() if bad)
            raise CheckpointError(f"{name} is not a Qwen3 that this package computes: {keys}")
        try:
            values = dict(
                V=hf["vocab_size"],
                D=hf["hidden_size"],
                F=hf["moe_intermediate_size" if mixture else "intermediate_size"],
                L=hf["num_hidden_layers"],
                N=hf["num_attention_heads"],
                K=hf["num_key_value_heads"],
                H=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
                theta=float(rope.get("rope_theta") or hf["rope_theta"]),
                eps=hf["rms_norm_eps"],
                tie=bool(hf.get("tie_word_embeddings", False)),
                limit=hf["max_position_embeddings"],
            )
            if mixture:
                values |= dict(
                    # the name varies between editions of transformers
                    E=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
                    top_k=hf["num_experts_per_tok"],
                    norm_top_k=bool(hf.get("norm_topk_prob", False)),
                )
        except KeyError as error:
            raise CheckpointError(f"{name} lacks {error}: is it a Qwen3 config.json?") from error
        if kind == "yarn":
            yarn = values["yarn"] = Yarn.from_hf(rope, values["limit"])
            values["limit"] = max(values["limit"], int(yarn.factor * yarn.original))
        if values["N"] % values["K"]:
            raise CheckpointError(f"{name}: {values['N']} heads do not divide by {values['K']}")
        if mixture and not 0 < values["top_k"] <= values["E"]:
            raise CheckpointError(
                f"{name}: num_experts_per_tok={values['top_k']} of {values['E']} experts"
            )
        return cls(**values | changes)

    def to_hf(self) -> dict[str, Any]:
        """The same architecture as the content of a Hugging Face `config.json`."""
        out = {
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
            out |= {
                "num_experts": self.E,
                "num_experts_per_tok": self.top_k,
                "norm_topk_prob": self.norm_top_k,
                "moe_intermediate_size": self.F,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if self.yarn:
            out["rope_scaling"] = self.yarn.to_hf() | {"rope_theta": self.theta}
        return out
