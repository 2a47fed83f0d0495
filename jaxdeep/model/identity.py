"""Which base an adapter belongs to: a name for people, and a hash that no other base has.

An adapter on the wrong base loads without an error and computes nonsense, so every adapter and
every checkpoint of a run carries its `Base`, and it is checked wherever one is loaded.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import CheckpointError
from jaxdeep.model import layout, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config

FIELDS = ("V", "D", "F", "L", "N", "K", "H", "theta", "eps", "tie", "E", "top_k", "norm_top_k")
"""What of the configuration is hashed: the architecture, and not how it is computed."""
BEYOND = ("family", "biases", "window", "windowed")
"""What is hashed where it is not a plain Qwen3's; and the scaling of rotary frequencies, if any."""


class Base(NamedTuple):
    """The name that a base was loaded by, and its hash: `identity` of its weights, followed for an
    adapter over other frozen adapters by "+" and the hash of those (`lora.base_over`)."""

    name: str
    identity: str


def identity(params: Mapping[str, Any], cfg: Config) -> str:
    """A short hash of the architecture and of the largest magnitude of each output of each weight.

    It is the same in bfloat16 and float32 and on any mesh: rounding keeps the order of numbers, so
    the largest magnitude rounds to the same number. It has two halves, "aaa-bbb", of which the
    second covers the linears that `cfg.quant` turns into int8. A quantized base has the first half
    alone.
    """
    layers = dict(params["layers"])
    linears = {name: layers.pop(name) for name in model_weights.LINEARS}
    halves = [{**params, "layers": layers}] + ([] if cfg.quant else [linears])
    return "-".join(_hash_half(cfg, jax.tree.map(tensors.on_host, x)) for x in _largest(halves))


def of_files(name: str, cfg: Config) -> str:
    """The first half of the `identity` of checkpoint `name`, read from its files a tensor at a
    time: it tells most bases apart before anything is on a device."""
    plan = layout.slots(cfg)
    entries = layout.locate(layout.folder(name), plan)
    half: dict[str, Any] = {"layers": collections.defaultdict(list)}
    for key, slot in plan.items():
        if slot.leaf in model_weights.LINEARS:
            continue
        x = entries[key].read()
        x = x.T if slot.transposed else x
        if slot.layer is None:
            half[slot.leaf] = _largest_of(slot.leaf, x)
        else:
            half["layers"][slot.leaf].append(_largest_of(slot.leaf, x[None]))
    half["layers"] = {name: np.concatenate(x) for name, x in half["layers"].items()}
    return _hash_half(cfg, half)


def digest(parts: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits of a hash."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _hash_half(cfg: Config, half: Any) -> str:
    about = [getattr(cfg, name) for name in FIELDS]
    plain = {field.name: field.default for field in dataclasses.fields(Config)}
    beyond = {name: getattr(cfg, name) for name in BEYOND if getattr(cfg, name) != plain[name]}
    if cfg.scaling is not None:
        beyond["scaling"] = cfg.scaling.to_hf()
    about += [beyond] if beyond else []
    return digest([json.dumps(about).encode(), *(x.tobytes() for x in jax.tree.leaves(half))])


@jax.jit
def _largest(tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, x: _largest_of(path[-1].key, x), tree)


def _largest_of(name: str, x: Any) -> Any:
    # layers [L, ..., out] keep those two dimensions; others keep the vocabulary, or the norm's
    # width
    keep = {"embed": {0}, "head": {1}}.get(name, {0, x.ndim - 1})
    axes = tuple(d for d in range(x.ndim) if d not in keep)
    return abs(x).max(axis=axes).astype(jnp.bfloat16)


def check(what: str, theirs: Base | None, ours: Base | None) -> None:
    """CheckpointError if `what` belongs to another base than ours, or lies over other frozen
    adapters. An unknown base passes, and so does a half of a hash that only one of them has."""
    if theirs is None or ours is None:
        return
    (their_weights, _, their_under), (our_weights, _, our_under) = (
        base.identity.partition("+") for base in (theirs, ours)
    )
    halves = zip(their_weights.split("-"), our_weights.split("-"), strict=False)
    if any(a != b for a, b in halves):
        raise CheckpointError(
            f"{what} belongs to the base {theirs.name} ({theirs.identity}), but this one is "
            f"{ours.name} ({ours.identity}): set model.path to the base it was trained on"
        )
    if their_under != our_under:
        raise CheckpointError(
            f"{what} was trained over {theirs.name} ({theirs.identity}), but this run is over "
            f"{ours.name} ({ours.identity}): set lora.under to the adapters it was trained over"
        )
