"""Which base an adapter belongs to: a name for people, and a hash that another base does not share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdeep.errors import CheckpointError
from jaxdeep.model import arch, load

FIELDS = ("V", "D", "F", "L", "N", "K", "H", "theta", "eps", "tie", "E", "top_k", "norm_top_k")


class Base(NamedTuple):
    """The name a base was loaded by, and its `identity`."""

    name: str
    identity: str


def identity(params: Mapping[str, Any], cfg: arch.Config) -> str:
    """A short hash of the architecture and of the largest magnitude of each output of each weight.

    It is the same in bfloat16 and float32 and on any mesh: rounding keeps the order of numbers, so the
    largest is the same number, rounded. Its second half covers the linears that `cfg.quant` turns into
    int8, and is absent of such a base.
    """
    layers = dict(params["layers"])
    linears = {name: layers.pop(name) for name in arch.LINEARS}
    halves = [{**params, "layers": layers}] + ([] if cfg.quant else [linears])
    about = json.dumps([getattr(cfg, name) for name in FIELDS]).encode()
    hashes = []
    for half in _largest(halves):
        arrays = [load.on_host(x).tobytes() for x in jax.tree.leaves(half)]
        hashes.append(hashlib.sha256(b"".join([about, *arrays])).hexdigest()[:12])
    return "-".join(hashes)


@jax.jit
def _largest(tree: Any) -> Any:
    def one(path: tuple, x: jax.Array) -> jax.Array:
        # of layers [L, ..., out] those two stay; of the rest the vocabulary, or the norm's width
        keep = {"embed": {0}, "head": {1}}.get(path[-1].key, {0, x.ndim - 1})
        axes = [d for d in range(x.ndim) if d not in keep]
        return jnp.max(jnp.abs(x), axis=axes).astype(jnp.bfloat16)

    return jax.tree.map_with_path(one, tree)


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
