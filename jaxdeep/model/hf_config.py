"""A model's architecture as the content of a Hugging Face `config.json`, both ways.

What is read has the fields of `config.Config`. A key that would change what is computed and is not
known here is refused by its name, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxdeep.errors import CheckpointError
from jaxdeep.model import families, rope
from jaxdeep.model.families import FULL, SLIDING, Family

if TYPE_CHECKING:
    from jaxdeep.model.config import Config


def architecture(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a `Config` that the content `hf` of a `config.json` sets; `name` is the file's.
    CheckpointError for an architecture this package cannot compute."""
    family = family_of(hf, name)
    _refuse_unknown(hf, family, name)

    def size(key: str, default: int | None = None) -> int:
        value = default if hf.get(key) is None else hf[key]
        if value is None:
            raise CheckpointError(
                f"{name} lacks {key!r}: is it the config.json of a {family.model_type}?"
            )
        return _whole(value, key, name)

    heads, width = size("num_attention_heads"), size("hidden_size")
    # null, and in some families an absent key: each query head has a kv head of its own
    own = "num_key_value_heads" in hf or family.kv_heads_optional
    # an absent key and null are not the same to transformers
    head = family.default_head if "head_dim" not in hf and family.default_head else width // heads
    eps = hf.get("rms_norm_eps")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise CheckpointError(f"{name}: rms_norm_eps={eps!r} is not a number from 0 to 1")
    values = dict(
        family="qwen3" if family.experts else family.model_type,
        V=size("vocab_size"),
        D=width,
        F=size("moe_intermediate_size" if family.experts else "intermediate_size"),
        L=size("num_hidden_layers"),
        N=heads,
        K=size("num_key_value_heads", heads if own else None),
        H=size("head_dim", head),
        eps=float(eps),
        tie=bool(hf.get("tie_word_embeddings", False)),
        limit=size("max_position_embeddings"),
        biases=family.biased
        + (family.attention_bias if hf.get("attention_bias") else ())
        + (family.mlp_bias if hf.get("mlp_bias") else ()),
    )
    if values["N"] % values["K"]:
        raise CheckpointError(
            f"{name}: num_attention_heads={values['N']} is not a multiple of "
            f"num_key_value_heads={values['K']}"
        )
    if values["H"] % 2:
        raise CheckpointError(f"{name}: heads of {values['H']} numbers cannot be rotated in pairs")
    values["theta"], scaling = rope.read(_flat_rope(hf, family, name), name, family.default_theta)
    values["scaling"] = scaling
    if isinstance(scaling, rope.Yarn):
        values["limit"] = max(values["limit"], int(scaling.factor * scaling.original))
    values["window"], values["windowed"] = _windows(hf, family, values["L"], name)
    if family.experts:
        values |= dict(
            # the name differs between versions of transformers
            E=size("num_experts" if "num_experts" in hf else "num_local_experts"),
            top_k=size("num_experts_per_tok"),
            norm_top_k=bool(hf.get("norm_topk_prob", False)),
        )
        if values["top_k"] > values["E"]:
            raise CheckpointError(
                f"{name}: num_experts_per_tok={values['top_k']} of {values['E']} experts"
            )
    return values


def family_of(hf: Mapping[str, Any], name: str) -> Family:
    """The row of `families.FAMILIES`; CheckpointError with what is missing for another type."""
    kind = hf.get("model_type")
    if kind in families.FAMILIES:
        return families.FAMILIES[kind]
    missing = families.NOT_COMPUTED.get(kind)
    raise CheckpointError(
        f"{name} has model_type={kind!r}, which is not computed here"
        + (f": it needs {missing}. " if missing else ". ")
        + f"Computed are {', '.join(families.FAMILIES)}"
    )


def _refuse_unknown(hf: Mapping[str, Any], family: Family, name: str) -> None:
    """CheckpointError with every setting that would make `forward` compute another model."""
    classes = hf.get("architectures") or [family.architecture]
    wrong = {
        "architectures": family.architecture.lower() not in [str(x).lower() for x in classes],
        "hidden_act": (hf.get("hidden_act") or "silu") not in ("silu", "swish"),
        "attention_bias": hf.get("attention_bias") and not (family.attention_bias or family.biased),
        "mlp_bias": hf.get("mlp_bias") and not family.mlp_bias,
        "quantization_config": hf.get("quantization_config"),
        "use_qk_norm": bool(hf.get("use_qk_norm", family.qk_norm)) != bool(family.qk_norm),
    }
    if family.experts:
        wrong["mlp_only_layers"] = hf.get("mlp_only_layers")
        wrong["decoder_sparse_step"] = hf.get("decoder_sparse_step", 1) != 1
    wrong = {key: hf[key] for key, bad in wrong.items() if bad}
    if wrong:
        raise CheckpointError(
            f"{name} is not a {family.model_type} that this package computes: {_said(wrong)}"
        )
    if strange := families.unknown(hf, family):
        raise CheckpointError(
            f"{name} has {_said(strange)}, which is not known of a {family.model_type} here: "
            "remove a key that does not change what the model computes"
        )


def _said(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in entries.items())


def _whole(value: Any, key: str, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name}: {key}={value!r} is not a whole number above 0")
    return value


def _flat_rope(hf: Mapping[str, Any], family: Family, name: str) -> Mapping[str, Any]:
    """`hf` with the rotary settings of layers without a window, where each kind of layer has its
    own. Those of windowed layers must be the plain ones that are computed."""
    nested = hf.get("rope_parameters")
    if family.scaled_window or not isinstance(nested, Mapping) or not {FULL, SLIDING} & set(nested):
        return hf
    full, sliding = (nested.get(kind) or {} for kind in (FULL, SLIDING))
    if set(nested) - {FULL, SLIDING} or not isinstance(full, Mapping):
        raise CheckpointError(f"{name}: rope_parameters={nested!r} mixes kinds of layers")
    flat = {**hf, "rope_parameters": full}
    theta = rope.read(flat, name, family.default_theta)[0]
    plain = {"rope_parameters": sliding, "max_position_embeddings": 1}
    if rope.read(plain, name, theta) != (theta, None):
        raise CheckpointError(
            f"{name}: rope_parameters has {SLIDING}={sliding!r}: it must be plain, with the theta "
            f"of {FULL}"
        )
    return flat


def _windows(
    hf: Mapping[str, Any], family: Family, L: int, name: str
) -> tuple[int, tuple[bool, ...]]:
    """The width of the sliding window, and which of the L layers have it, as in `Config`."""
    types = hf.get("layer_types")
    if types is not None and (
        not isinstance(types, (list, tuple)) or len(types) != L or set(types) - {FULL, SLIDING}
    ):
        raise CheckpointError(
            f"{name}: layer_types={types!r} is not {FULL} or {SLIDING} for each of {L} layers"
        )
    window = hf.get("sliding_window", family.default_window) or 0
    on = hf.get("use_sliding_window")
    if family.window == "on":
        window = window if on else 0
    elif (window and not family.window) or (on is not None and bool(on) != bool(window)):
        keys = {key: hf.get(key) for key in ("sliding_window", "use_sliding_window")}
        raise CheckpointError(f"{name}: {_said(keys)} is not computed for a {family.model_type}")
    if window:
        _whole(window, "sliding_window", name)
    if not window or not family.window:
        chosen = [False] * L
    elif family.window == "all":
        chosen = [True] * L
    elif types is not None:
        chosen = [kind == SLIDING for kind in types]
    elif family.window == "on":
        first = hf.get("max_window_layers", 28)
        chosen = [layer >= first for layer in range(L)]
    else:
        chosen = [(layer + 1) % 4 != 0 for layer in range(L)]
    if types is not None and chosen != [kind == SLIDING for kind in types]:
        raise CheckpointError(
            f"{name}: layer_types={types!r} with sliding_window={hf.get('sliding_window')!r} and "
            f"use_sliding_window={on!r} is not computed for a {family.model_type}"
        )
    if not any(chosen):
        return 0, ()
    return window, () if all(chosen) else tuple(chosen)


def content(cfg: Config) -> dict[str, Any]:
    """The same architecture as the content of a `config.json`."""
    family = cfg.kind
    hf = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": cfg.V,
        "hidden_size": cfg.D,
        "intermediate_size": cfg.F,
        "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.N,
        "num_key_value_heads": cfg.K,
        "head_dim": cfg.H,
        "rope_theta": cfg.theta,
        "rms_norm_eps": cfg.eps,
        "tie_word_embeddings": cfg.tie,
        "max_position_embeddings": cfg.limit,
        "hidden_act": "silu",
        "torch_dtype": cfg.dtype,
    }
    if family.attention_bias:
        hf["attention_bias"] = set(family.attention_bias) <= set(cfg.biases)
    if family.mlp_bias:
        hf["mlp_bias"] = set(family.mlp_bias) <= set(cfg.biases)
    if family.window:
        hf["sliding_window"] = cfg.window or None
    if family.window == "on":
        hf["use_sliding_window"] = bool(cfg.window)
    if family.window == "chosen" or (family.window == "on" and cfg.window):
        hf["layer_types"] = [SLIDING if width else FULL for width in cfg.windows]
    if cfg.E:
        hf |= {
            "num_experts": cfg.E,
            "num_experts_per_tok": cfg.top_k,
            "norm_topk_prob": cfg.norm_top_k,
            "moe_intermediate_size": cfg.F,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if cfg.scaling:
        hf["rope_scaling"] = cfg.scaling.to_hf() | {"rope_theta": cfg.theta}
    if not family.scaled_window:
        # both layouts: transformers 5 gives windowed layers another theta in the older one
        plain = {"rope_type": "default", "rope_theta": cfg.theta}
        full = hf.get("rope_scaling", plain)
        hf["rope_parameters"] = {FULL: full, SLIDING: plain}
    return hf
