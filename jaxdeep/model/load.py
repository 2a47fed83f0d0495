"""Checkpoints in the Hugging Face layout: a folder or hub id in, sharded arrays on the mesh; and out.

Each device's part of each weight is read from the safetensors files by itself: nothing is assembled
on the host that no device asked for.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxdeep.errors import CheckpointError
from jaxdeep.model import arch

NAMES = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def folder(name: str) -> pathlib.Path:
    """The local folder of a checkpoint: `name` itself, or the download of that hub id."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder, and no hub id (owner/model) either")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor could it be downloaded from the hub: {error}"
        ) from error


def files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Which file of the checkpoint holds each tensor; a missing or unreadable file is an error."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        held = {tensor: path / file for tensor, file in names.items()}
        missing = sorted({str(file) for file in held.values() if not file.exists()})
        if missing:
            raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
        return held
    single = path / "model.safetensors"
    if not single.exists():
        raise CheckpointError(
            f"{path} holds no model.safetensors and no model.safetensors.index.json"
        )
    return dict.fromkeys(_open(single).keys(), single)


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def load(name: str, cfg: arch.Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The weights of checkpoint `name` (a folder or hub id) on the mesh, in `cfg.dtype`."""
    path = folder(name)
    held = files(path)
    opened = {file: _open(file) for file in set(held.values())}

    def tensor(key: str, shape: tuple[int, ...]) -> Any:
        if key not in held:
            raise CheckpointError(
                f"{path} has no tensor {key}: it is not a checkpoint of this model"
            )
        part = opened[held[key]].get_slice(key)
        if tuple(part.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(part.get_shape())}, config.json asks for {shape}"
            )
        return part

    def read(name: str, leaf: arch.Leaf) -> Callable[[tuple[slice, ...]], np.ndarray]:
        if name in TOP:
            flip = name == "head"
            part = tensor(TOP[name], leaf.shape[::-1] if flip else leaf.shape)
            return lambda at: part[at[::-1]].T if flip else part[at]
        shape, flip = leaf.shape[1:], len(leaf.shape) == 3
        parts = [
            tensor(f"model.layers.{i}.{NAMES[name]}.weight", shape[::-1] if flip else shape)
            for i in range(leaf.shape[0])
        ]
        return lambda at: np.stack([p[at[:0:-1]].T if flip else p[at[1:]] for p in parts[at[0]]])

    dtype = jnp.dtype(cfg.dtype)
    tree, where = arch.leaves(cfg), arch.shardings(cfg, mesh)

    def place(path_keys: tuple, leaf: arch.Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        get = read(path_keys[-1].key, leaf)

        def callback(index: tuple[slice, ...]) -> np.ndarray:
            # open slices: safetensors wants both ends
            at = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
            return get(at).astype(dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, callback)

    return jax.tree_util.tree_map_with_path(place, tree, where, is_leaf=arch.is_leaf)


def save(path: pathlib.Path, params: Mapping[str, Any], cfg: arch.Config) -> None:
    """Write `params` as one model.safetensors with its config.json; `load` reads it back equal."""
    tensors = {}
    for name, leaf in params.items():
        if name != "layers":
            array = np.asarray(leaf)
            tensors[TOP[name]] = np.ascontiguousarray(array.T if name == "head" else array)
    for name, leaf in params["layers"].items():
        for i, array in enumerate(np.asarray(leaf)):
            key = f"model.layers.{i}.{NAMES[name]}.weight"
            tensors[key] = np.ascontiguousarray(array.T if array.ndim == 2 else array)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(cfg.to_hf(), indent=2) + "\n")
