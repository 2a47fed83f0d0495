"""What a run takes on each of its chips, from the programs that the real compiler makes for them:
memory by kind, room for keys and values, the time of a step.

The bound is the roofline's: no program is faster than its FLOPs, its memory traffic or its
collectives allow. The estimate adds up what can be expected to overlap and what cannot: the
compiler's cycles, the attention kernels' FLOPs at a share of the peak, and the collectives that the
device waits for. It has not been compared with a run of this package on a TPU.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdeep import programs
from jaxdeep.console import progress
from jaxdeep.model import flops, moe, paged
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, count, hlo
from jaxdeep.sample import sizes
from jaxdeep.types import Batch

KERNEL_PEAK_SHARE = 0.5  # of the peak FLOP/s that Pallas attention kernels are assumed to reach
# the compiler's message for a program that needs more memory than the chip has
OOM_MESSAGE = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMG])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass
class ProgramCost:
    """What a compiled program takes on one device."""

    name: str
    fits: bool  # False: too large even alone; then of the rest only `temporary` is known
    temporary: (
        float  # bytes it needs beside its arguments; with them until `memory_by_kind` if not `fits`
    )
    arguments: float = 0.0  # bytes
    code: float = 0.0  # bytes
    flops: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # least, by resource
    estimated: float = 0.0  # seconds
    collectives: list[dict] = dataclasses.field(default_factory=list)  # see `hlo.by_kind`
    compile_seconds: float = 0.0

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else ""

    @property
    def bound(self) -> float:
        """The least seconds that it can take, all resources busy at once."""
        return max(self.seconds.values(), default=0.0)


def cost_of(
    name: str,
    traced: jax.stages.Traced,
    mesh: jax.sharding.Mesh,
    chip: chips.Chip,
    *,
    assumptions: count.Assumptions = count.NO_ASSUMPTIONS,
    split_over: int = 0,
) -> ProgramCost:
    """Compile a program and count what it takes. Its FLOPs are split over `split_over` devices (0:
    all) and repeated on the others."""
    start = time.perf_counter()
    try:
        compiled = programs.compile_traced(traced, mesh)
    except jax.errors.JaxRuntimeError as error:
        oom = OOM_MESSAGE.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
        if not oom:
            raise
        needed = float(oom[1]) * UNITS[oom[2]]
        return ProgramCost(name, False, needed, compile_seconds=time.perf_counter() - start)
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = hlo.cost(
        compiled.as_text(), trips=assumptions.trips, live_blocks=assumptions.live_blocks
    )
    work = count.flops(traced.jaxpr, assumptions) * (1 / (split_over or mesh.size))
    devices = list(mesh.devices.flat)

    def collective_seconds(one: hlo.Collective) -> float:
        factor = chips.detour(chip, devices, one.group) if one.kind == "all-to-all" else 1.0
        return one.moved * factor / chips.speed(chip, devices, one.group)

    exposed, hidden = (
        sum(collective_seconds(one) for one in cost.collectives if one.hidden is behind)
        for behind in (False, True)
    )
    bound = {
        "compute": (work.matmuls + work.kernels) / chip.peak,
        "memory": (cost.memory + work.page_bytes) / chip.hbm,
        "interconnect": exposed + hidden,
    }
    # the compiler's cycles know nothing of Pallas kernels, which run one after the other with the
    # rest
    kernels = max(work.kernels / chip.peak / KERNEL_PEAK_SHARE, work.page_bytes / chip.hbm)
    roofline = max(work.matmuls / chip.peak, cost.memory / chip.hbm)
    busy = max(cost.cycles / chip.clock, roofline) + kernels
    return ProgramCost(
        name,
        True,
        temporary=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=work.matmuls + work.kernels,
        seconds=bound,
        estimated=max(busy, hidden) + exposed,
        collectives=hlo.by_kind(cost.collectives, collective_seconds),
        compile_seconds=compile_seconds,
    )


@dataclasses.dataclass
class Plan:
    """What a run takes on each of its devices."""

    work: programs.Workload
    topology: str
    mesh: dict[str, int]
    devices: int
    limit: float  # bytes of memory that a device has
    memory: dict[str, float]  # bytes by kind; keys and values as the configuration asks for them
    programs: dict[str, ProgramCost]
    step: dict[str, float]  # see `step_speed`
    engine: dict[str, float]  # see `engine_capacity`

    @property
    def used(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.limit and all(cost.fits for cost in self.programs.values())


def plan(
    work: programs.Workload,
    topology: chips.Topology,
    axes: meshes.MeshConfig,
    *,
    largest_only: bool = False,
) -> Plan:
    """Compile the programs of `work` for the topology, or with `largest_only` those that decide
    whether it fits. ConfigError for a mesh that does not divide the devices or the work."""
    chip, mesh = topology.chip, meshes.make_mesh(axes, topology.devices)
    sampler_mesh = sizes.devices(work.spec.model, mesh) if work.engine is not None else None
    costs = {}
    traced = programs.trace_all(work, mesh, sampler_mesh, largest_only=largest_only)
    # one after the other: with two compilations at a time, libtpu may hang
    with progress(traced, f"plan {work.name}", "program") as bar:
        for name, program, place in bar:
            bar.set_postfix_str(name, refresh=False)
            assumptions, split_over = assumptions_for(name, work, place)
            costs[name] = cost_of(
                name, program, place, chip, assumptions=assumptions, split_over=split_over
            )
    memory = memory_by_kind(work, mesh, sampler_mesh, costs)
    engine = {}
    if sampler_mesh is not None:
        engine = engine_capacity(work, mesh, sampler_mesh, chip, memory, costs)
    return Plan(
        work=work,
        topology=topology.name,
        mesh=dict(mesh.shape),
        devices=mesh.size,
        limit=chip.memory,
        memory=memory,
        programs=costs,
        step=step_speed(work, mesh, chip, costs),
        engine=engine,
    )


def assumptions_for(
    name: str, work: programs.Workload, mesh: jax.sharding.Mesh
) -> tuple[count.Assumptions, int]:
    """What `cost_of` assumes of a program, and over how many devices its FLOPs are split (0:
    all)."""
    experts = work.spec.model.E
    if name in ("prefill", "decode"):
        trips = work.engine.steps if name == "decode" else 1
        # rows are half full on average, and devices along `context` compute the same rows
        half = work.engine.length / 2
        return count.Assumptions(trips, half, experts), mesh.size // mesh.shape["context"]
    shares, rows = mesh.shape["model"], mesh.size // mesh.shape["model"]
    blocks = moe.blocks_of(work.rows * work.length // rows * work.spec.model.top_k, shares)
    # a device's share is two blocks on average; the others wait for the busiest, which has a third
    live_blocks = min(3 / blocks, 1.0)
    return count.Assumptions(experts=experts, live_blocks=live_blocks), 0


def memory_by_kind(
    work: programs.Workload,
    mesh: jax.sharding.Mesh,
    sampler_mesh: jax.sharding.Mesh | None,
    costs: dict[str, ProgramCost],
) -> dict[str, float]:
    """Bytes on one device by kind, at the moment of the peak. Of programs that are too large it
    takes the arguments out of their `temporary` bytes."""
    spec, size = work.spec, programs.device_bytes
    state, frozen = (
        programs.state_shapes(spec, mesh),
        programs.frozen_shapes(spec, mesh, work.under),
    )
    batch = (
        programs.batch_shapes(mesh, work.rows, work.length),
        programs.reference_shapes(work, mesh),
    )
    memory = {
        "base": size(frozen),
        "weights in float32" if spec.full else "adapter": size(state.trained),
        "optimizer": size(state.opt),
        "gradients": size(state.trained),
        "batch": size(batch),
    }
    arguments = {
        "gradients": size((frozen, state.trained, state.trained, batch)),
        "before": size((frozen, state.trained, batch)),
        "update": size((state, state.trained)),
    }
    if sampler_mesh is not None:
        kv = programs.page_shapes(work, sampler_mesh)
        bank = programs.bank_shapes(work, sampler_mesh)
        weights = programs.param_shapes(spec.model, sampler_mesh)
        if spec.full or not shards_reused(frozen.params, weights):
            memory["base once more, for the engine"] = size(weights)
        memory["adapters of the engine"] = size(bank)
        memory["keys and values"] = size(kv)
        arguments |= dict.fromkeys(("prefill", "decode"), size((weights, bank, kv)))
    for cost in costs.values():
        if not cost.fits:  # the compiler's message counts the arguments too
            cost.temporary = max(cost.temporary - arguments[cost.name], 0.0)
    # TPUs pad arrays to whole tiles: what the compiler counts beyond the arrays' own bytes
    padding = max((c.arguments - arguments[c.name] for c in costs.values() if c.fits), default=0.0)
    memory["programs and padding"] = sum(c.code for c in costs.values()) + max(padding, 0.0)
    # one program runs at a time, so the largest temporary is the peak
    memory["activations and other temporaries"] = max(c.temporary for c in costs.values())
    return memory


def shards_reused(trainer: Any, sampler: Any) -> bool:
    """Whether every device of the second tree holds its shard of each array in the first already.
    Then the sampler reads the trainer's own arrays, and the weights are in memory once."""
    for ours, theirs in zip(jax.tree.leaves(trainer), jax.tree.leaves(sampler), strict=True):
        held = ours.sharding.devices_indices_map(ours.shape)
        wanted = theirs.sharding.devices_indices_map(theirs.shape)
        if any(held[device] != index for device, index in wanted.items()):
            return False
    return True


def step_speed(
    work: programs.Workload,
    mesh: jax.sharding.Mesh,
    chip: chips.Chip,
    costs: Mapping[str, ProgramCost],
) -> dict[str, float]:
    """A training step: tokens, FLOPs, seconds at least and estimated, tokens per second and device,
    MFU (model FLOPs over what all devices do in that time at their peak). Empty if a program does
    not fit."""
    calls = {
        "gradients": work.microbatches * work.passes,
        "before": work.microbatches,
        "update": work.passes,
    }
    called = [(costs[name], n) for name, n in calls.items() if name in costs]
    if not all(cost.fits for cost, _ in called):
        return {}
    bound = sum(n * cost.bound for cost, n in called)
    estimated = sum(n * cost.estimated for cost, n in called)
    tokens = work.microbatches * work.rows * work.length
    asked = model_flops(work)
    return {
        "tokens": tokens,
        "model_flops": asked,
        "device_flops": sum(n * cost.flops for cost, n in called),
        "bound_seconds": bound,
        "estimated_seconds": estimated,
        "tokens_per_second_and_device": tokens / estimated / mesh.size,
        "most_tokens_per_second_and_device": tokens / bound / mesh.size,
        "mfu": asked / estimated / mesh.size / chip.peak,
        "most_mfu": asked / bound / mesh.size / chip.peak,
    }


def model_flops(work: programs.Workload) -> float:
    """FLOPs that the architecture asks for in a step, each row being one sequence of full
    length."""
    shape = (work.rows, work.length)
    positions_BT = np.broadcast_to(np.arange(work.length), shape)
    ones_BT = np.broadcast_to(np.float32(1), shape)
    batch = Batch(positions_BT, ones_BT, positions_BT, ones_BT, ones_BT, ones_BT)
    spec = work.spec
    return work.microbatches * flops.of_step(
        spec.model, spec.lora, [batch], passes=work.passes, forwards=work.forwards
    )


def engine_capacity(
    work: programs.Workload,
    mesh: jax.sharding.Mesh,
    sampler_mesh: jax.sharding.Mesh,
    chip: chips.Chip,
    memory: Mapping[str, float],
    costs: Mapping[str, ProgramCost],
) -> dict[str, float]:
    """The engines, one a host: the pages and rows of full length that the memory left over could
    hold, on all devices together, and the speed of a decode call with all rows half full."""
    engine, cfg = work.engine, work.spec.model
    devices = sampler_mesh.size // meshes.process_count(sampler_mesh)
    shards = sizes.shards_of(sampler_mesh)
    engines = mesh.size // devices
    page = paged.page_bytes(cfg, sampler_mesh, engine.page) / sampler_mesh.shape["model"]
    left = chip.memory - sum(memory.values()) + memory["keys and values"]
    pages_of_row = -(-engine.length // engine.page)
    capacity = {
        "engines": engines,
        "devices": devices,
        "bytes_left": left,
        "pages_left": max(int(left / page), 0) * shards * engines,
        "rows_asked": engine.slots * engines,
        "rows_possible": max(int(left / (page * pages_of_row)), 0) * shards * engines,
        "gb_possible": max(left, 0.0) * devices / sampler_mesh.shape["context"] / 1e9,
    }
    decode = costs.get("decode")
    if decode is not None and decode.fits:
        tokens = engine.slots * engine.steps
        capacity |= {
            "tokens_per_second_and_device": tokens / decode.estimated / devices,
            "most_tokens_per_second_and_device": tokens / decode.bound / devices,
        }
    return capacity
