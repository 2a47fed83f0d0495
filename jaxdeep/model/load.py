"""Checkpoints in the Hugging Face layout: a folder or hub id in, sharded arrays on the mesh; and out.

Loading checks all headers first, then walks the files: each tensor goes to the devices that need it and
into its place there, cast (or quantized) on the way, so that the host never holds much more than one.
Saving walks the same list the other way. Every process of a run does the same steps in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import exchange

NAMES = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "router": "mlp.gate",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
INDEX = "model.safetensors.index.json"
BESIDE = (  # what a checkpoint's folder holds beside its weights, that a tuned copy needs too
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
PUBLISHED = ("*.json", "*.safetensors", "merges.txt", "*.jinja")  # of a hub id, what is used
IN_FLIGHT = 256 * 2**20  # bytes read but perhaps not yet on their device


def folder(name: str, files: Sequence[str] = PUBLISHED) -> pathlib.Path:
    """The local folder of a checkpoint: `name` itself, or the download of these files of that hub id."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder, and no hub id (owner/model) either")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor could it be downloaded from the hub: {error}"
        ) from error


class Part(NamedTuple):
    """One tensor of the published layout: the leaf it belongs to, where in it (nothing, or its layer and
    expert), its published shape, and whether that is the leaf's transposed."""

    leaf: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    flip: bool


def hf_module(name: str, layer: int, expert: int | None = None) -> str:
    """The published name of a layer's module: model.layers.3.mlp.experts.7.gate_proj."""
    inside = NAMES[name] if expert is None else NAMES[name].replace("mlp", f"mlp.experts.{expert}")
    return f"model.layers.{layer}.{inside}"


def parts(cfg: Config, spread: int = 1) -> dict[str, Part]:
    """Every tensor of the published layout. Experts come in groups of `spread`, one from each of so many
    equal shares of them."""
    tree = model_weights.leaves(dataclasses.replace(cfg, quant=""))
    experts = [m * (cfg.E // spread) + j for j in range(cfg.E // spread) for m in range(spread)]
    out = {TOP["embed"]: Part("embed", None, None, tree["embed"].shape, False)}
    for i in range(cfg.L):
        for name, leaf in tree["layers"].items():
            each = experts if cfg.E and name in model_weights.EXPERTS else [None]
            shape = leaf.shape[1:] if each == [None] else leaf.shape[2:]
            for e in each:
                key = f"{hf_module(name, i, e)}.weight"
                out[key] = Part(name, i, e, shape[::-1], len(shape) == 2)
    out[TOP["norm"]] = Part("norm", None, None, tree["norm"].shape, False)
    if not cfg.tie:
        out[TOP["head"]] = Part("head", None, None, tree["head"].shape[::-1], True)
    return out


def _groups(plan: Mapping[str, Part], spread: int) -> Iterator[list[str]]:
    """The names of `plan` in the pieces in which they move: experts `spread` at a time."""
    names = iter(plan)
    for name in names:
        more = 0 if plan[name].expert is None else spread - 1
        yield [name, *itertools.islice(names, more)]


def check(path: pathlib.Path, plan: Mapping[str, Part]) -> dict[str, tensors.Entry]:
    """Where each tensor of `plan` is in the checkpoint, from its headers alone. CheckpointError if a file
    or a tensor is missing, too many, or of another shape or dtype than the model's."""
    index = path / INDEX
    files = {path / "model.safetensors"}
    if index.exists():
        try:
            files = {path / file for file in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a readable index: {error!r}") from error
        missing = sorted(str(file) for file in files if not file.is_file())
        if missing:
            raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
    elif not (path / "model.safetensors").is_file():
        raise CheckpointError(f"{path} holds no model.safetensors and no {INDEX}")
    held: dict[str, tensors.Entry] = {}
    for file in sorted(files):
        held |= tensors.header(file)
    unknown = [
        name
        for name in held.keys() - plan.keys()
        if name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [name for name in plan if name not in held]
    wrong = [name for name in plan if name in held and held[name].dtype not in tensors.DTYPES]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]} is {held[wrong[0]].dtype}, not one of {', '.join(tensors.DTYPES)}: "
            "a quantized checkpoint is not read, take the one it was made from"
        )
    if missing or unknown:
        said = [f"has no tensor {missing[0]} ({len(missing)} are missing)"] if missing else []
        if unknown:
            said.append(f"has {min(unknown)}, which config.json does not speak of")
        raise CheckpointError(f"{path} {' and '.join(said)}: it is not a checkpoint of this model")
    for name, part in plan.items():
        if held[name].shape != part.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {held[name].shape}, config.json asks for {part.shape}"
            )
    return {name: held[name] for name in plan}


def load(name: str, cfg: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The weights of checkpoint `name` (a folder or hub id) on the mesh, in `cfg.dtype`, or with
    `cfg.quant` as int8. Beside them the host holds one tensor (of experts: one a device) and 256 MB."""
    where = model_weights.shardings(cfg, mesh)
    spread = mesh.shape["model"] if cfg.E else 1  # experts are shared out over this axis
    plan = parts(cfg, spread)
    held = check(folder(name), plan)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or cfg.dtype),
        model_weights.leaves(cfg)["layers"],
        is_leaf=model_weights.is_leaf,
    )
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        out_shardings=where["layers"],
    )
    params: dict[str, Any] = {"layers": zeros()}
    pending = 0
    for group in sorted(_groups(plan, spread), key=lambda group: held[group[0]][:2]):
        part, entries = plan[group[0]], [held[key] for key in group]
        if part.layer is None:
            x = _read(entries, part, where[part.leaf], 0)
            params[part.leaf] = _placer(where[part.leaf], cfg.dtype, part.flip)(x)
        else:
            shards = tuple(jax.tree.leaves(where["layers"][part.leaf]))
            x = _read(entries, part, shards[0], 1)
            insert = _inserter(shards, cfg.dtype, part.flip, part.expert is not None)
            slot = (part.expert or 0) % (cfg.E // spread or 1)
            params["layers"][part.leaf] = insert(
                params["layers"][part.leaf], x, np.int32(part.layer), np.int32(slot)
            )
        pending += x.nbytes
        del x
        if pending > IN_FLIGHT:
            jax.block_until_ready(params)
            pending = 0
    return jax.block_until_ready(params)


def _read(
    entries: list[tensors.Entry], part: Part, where: NamedSharding, stacked: int
) -> jax.Array:
    """Tensors as published, each device reading its part by the sharding of their leaf: [out, in], or of
    experts [group, out, in]. `stacked` leading dimensions of the leaf are not theirs."""
    spec = where.spec[stacked:]
    lead, axes = ((), spec) if part.expert is None else (spec[:1], spec[1:])
    sharding = NamedSharding(where.mesh, P(*lead, *(axes[::-1] if part.flip else axes)))

    @functools.cache  # devices that hold the same share one copy of it
    def piece(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        at = [slice(*b) for b in bounds]
        if part.expert is None:
            return tensors.read(entries[0], at)
        return np.stack([tensors.read(entry, at[1:]) for entry in entries[at[0]]])

    shape = part.shape if part.expert is None else (len(entries), *part.shape)

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        return piece(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    dtype = tensors.DTYPES[entries[0].dtype]
    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)


@functools.cache
def _placer(where: NamedSharding, dtype: str, flip: bool) -> Any:
    return jax.jit(lambda x: (x.T if flip else x).astype(dtype), out_shardings=where)


@functools.cache
def _inserter(shards: tuple[NamedSharding, ...], dtype: str, flip: bool, experts: bool) -> Any:
    """insert(leaf, x, layer, slot): the leaf with `x` in its place, in the memory of the old one."""

    def put(leaf: jax.Array, x: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
        if not experts:
            return jax.lax.dynamic_update_index_in_dim(leaf, x.astype(leaf.dtype), layer, 0)
        # [L, E, ...] as [L, group, slot, ...]: each device writes one of the experts it holds
        L, E, *rest = leaf.shape
        split = leaf.reshape(L, len(x), E // len(x), *rest)
        start = (layer, 0, slot, *[0] * len(rest))
        x = x[None, :, None].astype(leaf.dtype)
        return jax.lax.dynamic_update_slice(split, x, start).reshape(leaf.shape)

    def insert(leaf: Any, x: jax.Array, layer: jax.Array, slot: jax.Array) -> Any:
        x = (jnp.swapaxes(x, -1, -2) if flip else x).astype(dtype)
        new = x if len(shards) == 1 else model_weights.quantize(x)
        return jax.tree.map(lambda old, new: put(old, new, layer, slot), leaf, new)

    out = shards[0] if len(shards) == 1 else dict(zip(("q", "scale"), shards, strict=True))
    return jax.jit(insert, donate_argnums=0, out_shardings=out)


def save(
    path: pathlib.Path,
    params: Mapping[str, Any],
    cfg: Config,
    *,
    adapter: Mapping[str, Any] | None = None,
    source: pathlib.Path | None = None,
    beside: Mapping[str, str] | None = None,
    max_shard: int = 5 * 10**9,
    replace: bool = False,
) -> None:
    """Write `params` as a checkpoint in the published layout, in `cfg.dtype`: config.json and one
    model.safetensors, or files of at most `max_shard` bytes and their index.

    An `adapter` is merged on the way, in float32, at `cfg.lora_scale`. `source` is a folder whose tokenizer
    and generation files are copied, `beside` more files by name with their text. The folder appears when it
    is whole; one with content is refused, or with `replace` makes way.
    """
    if any(isinstance(leaf, dict) for leaf in params["layers"].values()):
        raise ConfigError("int8 weights are not written: load the base without model.quant")
    dtype = jnp.dtype(cfg.dtype)
    spread = _spread(params, cfg)
    plan = parts(cfg, spread)
    files, sizes = [[]], [0]
    for group in _groups(plan, spread):
        size = sum(math.prod(plan[key].shape) for key in group) * dtype.itemsize
        if files[-1] and sizes[-1] + size > max_shard:
            files.append([]), sizes.append(0)
        files[-1].append(group)
        sizes[-1] += size

    def arrays(groups: Iterable[list[str]]) -> Iterator[np.ndarray]:
        for group in groups:
            part = plan[group[0]]
            pair = adapter.get(part.leaf) if adapter and part.layer is not None else None
            leaf = params[part.leaf] if part.layer is None else params["layers"][part.leaf]
            slot = (part.expert or 0) % (cfg.E // spread or 1)
            at = () if part.layer is None else (np.int32(part.layer), np.int32(slot))
            x = _take(
                leaf, pair, at, cfg.lora_scale, part.expert is not None, spread, part.flip, dtype
            )
            host = on_host(x)
            yield from host if part.expert is not None else [host]

    writes = jax.process_index() == 0
    place = tensors.fresh(path, replace=replace) if writes else contextlib.nullcontext(path)
    with place as part:
        index = {}
        for n, groups in enumerate(files):
            file = "model.safetensors"
            if len(files) > 1:
                file = f"model-{n + 1:05}-of-{len(files):05}.safetensors"
            shapes = {key: (plan[key].shape, dtype) for group in groups for key in group}
            index |= dict.fromkeys(shapes, file)
            if writes:
                tensors.write(part / file, shapes, arrays(groups))
            else:
                for _ in arrays(groups):  # what is gathered takes part of all
                    pass
        if writes:
            put_beside(part, source, beside)
            config = cfg.to_hf() | ({} if source is None else _tokens(source))
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if len(files) > 1:
                text = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
                (part / INDEX).write_text(json.dumps(text, indent=2) + "\n")


def put_beside(
    target: pathlib.Path, source: pathlib.Path | None, texts: Mapping[str, str] | None
) -> None:
    """Copy the tokenizer and generation files that `source` has, then write `texts` by name."""
    for name in BESIDE:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name, text in (texts or {}).items():
        (target / name).write_text(text, encoding="utf-8")


def _tokens(source: pathlib.Path) -> dict[str, Any]:
    """The entries of a config.json that name control tokens."""
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in config.items() if key.endswith("_token_id")}


def _spread(params: Mapping[str, Any], cfg: Config) -> int:
    """Over how many shares the experts are laid."""
    if not cfg.E:
        return 1
    where = getattr(params["layers"]["w_up"], "sharding", None)
    if not isinstance(where, NamedSharding) or len(where.spec) < 2 or where.spec[1] is None:
        return 1
    return where.mesh.shape[where.spec[1]]


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _take(
    leaf: jax.Array,
    pair: dict[str, jax.Array] | None,
    at: tuple[jax.Array, ...],
    scale: float,
    experts: bool,
    spread: int,
    flip: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """A tensor as published, or of experts a group of them, with the adapter's effect added."""

    def pick(x: jax.Array) -> jax.Array:
        if not at:
            return x
        x = jax.lax.dynamic_index_in_dim(x, at[0], 0, keepdims=False)
        if experts:
            x = x.reshape(spread, -1, *x.shape[1:])
            x = jax.lax.dynamic_index_in_dim(x, at[1], 1, keepdims=False)
        return x

    x = pick(leaf)
    if pair is not None:
        delta = jnp.matmul(pick(pair["a"]), pick(pair["b"]), precision="highest")
        x = x.astype(jnp.float32) + delta * scale
    x = x.astype(dtype)
    return jnp.swapaxes(x, -1, -2) if flip else x


def on_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return exchange.all_gather(x, tiled=True)
