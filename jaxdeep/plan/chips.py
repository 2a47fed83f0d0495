"""The accelerators that a plan can be made for: their published figures, and how chips are
connected.

Peak FLOP/s are in `jaxdeep.model.flops`. Bandwidths of memory and of links are from the pages
docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, which give a chip's bandwidth over all its
links and both directions. When links wrap around to a ring is from "How to Scale Your Model"
(jax-ml.github.io/scaling-book). A device is what JAX calls one: a chip, on tpu7x half a chip.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdeep.config import suggest
from jaxdeep.errors import ConfigError
from jaxdeep.model import flops

GIB = 2**30
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# libtpu assumes hosts of 2x2 chips; these flat shapes are one host with all of their chips
SINGLE_HOST_BOUNDS = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
INSTALL = "pip install 'jaxdeep[tpu]' (in a checkout: pip install -e '.[tpu]')"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device."""

    kind: str  # `jax.Device.device_kind`
    memory: float  # bytes that the compiler lets a program use
    hbm: float  # bytes/s of that memory
    link: float  # bytes/s of one link in one direction
    network: float  # bytes/s to other slices
    ring: int  # an axis of the torus wraps around to a ring if its size is a multiple of this
    # cycles/s by which the compiler's cycles become seconds: peak FLOP/s over FLOPs a cycle;
    # assumed for v6e and tpu7x
    clock: float
    price: float = 0.0  # dollars a chip and hour, on-demand list price of 2025; 0: not known here
    shapes: tuple[str, ...] = FLAT  # usual topologies
    options: tuple[tuple[str, Any], ...] = ()  # for `get_topology_desc`

    @property
    def peak(self) -> float:
        """FLOP/s in bfloat16."""
        return flops.peak(self.kind)


CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1.228e12, 5e10, 3.125e9, 4, 1.05e9, 3.22, CUBES,
               (("chip_config_name", "megacore"),)),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 8.19e11, 5e10, 3.125e9, 16, 1.5e9, 1.20),
    "v5p": Chip("TPU v5p", 95.73 * GIB, 2.765e12, 1e11, 6.25e9, 4, 1.75e9, 4.20, CUBES),
    "v6e": Chip("TPU v6e", 31.24 * GIB, 1.638e12, 1e11, 1.25e10, 16, 1.75e9, 2.70),
    "tpu7x": Chip("TPU7x", 94.74 * GIB, 3.69e12, 1e11, 6.25e9, 4, 2.2e9, 0.0, CUBES),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Descriptions of devices, to compile for without having them."""

    name: str  # as in `topology`
    chip: Chip
    devices: tuple[Any, ...]


def topology(name: str) -> Topology:
    """The devices of "v5e:8x8", or of several slices, as in "v5e:8x8*2". ConfigError if the name is
    unknown or libtpu is not installed."""
    kind, _, rest = name.partition(":")
    shape, star, slices = rest.partition("*")
    if (
        kind not in CHIPS
        or not re.fullmatch(r"\d+(x\d+){1,2}", shape)
        or (star and not slices.isdigit())
    ):
        raise _unknown(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"a plan for {name} needs no TPU, but libtpu, which is not installed: {INSTALL}"
        )
    chip = CHIPS[kind]
    options = dict(chip.options)
    if star and int(slices) > 1:
        options["num_slices"] = int(slices)
    if shape in SINGLE_HOST_BOUNDS and chip.shapes is FLAT:
        options["chips_per_host_bounds"] = SINGLE_HOST_BOUNDS[shape]
    set_libtpu_environment(kind)
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(name, str(error).splitlines()[0]) from error
    return Topology(name, chip, tuple(described.devices))


def price(name: str) -> float:
    """Dollars an hour for one device of the topology, 0 if not known."""
    return CHIPS[name.partition(":")[0]].price


def _unknown(name: str, why: str = "") -> ConfigError:
    listing = "\n".join(f"  {kind}: {' '.join(chip.shapes)}" for kind, chip in CHIPS.items())
    names = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes]
    return ConfigError(
        f"topology {name!r} is none that can be described{why and f' ({why})'}."
        f"{suggest(name, names)} Chips and their usual shapes, with *2 for two slices, such as "
        f"v5e:16x16*2:\n{listing}"
    )


def set_libtpu_environment(kind: str) -> None:
    """Tell libtpu what it would ask the metadata server of a TPU machine, so that it neither waits
    for one nor prints errors. Only for a process that never uses a TPU."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", f"{kind}-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # no device is opened, so no other process has to wait
    ):
        os.environ.setdefault(name, value)


def speed(chip: Chip, devices: Sequence[Any], group: Sequence[int]) -> float:
    """Bytes/s that a device sends to the others of its group while all groups exchange.

    It uses each axis of the torus along which the group's devices differ: both directions if they
    close to a ring there, else one. Groups that lie interleaved share the links. A group that spans
    several slices goes over the network.
    """
    members = [devices[i] for i in group]
    if len({getattr(device, "slice_index", 0) for device in members}) > 1:
        return chip.network
    if not hasattr(members[0], "coords"):  # virtual CPU devices, in tests
        return chip.link
    links = sum(share for _, share in _axes(chip, devices, members))
    return chip.link * (links or 1)  # the two halves of a chip: taken to be as fast as a link


def detour(chip: Chip, devices: Sequence[Any], group: Sequence[int]) -> float:
    """How many times longer an all-to-all takes than at `speed`. Other collectives send to the next
    device of a ring only; here data for a distant device passes over every link on the way, a
    quarter of the axis on average."""
    members = [devices[i] for i in group]
    if not hasattr(members[0], "coords"):
        return 1.0
    n = max((count for count, _ in _axes(chip, devices, members)), default=1)
    return max(n * n / 4 / (n - 1), 1.0) if n > 1 else 1.0


def _axes(chip: Chip, devices: Sequence[Any], members: Sequence[Any]) -> list[tuple[int, float]]:
    """For each axis of the torus along which the members of a group differ: the number of their
    positions on it, and the links that a device has there, in directions that can be used at
    once."""
    all_coords = np.array([device.coords for device in devices])
    axes = []
    for axis, coords in enumerate(np.array([device.coords for device in members]).T):
        positions, extent = np.unique(coords), np.ptp(all_coords[:, axis]) + 1
        if len(positions) > 1:
            step = int(np.diff(positions).min())
            ring = len(positions) * step == extent and extent % chip.ring == 0
            # every step-th device is a member: the links between are shared by `step` groups
            axes.append((len(positions), (2 if ring else 1) / step))
    return axes
