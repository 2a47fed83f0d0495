"""The FLOPs of a program, counted from its jaxpr.

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as often as the loop runs,
the body of a `shard_map` once for each of its devices, and Pallas kernels by their own formulas. A
multiply-add is two FLOPs, and only matrix products count (as in PaLM, arXiv 2204.02311).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.interpreters import partial_eval

SPLASH = {"splash_mha_fwd": 4, "splash_mha_dq": 6, "splash_mha_dkv": 8}
"""FLOPs of splash attention's kernels for each pair of positions and element of the head width: two
products forward, three for the gradient of queries, four for that of keys and values, a
multiply-add each. Both backward kernels compute the scores again."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs over all devices, and the bytes of pages that the sampler's attention kernel reads."""

    matmuls: float = 0.0  # XLA's
    kernels: float = 0.0  # of Pallas kernels
    page_bytes: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.matmuls + other.matmuls,
            self.kernels + other.kernels,
            self.page_bytes + other.page_bytes,
        )

    def __mul__(self, times: float) -> Flops:
        return Flops(self.matmuls * times, self.kernels * times, self.page_bytes * times)


class Assumptions(NamedTuple):
    """What a program does not say and its cost depends on."""

    trips: int = 1  # of a loop with no fixed length
    cached_tokens: float = 0.0  # held in the KV cache by each row of the sampler, on average
    experts: int = 0  # of the whole mixture, of which a device holds a share; 0: of what it holds
    live_blocks: float = 1.0  # share of a mixture's blocks that have tokens for a device's experts


NO_ASSUMPTIONS = Assumptions()


def flops(closed: Any, assumptions: Assumptions = NO_ASSUMPTIONS) -> Flops:
    """The FLOPs of a closed jaxpr."""
    # the compiler drops what no output depends on: so does the count
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _jaxpr(jaxpr, assumptions)


def _jaxpr(jaxpr: Any, assumptions: Assumptions) -> Flops:
    total = Flops()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total += _equation(eqn, assumptions)
    return total


def _equation(eqn: Any, assumptions: Assumptions) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    shapes = [x.aval.shape for x in eqn.invars if hasattr(x.aval, "shape")]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        out = math.prod(eqn.outvars[0].aval.shape)
        return Flops(2 * out * math.prod(shapes[0][i] for i in contracted))
    if name.startswith("ragged_dot"):
        # [rows, in] x [experts, in, out], or for the weights' gradient [rows, in] x [rows, out]
        (rows, inputs), other = shapes[0], shapes[1]
        held = other[0] if len(other) == 3 else eqn.outvars[0].aval.shape[0]
        outputs = math.prod(other[1:]) // inputs if len(other) == 3 else other[1]
        # the rows are those of all experts; on average held / experts of them are computed here
        return Flops(2 * rows * inputs * outputs * held / (assumptions.experts or held))
    if name == "pallas_call":
        return _kernel(eqn, shapes, assumptions)
    inner = [_jaxpr(jaxpr, assumptions) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        # one branch runs, and the most expensive is the one that does the work
        return max(inner, key=lambda branch: branch.matmuls + branch.kernels)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "while":
        times = assumptions.trips
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return sum(inner, Flops()) * times


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield inner


def _kernel(eqn: Any, shapes: list[tuple[int, ...]], assumptions: Assumptions) -> Flops:
    name = eqn.params["name"]
    for kernel, per_pair in SPLASH.items():
        if name.startswith(kernel):
            # inputs: two tables of blocks, queries [..., T, H], keys [..., S, H]. Under a causal
            # mask the kernel skips the blocks above the diagonal and computes those on it as a
            # whole.
            queries, S = shapes[2], shapes[3][-2]
            block = eqn.params["grid_mapping"].block_mappings[2].block_shape[-2].block_size
            return Flops(kernels=per_pair * math.prod(queries) * (S + block) / 2)
    if name.startswith("ragged_paged_attention"):
        table, queries, pages = shapes[1], shapes[5], shapes[6]
        bytes_of_slot = math.prod(pages[2:]) * eqn.invars[6].aval.dtype.itemsize
        cached = assumptions.cached_tokens
        return Flops(
            kernels=4 * math.prod(queries) * cached,
            page_bytes=table[0] * cached * bytes_of_slot,
        )
    raise NotImplementedError(f"plan has no formula for the FLOPs of the kernel {name}")
