"""Adapters in PEFT's layout, out and in: adapter_config.json and adapter_model.safetensors.

PEFT can give each module a rank and an alpha of its own. What is read is folded into our one form,
all linears of one rank and one scale: smaller factors are padded with zeros, other scales are
multiplied into `b`, modules without factors get zeros. What does not fit this form is refused by
name. `jaxdeep.json` in the folder says which base the adapter belongs to.
"""

from __future__ import annotations

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
from jaxdeep.model.families import LINEARS
from jaxdeep.model.identity import Base
from jaxdeep.model.layout import in_layer
from jaxdeep.model.load import put_beside
from jaxdeep.model.lora import Adapter
from jaxdeep.model.tensors import on_host

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "jaxdeep.json"
PREFIX = "base_model.model."
TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp(?:\.experts\.(\d+))?)\.(\w+)")
FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts(?:\.base_layer)*")
READ = (  # settings that are honoured here
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform"),
    "init_lora_weights",
)
HARMLESS = (  # and those that change nothing of what an adapter computes once it is trained
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "layers_pattern", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("qalora_group_size", "ensure_weight_tying"),
)
"""Every other setting that is not empty is refused by name: with it an adapter computes something
else than `x @ a @ b * scale`, such as with use_dora, modules_to_save or lora_bias."""
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the initial adapter from the base's weights."""


def save(
    path: pathlib.Path,
    adapter: Adapter,
    cfg: Config,
    *,
    source: pathlib.Path | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter as a folder that PEFT loads onto the published base `adapter.base`, with
    the files of `source` and `beside` as in `load.save`. A folder with content is refused.

    Factors of experts are written for each expert. PEFT, which fuses experts, needs all three of
    their linears: those without an adapter get one of zeros.
    """
    if adapter.base is None:
        raise ValueError("an adapter is written with its base, which is not known here")
    spec, factors = adapter.config, adapter.factors
    targets = list(spec.targets)
    if cfg.E and set(model_weights.EXPERTS) & set(targets):
        targets = [n for n in model_weights.LINEARS if n in targets or n in model_weights.EXPERTS]
    plan = _plan(cfg, spec, targets)

    def arrays() -> Iterator[np.ndarray]:
        # a layer is fetched once for all of its experts
        fetched, layer = None, {}
        for shape, name, key, i, expert in plan.values():
            if name not in factors:
                yield np.zeros(shape, np.float32)
                continue
            if fetched != (name, i):
                fetched = (name, i)
                layer = {
                    k: on_host(jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False))
                    for k, x in factors[name].items()
                }
            x = layer[key] if expert is None else layer[key][expert]
            yield np.asarray(x, np.float32).T

    if jax.process_index():
        for _ in arrays():  # gathering needs every process
            pass
        return
    with tensors.fresh(path) as folder:
        dtype = np.dtype(np.float32)
        tensors.write(folder / WEIGHTS, {k: (v[0], dtype) for k, v in plan.items()}, arrays())
        about = _about(spec, targets, adapter.base)
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
        base = {"base": adapter.base._asdict()}
        (folder / BASE).write_text(json.dumps(base, indent=2) + "\n")
        put_beside(folder, source, beside)


def _plan(cfg: Config, spec: lora.LoraConfig, targets: list[str]) -> dict[str, tuple]:
    """By name of a tensor to write: its shape, linear, factor ("a" or "b"), layer, expert."""
    shapes = lora.leaves(cfg, lora.LoraConfig(spec.rank, spec.alpha, tuple(targets)))
    plan = {}
    for name in targets:
        experts = range(cfg.E) if cfg.E and name in model_weights.EXPERTS else (None,)
        for i in range(cfg.L):
            for expert in experts:
                for key, factor in (("a", "lora_A"), ("b", "lora_B")):
                    *_, rows, columns = shapes[name][key].shape
                    full = f"{PREFIX}{in_layer(LINEARS[name], i, expert)}.{factor}.weight"
                    plan[full] = ((columns, rows), name, key, i, expert)
    return plan


def _about(spec: lora.LoraConfig, targets: list[str], base: Base) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": [LINEARS[name].rpartition(".")[2] for name in targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


class _Piece(NamedTuple):
    """The factors of one linear of one layer: `a` [in, r] and `b` [r, out] of one expert, or of all
    of them (expert None, with a leading E). `module` is its name in the configuration."""

    module: str
    leaf: str
    layer: int
    expert: int | None
    a: np.ndarray
    b: np.ndarray


def base_in(path: pathlib.Path) -> Base | None:
    """The base that the adapter in a folder names as its own; None if the folder does not say."""
    if not (path / BASE).exists():
        return None
    return Base(**json.loads((path / BASE).read_text())["base"])


def load(path: pathlib.Path, cfg: Config, base: Base | None = None) -> Adapter:
    """The adapter in a PEFT folder, on the host, for a base of this architecture. Its rank is the
    largest of any module.

    CheckpointError names a setting or a tensor that does not fit, and both bases where the adapter
    says that it belongs to another one than `base`.
    """
    about = _config(path)
    theirs = base_in(path)
    identity.check(f"the adapter in {path}", theirs, base)
    pieces = []
    for module, pair in _pairs(path).items():
        pieces += _pieces(path, module, *pair, cfg)
    # zeros are no adapter: `save` writes them for experts' linears that have none
    pieces = [piece for piece in pieces if piece.a.any() or piece.b.any()] or pieces
    scales = [_scale(path, piece, about) for piece in pieces]
    # a scale of zero is no adapter, either
    kept = [(piece, scale) for piece, scale in zip(pieces, scales, strict=True) if scale]
    if not kept:
        raise CheckpointError(
            f"{path}: lora_alpha={about['lora_alpha']} scales every factor to zero, so this "
            f"adapter changes nothing: set lora_alpha in {CONFIG} to what it was trained with"
        )
    pieces, scales = zip(*kept, strict=True)
    leaves = {piece.leaf for piece in pieces}
    targets = tuple(name for name in model_weights.LINEARS if name in leaves)
    rank = max(piece.a.shape[-1] for piece in pieces)
    factors = {
        name: {key: np.zeros(leaf.shape, np.float32) for key, leaf in pair.items()}
        for name, pair in lora.leaves(cfg, lora.LoraConfig(rank, 1.0, targets)).items()
    }
    for piece, scale in zip(pieces, scales, strict=True):
        index = (piece.layer,) if piece.expert is None else (piece.layer, piece.expert)
        r = piece.a.shape[-1]
        factors[piece.leaf]["a"][index][..., :r] = piece.a
        factors[piece.leaf]["b"][index][..., :r, :] = piece.b * np.float32(scale / scales[0])
    return Adapter(factors, float(scales[0]), theirs)


def _config(path: pathlib.Path) -> dict[str, Any]:
    """The content of adapter_config.json, if it describes plain LoRA."""
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
    known = (*READ, *HARMLESS)
    wrong = [f"{name}={value!r}" for name, value in about.items() if value and name not in known]
    wrong += [f"bias={bias!r}"] if bias != "none" else []
    initial = about.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(BASE_CHANGING):
        wrong.append(f"init_lora_weights={initial!r}")
    if wrong:
        raise CheckpointError(f"{path} is more than two factors a linear: {', '.join(wrong)}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(about.get(name) or {}, dict):
            raise CheckpointError(f"{path}: {name}={about[name]!r} is not a dictionary")
    numbers = {"r": about["r"], "lora_alpha": about["lora_alpha"]}
    for kind in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{kind}[{key!r}]": value for key, value in (about.get(kind) or {}).items()}
    for name, value in numbers.items():
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not math.isfinite(value):
            raise CheckpointError(f"{path}: {name}={value!r} in {CONFIG} is not a number")
    return about


def _pairs(path: pathlib.Path) -> dict[str, tuple[tensors.Entry, tensors.Entry]]:
    """The entries of both factors of each module, by the module's name."""
    if not (path / WEIGHTS).exists():
        raise CheckpointError(f"{path} holds no {WEIGHTS}: save the adapter as safetensors")
    pairs: dict[str, dict[str, tensors.Entry]] = {}
    for name, entry in tensors.header(path / WEIGHTS).items():
        match = TENSOR.fullmatch(name)
        if not match or not (MODULE.fullmatch(match[1]) or FUSED.fullmatch(match[1])):
            raise CheckpointError(f"{path}: the tensor {name} is no factor of a linear")
        if entry.dtype not in tensors.DTYPES or len(entry.shape) != 2:
            raise CheckpointError(
                f"{path}: {name} is {entry.dtype}{list(entry.shape)}, and a factor has two "
                f"dimensions and one of the types {', '.join(tensors.DTYPES)}: save the adapter "
                "in float32"
            )
        pairs.setdefault(match[1], {})[match[2]] = entry
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise CheckpointError(f"{path}: {module} has lora_{min(pair)} and not the other factor")
    if not pairs:
        raise CheckpointError(f"{path / WEIGHTS} holds no factors")
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def _pieces(
    path: pathlib.Path, module: str, a: tensors.Entry, b: tensors.Entry, cfg: Config
) -> list[_Piece]:
    """The factors of a module as those of our linears. PEFT fuses the experts of a layer: gate and
    up are one module, and the ranks of all experts are one dimension, in A expert by expert, in B
    rank by rank."""
    layers = model_weights.published(cfg)["layers"]
    fused = FUSED.fullmatch(module)
    layer, expert, last = (fused[1], None, "") if fused else MODULE.fullmatch(module).groups()
    layer, expert = int(layer), None if expert is None else int(expert)
    rank, inputs, outputs = a.shape[0], a.shape[1], b.shape[0]
    fits = b.shape[1] == rank > 0 and layer < cfg.L
    if fused:
        names = {(cfg.D, 2 * cfg.F): "gate_up_proj", (cfg.F, cfg.D): "down_proj"}
        last = names.get((inputs, outputs), "")
        fits = fits and cfg.E > 0 and rank % cfg.E == 0 and last != ""
        module = f"model.layers.{layer}.mlp.experts.{last}"
    else:
        name = lora.LINEAR_OF.get(last)
        of_expert = cfg.E > 0 and name in model_weights.EXPERTS
        fits = fits and name is not None and of_expert == (expert is not None)
        fits = fits and (expert is None or expert < cfg.E)
        fits = fits and (inputs, outputs) == layers[name].shape[-2:]
    if not fits:
        raise CheckpointError(
            f"{path}: {module} has factors {list(a.shape)} and {list(b.shape)}, which fit nothing "
            "in this base"
        )
    A, B = (entry.read().astype(np.float32) for entry in (a, b))
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
    """The scale of a piece. CheckpointError if the configuration says another rank, or does not
    target the module."""
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
    """Whether PEFT would create the module that this piece belongs to."""

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
