"""What a run takes of each of its chips, by the compiler that would compile it there: memory by kind, what
is left of it for keys and values, the time of a step.

The bound is the roofline's: no program is faster than its FLOPs, its bytes of memory or its bytes between
chips allow. The estimate is the compiler's cycles, the kernels' FLOPs at a share of the peak, and the
exchange that nothing hides; it has been compared with no run on a TPU of this package.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdeep import programs as lower
from jaxdeep.console import progress
from jaxdeep.model import flops, moe, paged
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, count, hlo
from jaxdeep.sample import sizes
from jaxdeep.types import Batch

KERNEL_PEAK_SHARE = 0.5  # of the peak that Pallas kernels of attention are taken to reach
OOM_MESSAGE = re.compile(
    r"(?:temporaries \(|Used )([\d.]+)([KMG])"
)  # what a program that is too large says
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass
class Program:
    """A compiled program on one device: bytes it needs beside its arguments, and the seconds that each
    resource needs at least, `estimated` what it may take. `fits` is False where it is too large by
    itself, arguments included: then only `temporary` is known."""

    name: str
    fits: bool
    temporary: float
    arguments: float = 0.0
    code: float = 0.0
    flops: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    estimated: float = 0.0
    collectives: list[dict] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def binding(self) -> str:
        """The resource that bounds it."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else ""

    @property
    def bound(self) -> float:
        """Seconds that it takes at least."""
        return max(self.seconds.values(), default=0.0)


def compiled(
    name: str,
    traced: jax.stages.Traced,
    mesh: jax.sharding.Mesh,
    chip: chips.Chip,
    *,
    known: count.Known = count.NOTHING,
    sharers: int = 0,
) -> Program:
    """The program, compiled; its work is shared by `sharers` devices (0: all), others do it again."""
    begun = time.perf_counter()
    try:
        done = lower.compiled(traced, mesh)
    except jax.errors.JaxRuntimeError as error:
        said = OOM_MESSAGE.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
        if not said:
            raise
        wanted = float(said[1]) * UNITS[said[2]]
        return Program(name, False, wanted, compile_seconds=time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    memory, cost = (
        done.memory_analysis(),
        hlo.cost(done.as_text(), trips=known.trips, live=known.live),
    )
    work = count.flops(traced.jaxpr, known).times(1 / (sharers or mesh.size))
    devices = list(mesh.devices.flat)

    def exchange(one: hlo.Collective) -> float:
        way = chips.detour(chip, devices, one.group) if one.kind == "all-to-all" else 1.0
        return one.moved * way / chips.speed(chip, devices, one.group)

    waits, hides = (
        sum(exchange(c) for c in cost.collectives if c.hidden is h) for h in (False, True)
    )
    bound = {
        "compute": (work.matmuls + work.kernels) / chip.peak,
        "memory": (cost.memory + work.read) / chip.hbm,
        "interconnect": waits + hides,
    }
    kernels = max(work.kernels / chip.peak / KERNEL_PEAK_SHARE, work.read / chip.hbm)
    least = max(work.matmuls / chip.peak, cost.memory / chip.hbm)
    busy = max(cost.cycles / chip.clock, least) + kernels
    return Program(
        name,
        True,
        temporary=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=work.matmuls + work.kernels,
        seconds=bound,
        estimated=max(busy, hides) + waits,
        collectives=hlo.moved(cost.collectives, exchange),
        compile_seconds=seconds,
    )


@dataclasses.dataclass
class Plan:
    """What `work` takes on each of `chips` devices. `memory` is bytes by kind, those of keys and values
    as the configuration asks for them."""

    work: lower.Workload
    topology: str
    mesh: dict[str, int]
    devices: int
    limit: float
    memory: dict[str, float]
    programs: dict[str, Program]
    step: dict[str, float]
    engine: dict[str, float]

    @property
    def used(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.limit and all(p.fits for p in self.programs.values())


def plan(
    work: lower.Workload, topology: chips.Topology, axes: meshes.MeshConfig, *, whole: bool = True
) -> Plan:
    """Compile the programs of `work` for the topology; without `whole` only those that decide whether it
    fits. ConfigError for a mesh that does not divide the devices or the work."""
    chip, mesh = topology.chip, meshes.make_mesh(axes, topology.devices)
    own = sizes.devices(work.spec.model, mesh) if work.engine is not None else None
    programs = {}
    listed = lower.listed(work, mesh, own, whole=whole)
    # one after the other: two at a time, libtpu may wait for ever
    with progress(listed, f"plan {work.name}", "program") as bar:
        for name, traced, where in bar:
            bar.set_postfix_str(name, refresh=False)
            programs[name] = compiled(name, traced, where, chip, **assumed(name, work, where))
    memory = resident(work, mesh, own, programs)
    return Plan(
        work=work,
        topology=topology.name,
        mesh=dict(mesh.shape),
        devices=mesh.size,
        limit=chip.memory,
        memory=memory,
        programs=programs,
        step=step_of(work, mesh, chip, programs),
        engine={} if own is None else engine_of(work, mesh, own, chip, memory, programs),
    )


def assumed(name: str, work: lower.Workload, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What `compiled` is to know of a program: of the engine's, that rows are half full, and that devices
    along `context`, which have the same rows, compute the same."""
    experts = work.spec.model.E
    if name == "decode":
        known = count.Known(work.engine.steps, work.engine.length / 2, experts)
    elif name == "prefill":
        known = count.Known(1, work.engine.length / 2, experts)
    else:
        shares, rows = mesh.shape["model"], mesh.size // mesh.shape["model"]
        blocks = moe.blocks_of(work.rows * work.length // rows * work.spec.model.top_k, shares)
        # two are a device's share; that of the busiest, for which the others wait, is in a third
        live = min(3 / blocks, 1.0)
        return dict(known=count.Known(experts=experts, live=live))
    return dict(known=known, sharers=mesh.size // mesh.shape["context"])


def resident(
    work: lower.Workload,
    mesh: jax.sharding.Mesh,
    own: jax.sharding.Mesh | None,
    programs: dict[str, Program],
) -> dict[str, float]:
    """Bytes of one device by kind, at the moment when most are held."""
    spec, size = work.spec, lower.device_bytes
    state, frozen = lower.state(spec, mesh), lower.frozen(spec, mesh)
    batch = (lower.batch(mesh, work.rows, work.length), lower.reference_logps(work, mesh))
    out = {
        "base": size(frozen),
        "weights in float32" if spec.full else "adapter": size(state.trained),
        "optimizer": size(state.opt),
        "gradients": size(state.trained),
        "batch": size(batch),
    }
    given = {
        "gradients": size((frozen, state.trained, state.trained, batch)),
        "before": size((frozen, state.trained, batch)),
        "update": size((state, state.trained)),
    }
    if own is not None:
        kv, bank = lower.pages(work, own), lower.bank(work, own)
        weights = lower.params(spec.model, own)
        if spec.full or not same_parts(frozen, weights):
            out["base once more, for the engine"] = size(weights)
        out["adapters of the engine"] = size(bank)
        out["keys and values"] = size(kv)
        given |= dict.fromkeys(("prefill", "decode"), size((weights, bank, kv)))
    for program in programs.values():
        if not program.fits:  # what the compiler said are its arguments too
            program.temporary = max(program.temporary - given[program.name], 0.0)
    padding = max((p.arguments - given[p.name] for p in programs.values() if p.fits), default=0.0)
    out["programs and padding"] = sum(p.code for p in programs.values()) + max(padding, 0.0)
    out["activations and other temporaries"] = max(p.temporary for p in programs.values())
    return out


def same_parts(tree: Any, other: Any) -> bool:
    """Whether the devices of the second hold, of each array, the same part in the first."""
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        held = one.sharding.devices_indices_map(one.shape)
        wanted = two.sharding.devices_indices_map(two.shape)
        if any(held[device] != at for device, at in wanted.items()):
            return False
    return True


def step_of(
    work: lower.Workload, mesh: jax.sharding.Mesh, chip: chips.Chip, programs: Mapping[str, Program]
) -> dict[str, float]:
    """A step of training: FLOPs, seconds at least and estimated, tokens per second and device, MFU."""
    times = {
        "gradients": work.microbatches * work.passes,
        "before": work.microbatches,
        "update": work.passes,
    }
    some = [(programs[name], n) for name, n in times.items() if name in programs]
    if not all(program.fits for program, _ in some):
        return {}
    bound = sum(n * program.bound for program, n in some)
    estimated = sum(n * program.estimated for program, n in some)
    tokens = work.microbatches * work.rows * work.length
    asked = model_flops(work)
    return {
        "tokens": tokens,
        "model_flops": asked,
        "device_flops": sum(n * program.flops for program, n in some),
        "bound_seconds": bound,
        "estimated_seconds": estimated,
        "tokens_per_second_and_device": tokens / estimated / mesh.size,
        "most_tokens_per_second_and_device": tokens / bound / mesh.size,
        "mfu": asked / estimated / mesh.size / chip.peak,
        "most_mfu": asked / bound / mesh.size / chip.peak,
    }


def model_flops(work: lower.Workload) -> float:
    """What the architecture asks for in a step whose rows are each one sequence."""
    shape = (work.rows, work.length)
    at, ones = np.broadcast_to(np.arange(work.length), shape), np.broadcast_to(np.float32(1), shape)
    batch = Batch(at, ones, at, ones, ones, ones)
    spec = work.spec
    how = dict(passes=work.passes, forwards=work.forwards)
    return work.microbatches * flops.of_step(spec.model, spec.lora, [batch], **how)


def engine_of(
    work: lower.Workload,
    mesh: jax.sharding.Mesh,
    own: jax.sharding.Mesh,
    chip: chips.Chip,
    memory: Mapping[str, float],
    programs: Mapping[str, Program],
) -> dict[str, float]:
    """The engines, one a host: pages and rows at the limits of the configuration, of all chips together,
    and the speed of a call of all rows that are half full."""
    engine, cfg = work.engine, work.spec.model
    share, shards = own.size // meshes.process_count(own), sizes.shards_of(own)
    engines = mesh.size // share
    page = paged.page_bytes(cfg, own, engine.page) / own.shape["model"]
    left = chip.memory - sum(memory.values()) + memory["keys and values"]
    row = -(-engine.length // engine.page)
    found = {
        "engines": engines,
        "devices": share,
        "bytes_left": left,
        "pages_left": max(int(left / page), 0) * shards * engines,
        "rows_asked": engine.slots * engines,
        "rows_possible": max(int(left / (page * row)), 0) * shards * engines,
        "gb_possible": max(left, 0.0) * share / own.shape["context"] / 1e9,
    }
    decode = next((p for name, p in programs.items() if name == "decode" and p.fits), None)
    if decode is not None:
        tokens = engine.slots * engine.steps
        found |= {
            "tokens_per_second_and_device": tokens / decode.estimated / share,
            "most_tokens_per_second_and_device": tokens / decode.bound / share,
        }
    return found
