"""What a Qwen3 is made of: its configuration, from a Hugging Face `config.json`, and each of its
weights, declared once. Initialisation, shardings, loading, LoRA shapes and memory derive from here.

Shape letters: B rows, T positions, S cache slots, D width, N query heads, K kv heads, H head width,
F mlp width (of one expert), E experts, L layers, V vocabulary, A adapters, R rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import attention
from jaxdeep.model.rope import Yarn
from jaxdeep.parallel import mesh as meshes

LINEARS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
EXPERTS = ("w_gate", "w_up", "w_down")  # of a mixture: one of each per expert
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


class Leaf(NamedTuple):
    """A weight's shape, the names of its dimensions, its fan-in (None: starts at one), and its dtype
    where that is not the model's."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None
    dtype: str = ""


def leaves(cfg: Config) -> dict[str, Any]:
    """Every weight of the model, a Leaf in place of each array. Linears are [L, in, out], those of
    experts [L, E, in, out]; with `cfg.quant` each is {"q": int8, "scale": of each output}."""
    L, D, F, Q, KV, H = cfg.L, cfg.D, cfg.F, cfg.N * cfg.H, cfg.K * cfg.H, cfg.H
    layers = {
        "attn_norm": Leaf((L, D), ("layers", None), None),
        "wq": Leaf((L, D, Q), ("layers", "embed", "heads"), D),
        "wk": Leaf((L, D, KV), ("layers", "embed", "kv_heads"), D),
        "wv": Leaf((L, D, KV), ("layers", "embed", "kv_heads"), D),
        "q_norm": Leaf((L, H), ("layers", None), None),
        "k_norm": Leaf((L, H), ("layers", None), None),
        "wo": Leaf((L, Q, D), ("layers", "heads", "embed"), Q),
        "mlp_norm": Leaf((L, D), ("layers", None), None),
    }
    if cfg.E:
        layers |= {
            "router": Leaf((L, D, cfg.E), ("layers", "embed", None), D),
            "w_gate": Leaf((L, cfg.E, D, F), ("layers", "experts", "embed", None), D),
            "w_up": Leaf((L, cfg.E, D, F), ("layers", "experts", "embed", None), D),
            "w_down": Leaf((L, cfg.E, F, D), ("layers", "experts", None, "embed"), F),
        }
    else:
        layers |= {
            "w_gate": Leaf((L, D, F), ("layers", "embed", "mlp"), D),
            "w_up": Leaf((L, D, F), ("layers", "embed", "mlp"), D),
            "w_down": Leaf((L, F, D), ("layers", "mlp", "embed"), F),
        }
    if cfg.quant:
        layers |= {name: _quantized(layers[name]) for name in LINEARS}
    tree = {
        "embed": Leaf((cfg.V, D), ("vocab", "embed_table"), D),  # as `qwen3.embed` looks it up
        "layers": layers,
        "norm": Leaf((D,), (None,), None),
    }
    return tree if cfg.tie else tree | {"head": Leaf((D, cfg.V), ("embed", "vocab"), D)}


def _quantized(leaf: Leaf) -> dict[str, Leaf]:
    return {
        "q": leaf._replace(dtype="int8"),
        "scale": Leaf(
            (*leaf.shape[:-2], leaf.shape[-1]), (*leaf.axes[:-2], leaf.axes[-1]), None, "float32"
        ),
    }


def is_leaf(x: Any) -> bool:
    """For jax.tree functions over `leaves`."""
    return isinstance(x, Leaf)


def divisible_shape(cfg: Config, leaf: Leaf) -> tuple[int, ...]:
    """The sizes that sharding must divide: whole heads, not single numbers of a head."""
    per = {"heads": cfg.H, "kv_heads": cfg.H}
    return tuple(n // per.get(a, 1) for n, a in zip(leaf.shape, leaf.axes, strict=True))


def shardings(cfg: Config, device_mesh: jax.sharding.Mesh, tree: Any = None) -> Any:
    """The sharding of each leaf of `tree` (default: the model's own)."""
    return jax.tree.map(
        lambda leaf: meshes.weight_sharding(device_mesh, leaf.axes, divisible_shape(cfg, leaf)),
        leaves(cfg) if tree is None else tree,
        is_leaf=is_leaf,
    )


def matmul_precision(cfg: Config) -> contextlib.AbstractContextManager:
    """For tracing a program of this model: products of float32 numbers are of all their bits, which GPUs
    and TPUs round by default, so that trainer and sampler would not agree."""
    whole = cfg.dtype == "float32"
    return jax.default_matmul_precision("highest") if whole else contextlib.nullcontext()


def quantize(weight: jax.Array) -> dict[str, jax.Array]:
    """A linear [..., in, out] as int8 with one float32 scale per output: its largest input / 127."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-2) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return {"q": jnp.round(weight / scale[..., None, :]).astype(jnp.int8), "scale": scale}


def init(key: jax.Array, cfg: Config) -> dict[str, Any]:
    """Random weights: normal with variance 1 / fan-in, norms at one."""
    plain = leaves(dataclasses.replace(cfg, quant=""))
    flat, tree = jax.tree.flatten(plain, is_leaf=is_leaf)
    keys = jax.random.split(key, len(flat))
    dtype = jnp.dtype(cfg.dtype)
    arrays = [
        jnp.ones(leaf.shape, dtype)
        if leaf.fan_in is None
        else (jax.random.normal(k, leaf.shape) * leaf.fan_in**-0.5).astype(dtype)
        for k, leaf in zip(keys, flat, strict=True)
    ]
    params = jax.tree.unflatten(tree, arrays)
    if cfg.quant:
        params["layers"] |= {name: quantize(params["layers"][name]) for name in LINEARS}
    return params


def count(cfg: Config) -> int:
    """How many parameters the model has."""
    tree = leaves(dataclasses.replace(cfg, quant=""))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=is_leaf))
