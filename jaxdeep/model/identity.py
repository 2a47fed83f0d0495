"""Which base an adapter belongs to: a name for people, and a hash that another base does not share."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import CheckpointError
from jaxdeep.model import load, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config

FIELDS = ("V", "D", "F", "L", "N", "K", "H", "theta", "eps", "tie", "E", "top_k", "norm_top_k")


class Base(NamedTuple):
    """The name a base was loaded by, and its `identity`."""

    name: str
    identity: str


def identity(params: Mapping[str, Any], cfg: Config) -> str:
    """A short hash of the architecture and of the largest magnitude of each output of each weight.

    It is the same in bfloat16 and float32 and on any mesh: rounding keeps the order of numbers, so the
    largest is the same number, rounded. Its second half covers the linears that `cfg.quant` turns into
    int8, and is absent of such a base.
    """
    layers = dict(params["layers"])
    linears = {name: layers.pop(name) for name in model_weights.LINEARS}
    halves = [{**params, "layers": layers}] + ([] if cfg.quant else [linears])
    return "-".join(_hash(cfg, jax.tree.map(load.on_host, half)) for half in _largest(halves))


def of_files(name: str, cfg: Config) -> str:
    """The first half of the `identity` of checkpoint `name`, read a tensor at a time: most other bases
    show before anything is on a device."""
    plan = load.parts(cfg)
    held = load.check(load.folder(name), plan)
    half: dict[str, Any] = {"layers": collections.defaultdict(list)}
    for key, part in plan.items():
        if part.leaf in model_weights.LINEARS:
            continue
        x = tensors.read(held[key])
        x = x.T if part.flip else x
        if part.layer is None:
            half[part.leaf] = _largest_of(part.leaf, x)
        else:
            half["layers"][part.leaf].append(_largest_of(part.leaf, x[None]))
    half["layers"] = {name: np.concatenate(x) for name, x in half["layers"].items()}
    return _hash(cfg, half)


def _hash(cfg: Config, half: Any) -> str:
    about = json.dumps([getattr(cfg, name) for name in FIELDS]).encode()
    arrays = [x.tobytes() for x in jax.tree.leaves(half)]
    return hashlib.sha256(b"".join([about, *arrays])).hexdigest()[:12]


@jax.jit
def _largest(tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, x: _largest_of(path[-1].key, x), tree)


def _largest_of(name: str, x: Any) -> Any:
    # of layers [L, ..., out] those two stay; of the rest the vocabulary, or the norm's width
    keep = {"embed": {0}, "head": {1}}.get(name, {0, x.ndim - 1})
    axes = tuple(d for d in range(x.ndim) if d not in keep)
    return abs(x).max(axis=axes).astype(jnp.bfloat16)


def check(what: str, theirs: Base | None, ours: Base | None) -> None:
    """CheckpointError where `what` belongs to another base than ours; what is not known passes."""
    if theirs is None or ours is None:
        return
    pairs = zip(theirs.identity.split("-"), ours.identity.split("-"), strict=False)
    if any(a != b for a, b in pairs):
        raise CheckpointError(
            f"{what} belongs to the base {theirs.name} ({theirs.identity}), but this one is "
            f"{ours.name} ({ours.identity}): set model.path to the base it was trained on"
        )
