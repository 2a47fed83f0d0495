"""The layout of published checkpoints: the Hugging Face names and shapes of a model's tensors, and
where they lie in a folder of safetensors files.

A published linear is the transposed of ours, one tensor a layer (and expert), where ours are
stacked.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxdeep.errors import CheckpointError
from jaxdeep.gguf_file import is_gguf
from jaxdeep.model import gguf, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.families import LINEARS

TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
INDEX = "model.safetensors.index.json"
PUBLISHED = ("*.json", "*.safetensors", "merges.txt", "*.jinja")  # what is downloaded of a hub id


def folder(name: str, files: Sequence[str] = PUBLISHED) -> pathlib.Path:
    """The local folder of a checkpoint: `name` itself, or the download of the hub id `name`, of
    which only `files` (patterns) are fetched. A GGUF file is its own folder. CheckpointError if it
    is neither."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder, and no hub id (owner/model) either")
    # a slow import, and most runs read a folder
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor could it be downloaded from the hub: {error}"
        ) from error


class Slot(NamedTuple):
    """The place of a published tensor in our weights: the leaf, the layer and the expert (None
    where the leaf is not stacked by them). `shape` is the published one; `transposed`: it is the
    leaf's turned around."""

    leaf: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    transposed: bool


def names(cfg: Config) -> dict[str, str]:
    """The published name of each of a layer's weights: "self_attn.q_proj.weight"."""
    out = {name: f"{module}.weight" for name, module in cfg.kind.names.items()}
    for linear, module in LINEARS.items():
        out[model_weights.bias_of(linear)] = f"{module}.bias"
    return out


def in_layer(inside: str, layer: int, expert: int | None = None) -> str:
    """The published name of a module or tensor in a layer: model.layers.3.mlp.experts.7.up_proj."""
    if expert is not None:
        inside = inside.replace("mlp", f"mlp.experts.{expert}")
    return f"model.layers.{layer}.{inside}"


def slots(cfg: Config, shards: int = 1) -> dict[str, Slot]:
    """Every tensor of the published layout by its name, layer by layer.

    The experts of a linear are in groups of `shards`, one expert of each shard, where a shard holds
    E / shards consecutive ones: a group is moved at once, so that every device gets (or gives) one.
    """
    tree, published = model_weights.published(cfg), names(cfg)
    per_shard = cfg.E // shards
    experts = [shard * per_shard + i for i in range(per_shard) for shard in range(shards)]
    out = {TOP["embed"]: Slot("embed", None, None, tree["embed"].shape, False)}
    for layer in range(cfg.L):
        for name, leaf in tree["layers"].items():
            stacked = bool(cfg.E) and name in model_weights.EXPERTS
            shape = leaf.shape[2:] if stacked else leaf.shape[1:]
            for expert in experts if stacked else [None]:
                key = in_layer(published[name], layer, expert)
                out[key] = Slot(name, layer, expert, shape[::-1], len(shape) == 2)
    out[TOP["norm"]] = Slot("norm", None, None, tree["norm"].shape, False)
    if not cfg.tie:
        out[TOP["head"]] = Slot("head", None, None, tree["head"].shape[::-1], True)
    return out


def locate(
    path: pathlib.Path, plan: Mapping[str, Slot]
) -> Mapping[str, tensors.Entry | gguf.Entry]:
    """Where each tensor of `plan` lies in the checkpoint at `path`, from the files' headers alone.

    CheckpointError for a missing file, for a tensor that is missing or unknown, and for a shape or
    dtype that is not the model's.
    """
    if is_gguf(path):
        return gguf.locate(path, {name: slot.shape for name, slot in plan.items()})
    entries: dict[str, tensors.Entry] = {}
    for file in _files(path):
        entries |= tensors.header(file)
    quantized = [n for n in plan if n in entries and entries[n].dtype not in tensors.DTYPES]
    if quantized:
        name = quantized[0]
        raise CheckpointError(
            f"{path}: {name} is {entries[name].dtype}, not one of {', '.join(tensors.DTYPES)}: "
            "a quantized checkpoint is not read, take the one it was made from"
        )
    missing = [name for name in plan if name not in entries]
    unknown = [
        name
        for name in entries.keys() - plan.keys()
        # old checkpoints carry rotary frequencies, which are computed here
        if name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq")
    ]
    if missing or unknown:
        reasons = [f"has no tensor {missing[0]} ({len(missing)} are missing)"] if missing else []
        if unknown:
            reasons.append(f"has {min(unknown)}, which config.json does not speak of")
        raise CheckpointError(
            f"{path} {' and '.join(reasons)}: it is not a checkpoint of this model"
        )
    for name, slot in plan.items():
        if entries[name].shape != slot.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {entries[name].shape}, config.json asks for {slot.shape}"
            )
    return {name: entries[name] for name in plan}


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint."""
    index, single = path / INDEX, path / "model.safetensors"
    if not index.exists():
        if not single.is_file():
            raise CheckpointError(f"{path} holds no {single.name} and no {INDEX}")
        return [single]
    try:
        files = {path / file for file in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable index: {error!r}") from error
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
    return sorted(files)
