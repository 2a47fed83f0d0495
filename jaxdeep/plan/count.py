"""The floating-point operations of a program, counted from its jaxpr: a loop's body as often as it runs,
what `shard_map` does on all of its devices, custom kernels by their own formula. A multiplication and
its addition are two; only products of matrices count (as in arXiv 2204.02311).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.interpreters import partial_eval

SPLASH = {"splash_mha_fwd": 4, "splash_mha_dq": 6, "splash_mha_dkv": 8}
"""FLOPs of the kernels of splash attention for a pair of positions and a number of a head's width: two
products forward, three for the gradient of queries, four for that of keys and values; the last two
compute the scores again."""


class Flops(NamedTuple):
    """`matmuls` are XLA's and `kernels` those of Pallas, over all devices; `read` are the bytes of pages
    that the sampler's kernel reads."""

    matmuls: float = 0.0
    kernels: float = 0.0
    read: float = 0.0

    def plus(self, other: Flops) -> Flops:
        """Both."""
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> Flops:
        """So many of the same."""
        return Flops(*(n * a for a in self))


class Known(NamedTuple):
    """What a program does not say: how often a loop of no fixed length runs, how many tokens a row of the
    sampler holds, of how many experts a device may hold a part, and the share of their blocks that is
    computed."""

    trips: int = 1
    held: float = 0.0
    experts: int = 0
    live: float = 1.0


NOTHING = Known()


def flops(closed: Any, known: Known = NOTHING) -> Flops:
    """What a closed jaxpr computes of what it returns; what nobody asks for the compiler drops."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _inside(jaxpr, known)


def _inside(jaxpr: Any, known: Known) -> Flops:
    total = Flops()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total = total.plus(_equation(eqn, known))
    return total


def _equation(eqn: Any, known: Known) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    shapes = [x.aval.shape for x in eqn.invars if hasattr(x.aval, "shape")]
    if name == "dot_general":
        (inner, _), _ = params["dimension_numbers"]
        out = math.prod(eqn.outvars[0].aval.shape)
        return Flops(2 * out * math.prod(shapes[0][i] for i in inner))
    if name.startswith("ragged_dot"):
        # [rows, in] x [experts, in, out], or for the gradient of those [rows, in] x [rows, out]
        (rows, inputs), other = shapes[0], shapes[1]
        held = other[0] if len(other) == 3 else eqn.outvars[0].aval.shape[0]
        outputs = math.prod(other[1:]) // inputs if len(other) == 3 else other[1]
        return Flops(2 * rows * inputs * outputs * held / (known.experts or held))
    if name == "pallas_call":
        return _kernel(eqn, shapes, known)
    inside = [_inside(inner, known) for inner in _jaxprs(params)]
    if name == "cond":
        return max(inside, key=lambda found: found.matmuls + found.kernels)
    whole = Flops()
    for found in inside:
        whole = whole.plus(found)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "while":
        times = known.trips
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return whole.times(times)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield inner


def _kernel(eqn: Any, shapes: list[tuple[int, ...]], known: Known) -> Flops:
    name = eqn.params["name"]
    for kernel, per in SPLASH.items():
        if name.startswith(kernel):
            # after two tables of blocks: queries [..., t, H], keys [..., S, H]; half of the blocks and
            # the rest of those on the diagonal
            queries, S = shapes[2], shapes[3][-2]
            block = eqn.params["grid_mapping"].block_mappings[2].block_shape[-2].block_size
            return Flops(kernels=per * math.prod(queries) * (S + block) / 2)
    if name.startswith("ragged_paged_attention"):
        table, queries, pages = shapes[1], shapes[5], shapes[6]
        slot = math.prod(pages[2:]) * eqn.invars[6].aval.dtype.itemsize
        pairs = 4 * math.prod(queries) * known.held
        return Flops(kernels=pairs, read=table[0] * known.held * slot)
    raise NotImplementedError(f"no formula for the kernel {name}")
