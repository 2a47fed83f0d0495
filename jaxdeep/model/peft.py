"""Adapters in PEFT's layout, out and in: adapter_config.json and adapter_model.safetensors.

What is read is folded into one shape, an adapter of one rank and scale: smaller factors are padded with
zeros, other scales go into `b`, modules without factors get zeros. What has no such form is refused by
name. `jaxdeep.json` beside them tells which base the adapter belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdeep.errors import CheckpointError
from jaxdeep.model import identity, lora, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.identity import Base
from jaxdeep.model.load import NAMES, hf_module, on_host, put_beside

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "jaxdeep.json"
PREFIX = "base_model.model."
LEAVES = {
    hf.rpartition(".")[2]: name for name, hf in NAMES.items() if name in model_weights.LINEARS
}
TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp(?:\.experts\.(\d+))?)\.(\w+)")
FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts(?:\.base_layer)*")
REFUSED = (  # each changes what an adapter computes to something that two factors are not
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
)
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base


class Adapter(NamedTuple):
    """Factors on the host (float32), the rank, alpha and linears they have, and their base if known."""

    factors: dict[str, Any]
    lora: lora.LoraConfig
    base: Base | None


def save(
    path: pathlib.Path,
    adapter: Mapping[str, Any],
    cfg: Config,
    spec: lora.LoraConfig,
    *,
    base: Base,
    source: pathlib.Path | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter as a folder that PEFT loads onto the published base, with the files of `source`
    and `beside` as `load.save` does. A folder with content is refused.

    Experts' factors are written for each expert; PEFT, which fuses them, wants all three linears, so
    those without an adapter get one of zeros.
    """
    targets = [name for name in model_weights.LINEARS if name in adapter]
    if cfg.E and set(model_weights.EXPERTS) & set(targets):
        targets = [n for n in model_weights.LINEARS if n in targets or n in model_weights.EXPERTS]
    shapes = lora.leaves(cfg, lora.LoraConfig(spec.rank, spec.alpha, tuple(targets)))
    plan = {}
    for name in targets:
        experts = range(cfg.E) if cfg.E and name in model_weights.EXPERTS else (None,)
        for i in range(cfg.L):
            for e in experts:
                for key, factor in (("a", "lora_A"), ("b", "lora_B")):
                    *_, rows, columns = shapes[name][key].shape
                    full = f"{PREFIX}{hf_module(name, i, e)}.{factor}.weight"
                    plan[full] = ((columns, rows), name, key, i, e)

    def arrays() -> Iterator[np.ndarray]:
        held, layer = None, None
        for shape, name, key, i, e in plan.values():
            if name not in adapter:
                yield np.zeros(shape, np.float32)
                continue
            if held != (name, i):
                held = (name, i)
                layer = {
                    k: on_host(jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False))
                    for k, x in adapter[name].items()
                }
            x = layer[key] if e is None else layer[key][e]
            yield np.asarray(x, np.float32).T

    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": [NAMES[name].rpartition(".")[2] for name in targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    if jax.process_index():
        for _ in arrays():  # what is gathered takes part of all
            pass
        return
    with tensors.fresh(path) as part:
        dtype = np.dtype(np.float32)
        tensors.write(part / WEIGHTS, {k: (v[0], dtype) for k, v in plan.items()}, arrays())
        (part / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
        (part / BASE).write_text(json.dumps({"base": base._asdict()}, indent=2) + "\n")
        put_beside(part, source, beside)


class _Piece(NamedTuple):
    """The factors of one linear of one layer ([in, r] and [r, out]), of one expert, or of all of them
    (expert None, with a leading E); `module` is what the configuration calls it."""

    module: str
    leaf: str
    layer: int
    expert: int | None
    a: np.ndarray
    b: np.ndarray


def base_in(path: pathlib.Path) -> Base | None:
    """The base that the adapter in a folder says it belongs to; None where it does not say."""
    if not (path / BASE).exists():
        return None
    return Base(**json.loads((path / BASE).read_text())["base"])


def load(path: pathlib.Path, cfg: Config, base: Base | None = None) -> Adapter:
    """The adapter in a PEFT folder, for a base of this architecture. Its rank is the largest of any
    module. CheckpointError names a setting or tensor that has no place in it, and where the adapter says
    that it belongs to another base than `base`, both."""
    about = _config(path)
    theirs = base_in(path)
    identity.check(f"the adapter in {path}", theirs, base)
    pieces = []
    for module, pair in _pairs(path).items():
        pieces += _pieces(path, module, *pair, cfg)
    # zeros stand for no adapter, as `save` writes them
    pieces = [piece for piece in pieces if piece.a.any() or piece.b.any()] or pieces
    scales = [_scale(path, piece, about) for piece in pieces]
    targets = [
        name for name in model_weights.LINEARS if any(piece.leaf == name for piece in pieces)
    ]
    rank = max(piece.a.shape[-1] for piece in pieces)
    spec = lora.LoraConfig(rank, float(scales[0] * rank), tuple(targets))
    factors = {
        name: {key: np.zeros(leaf.shape, np.float32) for key, leaf in pair.items()}
        for name, pair in lora.leaves(cfg, spec).items()
    }
    for piece, scale in zip(pieces, scales, strict=True):
        at = (piece.layer,) if piece.expert is None else (piece.layer, piece.expert)
        r = piece.a.shape[-1]
        factors[piece.leaf]["a"][at][..., :r] = piece.a
        factors[piece.leaf]["b"][at][..., :r, :] = piece.b * np.float32(scale / scales[0])
    return Adapter(factors, spec, theirs)


def _config(path: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads((path / CONFIG).read_text())
        kind, bias = about.get("peft_type"), about.get("bias", "none")
        about["r"], about["lora_alpha"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path / CONFIG} is not a readable configuration: {error!r}"
        ) from error
    if kind != "LORA":
        raise CheckpointError(f"{path} is an adapter of type {kind}, not LORA")
    wrong = [f"{name}={about[name]!r}" for name in REFUSED if about.get(name)]
    wrong += [f"bias={bias!r}"] if bias != "none" else []
    start = about.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVED):
        wrong.append(f"init_lora_weights={start!r}")
    if wrong:
        raise CheckpointError(f"{path} is more than two factors a linear: {', '.join(wrong)}")
    return about


def _pairs(path: pathlib.Path) -> dict[str, tuple[tensors.Entry, tensors.Entry]]:
    """The entries of both factors of each module."""
    if not (path / WEIGHTS).exists():
        raise CheckpointError(f"{path} holds no {WEIGHTS}: save the adapter as safetensors")
    found: dict[str, dict[str, tensors.Entry]] = {}
    for name, entry in tensors.header(path / WEIGHTS).items():
        match = TENSOR.fullmatch(name)
        if not match or not (MODULE.fullmatch(match[1]) or FUSED.fullmatch(match[1])):
            raise CheckpointError(f"{path}: the tensor {name} is no factor of a Qwen3's linear")
        if entry.dtype not in tensors.DTYPES or len(entry.shape) != 2:
            raise CheckpointError(f"{path}: {name} is {entry.dtype}{list(entry.shape)}")
        found.setdefault(match[1], {})[match[2]] = entry
    for module, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"{path}: {module} has lora_{min(pair)} and not the other factor")
    if not found:
        raise CheckpointError(f"{path / WEIGHTS} holds no factors")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _pieces(
    path: pathlib.Path, module: str, a: tensors.Entry, b: tensors.Entry, cfg: Config
) -> list[_Piece]:
    """What a module's factors are to the linears here."""
    layers = model_weights.leaves(dataclasses.replace(cfg, quant=""))["layers"]
    fused = FUSED.fullmatch(module)
    layer, expert, last = (fused[1], None, "") if fused else MODULE.fullmatch(module).groups()
    layer, expert = int(layer), None if expert is None else int(expert)
    rank, inputs, outputs = a.shape[0], a.shape[1], b.shape[0]
    fits = b.shape[1] == rank > 0 and layer < cfg.L
    if fused:  # the experts of a layer in one tensor, gate and up in one
        names = {(cfg.D, 2 * cfg.F): "gate_up_proj", (cfg.F, cfg.D): "down_proj"}
        last = names.get((inputs, outputs), "")
        fits = fits and cfg.E > 0 and rank % cfg.E == 0 and last != ""
        module = f"model.layers.{layer}.mlp.experts.{last}"
    else:
        name = LEAVES.get(last)
        of_expert = cfg.E > 0 and name in model_weights.EXPERTS
        fits = fits and name is not None and of_expert == (expert is not None)
        fits = fits and (expert is None or expert < cfg.E)
        fits = fits and (inputs, outputs) == layers[name].shape[-2:]
    if not fits:
        raise CheckpointError(
            f"{path}: {module} has factors {list(a.shape)} and {list(b.shape)}, which fit nothing in "
            "this base"
        )
    A, B = (tensors.read(entry).astype(np.float32) for entry in (a, b))
    if not fused:
        return [_Piece(module, name, layer, expert, A.T, B.T)]
    A = A.reshape(cfg.E, -1, inputs).swapaxes(1, 2)
    B = B.reshape(outputs, -1, cfg.E).transpose(2, 1, 0)
    if last == "down_proj":
        return [_Piece(module, "w_down", layer, None, A, B)]
    return [
        _Piece(module, "w_gate", layer, None, A, B[..., : cfg.F]),
        _Piece(module, "w_up", layer, None, A, B[..., cfg.F :]),
    ]


def _scale(path: pathlib.Path, piece: _Piece, about: Mapping[str, Any]) -> float:
    """What the product of a piece's factors is multiplied by; CheckpointError where the configuration
    speaks of another rank, or does not target its module."""
    if not _targeted(piece, about):
        raise CheckpointError(
            f"{path} has factors of {piece.module}, which {CONFIG} does not target: PEFT drops them"
        )

    def pattern(kind: str, default: float) -> float:
        for key, value in (about.get(kind) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", piece.module):
                return value
        return default

    rank, asked = piece.a.shape[-1], pattern("rank_pattern", about["r"])
    if rank != asked:
        raise CheckpointError(f"{path}: {piece.module} has rank {rank}, {CONFIG} says {asked}")
    alpha = pattern("alpha_pattern", about["lora_alpha"])
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


def _targeted(piece: _Piece, about: Mapping[str, Any]) -> bool:
    def among(names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, piece.module) is not None
        return any(f".{piece.module}".endswith(f".{name}") for name in names)

    if FUSED.fullmatch(piece.module.rpartition(".")[0]):
        return among(about.get("target_parameters") or [])
    if among(about.get("exclude_modules") or []):
        return False
    targets = about.get("target_modules")
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or among(targets)
    layers = about.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return among(targets or []) and (not layers or piece.layer in layers)
