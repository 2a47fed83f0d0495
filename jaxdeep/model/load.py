"""Checkpoints in the Hugging Face layout: a folder or hub id to sharded arrays on the mesh, and
back.

Loading checks the headers of all files first, then reads one tensor at a time: each device gets its
shard, cast (or quantized) on the way, so that the host never holds much more than one tensor.
Saving goes through the same list the other way. Every process of a run takes the same steps in the
same order, since gathering an array needs all of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.errors import ConfigError
from jaxdeep.model import gguf, layout, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.layout import Slot
from jaxdeep.model.lora import Adapter
from jaxdeep.model.tensors import on_host

BESIDE = (  # the files beside the weights that a tuned copy needs too
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
IN_FLIGHT = 256 * 2**20  # bytes read that may still be on their way to a device


def load(name: str, cfg: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The weights of checkpoint `name` (a folder, a GGUF file or a hub id) on the mesh, in
    `cfg.dtype`, or with `cfg.quant` as int8. The host holds at most one tensor (of experts: one a
    device) and 256 MB."""
    shardings = model_weights.shardings(cfg, mesh)
    shards = mesh.shape["model"] if cfg.E else 1  # experts are sharded over this axis
    plan = layout.slots(cfg, shards)
    entries = layout.locate(layout.folder(name), plan)
    params: dict[str, Any] = {"layers": _zeros(cfg, shardings["layers"])}
    pending = 0
    # in the order of the files, which is not that of the layers
    places = {key: (entry.file, entry.start) for key, entry in entries.items()}
    for group in sorted(_groups(plan, shards), key=lambda group: places[group[0]]):
        slot, group_entries = plan[group[0]], [entries[key] for key in group]
        if slot.layer is None:
            sharding = shardings[slot.leaf]
            x = _read(group_entries, slot, sharding, 0)
            params[slot.leaf] = _placer(sharding, cfg.dtype, slot.transposed)(x)
        else:
            leaf_shardings = tuple(jax.tree.leaves(shardings["layers"][slot.leaf]))
            x = _read(group_entries, slot, leaf_shardings[0], 1)
            insert = _inserter(leaf_shardings, cfg.dtype, slot.transposed, slot.expert is not None)
            params["layers"][slot.leaf] = insert(
                params["layers"][slot.leaf], x, *_indices(slot, cfg, shards)
            )
        pending += x.nbytes
        del x
        if pending > IN_FLIGHT:
            # transfers are asynchronous: without waiting, the host would hold the whole checkpoint
            jax.block_until_ready(params)
            pending = 0
    return jax.block_until_ready(params)


def _zeros(cfg: Config, shardings: Any) -> Any:
    """The stacked layers, to be filled."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or cfg.dtype),
        model_weights.leaves(cfg)["layers"],
        is_leaf=model_weights.is_leaf,
    )
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        out_shardings=shardings,
    )
    return zeros()


def _groups(plan: Mapping[str, Slot], shards: int) -> Iterator[list[str]]:
    """The names of `plan` in groups that move at once: experts `shards` at a time, others alone."""
    names = iter(plan)
    for name in names:
        more = 0 if plan[name].expert is None else shards - 1
        yield [name, *itertools.islice(names, more)]


def _indices(slot: Slot, cfg: Config, shards: int) -> tuple[np.int32, np.int32]:
    """The layer of a group, and the place of its experts in each shard. As arrays they are data:
    one program serves all layers."""
    per_shard = cfg.E // shards or 1
    return np.int32(slot.layer), np.int32((slot.expert or 0) % per_shard)


def _read(
    entries: list[tensors.Entry | gguf.Entry], slot: Slot, sharding: NamedSharding, stacked: int
) -> jax.Array:
    """Tensors as published: [out, in], or of experts [group, out, in]. Each device reads its own
    part, by the sharding of the leaf, whose first `stacked` dimensions the tensors do not have."""
    spec = sharding.spec[stacked:]
    lead, axes = ((), spec) if slot.expert is None else (spec[:1], spec[1:])
    published = NamedSharding(sharding.mesh, P(*lead, *(axes[::-1] if slot.transposed else axes)))

    @functools.cache  # devices that hold the same part share one copy of it
    def piece(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        slices = [slice(*b) for b in bounds]
        if slot.expert is None:
            return entries[0].read(slices)
        return np.stack([entry.read(slices[1:]) for entry in entries[slices[0]]])

    shape = slot.shape if slot.expert is None else (len(entries), *slot.shape)

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        return piece(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    dtype = entries[0].read_as
    return jax.make_array_from_callback(shape, published, callback, dtype=dtype)


@functools.cache
def _placer(sharding: NamedSharding, dtype: str, transposed: bool) -> Any:
    return jax.jit(lambda x: (x.T if transposed else x).astype(dtype), out_shardings=sharding)


@functools.cache
def _inserter(
    shardings: tuple[NamedSharding, ...], dtype: str, transposed: bool, experts: bool
) -> Any:
    """insert(leaf, x, layer, place): the stacked leaf with `x` written into it, donated and so in
    place. Two shardings are those of an int8 leaf and its scales."""

    def write(leaf: jax.Array, x: jax.Array, layer: jax.Array, place: jax.Array) -> jax.Array:
        if not experts:
            return jax.lax.dynamic_update_index_in_dim(leaf, x.astype(leaf.dtype), layer, 0)
        # [L, E, ...] as [L, shard, place, ...]: each device writes one of the experts it holds, and
        # nothing is sent between devices
        L, E, *rest = leaf.shape
        split = leaf.reshape(L, len(x), E // len(x), *rest)
        start = (layer, 0, place, *[0] * len(rest))
        x = x[None, :, None].astype(leaf.dtype)
        return jax.lax.dynamic_update_slice(split, x, start).reshape(leaf.shape)

    def insert(leaf: Any, x: jax.Array, layer: jax.Array, place: jax.Array) -> Any:
        x = (jnp.swapaxes(x, -1, -2) if transposed else x).astype(dtype)
        new = x if len(shardings) == 1 else model_weights.quantize(x)
        return jax.tree.map(lambda old, new: write(old, new, layer, place), leaf, new)

    out = shardings[0] if len(shardings) == 1 else dict(zip(("q", "scale"), shardings, strict=True))
    return jax.jit(insert, donate_argnums=0, out_shardings=out)


class Published:
    """The weights as published tensors: their places in `plan` by name, and their arrays on the
    host. An `adapter` is merged on the way, in float32; then they are cast to `dtype`."""

    def __init__(
        self, params: Mapping[str, Any], cfg: Config, adapter: Adapter | None, dtype: np.dtype
    ) -> None:
        if any(isinstance(leaf, dict) for leaf in params["layers"].values()):
            raise ConfigError("int8 weights are not written: load the base without model.quant")
        self.params, self.cfg, self.adapter, self.dtype = params, cfg, adapter, dtype
        self.shards = _expert_shards(params, cfg)
        self.plan = layout.slots(cfg, self.shards)

    def arrays(self, groups: Iterable[list[str]]) -> Iterator[np.ndarray]:
        """The arrays of these groups of names, a group at a time. Every process must draw all of
        them."""
        for group in groups:
            slot = self.plan[group[0]]
            in_layer, experts = slot.layer is not None, slot.expert is not None
            pair = self.adapter.factors.get(slot.leaf) if self.adapter and in_layer else None
            leaf = (self.params["layers"] if in_layer else self.params)[slot.leaf]
            indices = _indices(slot, self.cfg, self.shards) if in_layer else ()
            scale = np.float32(self.adapter.scale if self.adapter else 0)
            how = experts, self.shards, slot.transposed, self.dtype
            host = on_host(_take(leaf, pair, scale, indices, *how))
            yield from host if experts else [host]


def save_gguf(
    path: pathlib.Path,
    params: Mapping[str, Any],
    cfg: Config,
    *,
    kind: str,
    adapter: Adapter | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    template: str = "",
) -> None:
    """Write `params` as one GGUF file, matrices as `kind` ("F16", "Q8_0"); `adapter` as for `save`,
    the rest as for `gguf.write`. The file appears when it is complete; one that exists is
    refused."""
    published = Published(params, cfg, adapter, np.dtype(np.float32))
    groups = list(_groups(published.plan, published.shards))
    shapes = {key: published.plan[key].shape for group in groups for key in group}
    arrays = published.arrays(groups)
    if jax.process_index():
        for _ in arrays:  # gathering needs every process
            pass
        return
    tensors.refuse_used(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    how = dict(kind=kind, tokenizer=tokenizer, template=template, name=path.stem)
    try:
        gguf.write(partial, cfg.to_hf(), shapes, arrays, **how)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save(
    path: pathlib.Path,
    params: Mapping[str, Any],
    cfg: Config,
    *,
    adapter: Adapter | None = None,
    source: pathlib.Path | None = None,
    beside: Mapping[str, str] | None = None,
    max_shard: int = 5 * 10**9,
    replace: bool = False,
) -> None:
    """Write `params` as a checkpoint in the published layout, in `cfg.dtype`: config.json and one
    model.safetensors, or files of at most `max_shard` bytes with their index.

    An `adapter` is merged on the way, in float32. `source` is a folder whose tokenizer and
    generation files are copied; `beside` is the text of more files by name. The folder appears when
    it is complete. A folder that exists and is not empty is refused, or with `replace` replaced.
    """
    dtype = jnp.dtype(cfg.dtype)
    published = Published(params, cfg, adapter, dtype)
    plan, shards = published.plan, published.shards
    files, total = _files(plan, shards, dtype, max_shard)
    writes = jax.process_index() == 0
    target = tensors.fresh(path, replace=replace) if writes else contextlib.nullcontext(path)
    with target as folder:
        index = {}
        for n, groups in enumerate(files):
            file = "model.safetensors"
            if len(files) > 1:
                file = f"model-{n + 1:05}-of-{len(files):05}.safetensors"
            shapes = {key: (plan[key].shape, dtype) for group in groups for key in group}
            index |= dict.fromkeys(shapes, file)
            if writes:
                tensors.write(folder / file, shapes, published.arrays(groups))
            else:
                for _ in published.arrays(groups):  # gathering needs every process
                    pass
        if writes:
            put_beside(folder, source, beside)
            config = cfg.to_hf() | ({} if source is None else _control_tokens(source))
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if len(files) > 1:
                text = {"metadata": {"total_size": total}, "weight_map": index}
                (folder / layout.INDEX).write_text(json.dumps(text, indent=2) + "\n")


def _files(
    plan: Mapping[str, Slot], shards: int, dtype: np.dtype, max_shard: int
) -> tuple[list[list[list[str]]], int]:
    """The groups of tensors of each file, none over `max_shard` bytes if a group is not, and the
    bytes of all."""
    files, size, total = [[]], 0, 0
    for group in _groups(plan, shards):
        more = sum(math.prod(plan[key].shape) for key in group) * dtype.itemsize
        if files[-1] and size + more > max_shard:
            files.append([])
            size = 0
        files[-1].append(group)
        size, total = size + more, total + more
    return files, total


def put_beside(
    target: pathlib.Path, source: pathlib.Path | None, texts: Mapping[str, str] | None
) -> None:
    """Copy the tokenizer and generation files that `source` has, then write `texts` by name."""
    for name in BESIDE:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name, text in (texts or {}).items():
        (target / name).write_text(text, encoding="utf-8")


def _control_tokens(source: pathlib.Path) -> dict[str, Any]:
    """The entries of a config.json that name control tokens, which `Config.to_hf` does not know."""
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in config.items() if key.endswith("_token_id")}


def _expert_shards(params: Mapping[str, Any], cfg: Config) -> int:
    """How many shards the experts lie in."""
    if not cfg.E:
        return 1
    sharding = getattr(params["layers"]["w_up"], "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) < 2:
        return 1
    axis = sharding.spec[1]
    return 1 if axis is None else sharding.mesh.shape[axis]


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _take(
    leaf: jax.Array,
    pair: dict[str, jax.Array] | None,
    scale: jax.Array,
    indices: tuple[jax.Array, ...],
    experts: bool,
    shards: int,
    transposed: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """A tensor as published, or a group of them for experts, with an adapter's effect added."""

    def pick(x: jax.Array) -> jax.Array:
        if not indices:
            return x
        layer, place = indices
        x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        if experts:
            x = x.reshape(shards, -1, *x.shape[1:])
            x = jax.lax.dynamic_index_in_dim(x, place, 1, keepdims=False)
        return x

    x = pick(leaf)
    if pair is not None:
        delta = jnp.matmul(pick(pair["a"]), pick(pair["b"]), precision="highest")
        x = x.astype(jnp.float32) + delta * scale
    x = x.astype(dtype)
    return jnp.swapaxes(x, -1, -2) if transposed else x
