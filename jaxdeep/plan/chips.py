"""Accelerators that a plan can be made for: what their vendor publishes, and how their chips are wired.

Peak FLOP/s are in `jaxdeep.model.flops`. Memory bandwidth and the bandwidth between chips are of the pages
docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where a chip's bandwidth is said over all its links
and both directions; how links close to rings, from "How to Scale Your Model"
(jax-ml.github.io/scaling-book). A device is what JAX calls one: a chip, but of tpu7x half of one.
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
HOSTS = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}  # flat shapes of one host that has not 2x2 chips
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
INSTALL = "pip install 'jaxdeep[tpu]' (in a checkout: pip install -e '.[tpu]')"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device: `memory` is what the compiler lets a program use, in bytes; `hbm` bytes/s of that
    memory, `link` bytes/s of one link in one direction, `network` bytes/s to other slices; links close
    to a ring along an axis whose size is a multiple of `ring`. `clock` is that of the compiler's cycles:
    peak FLOP/s over those of a cycle, for v6e and tpu7x assumed. `price` is the list price in dollars of
    a chip and hour on demand in 2025, 0 where it is not known here."""

    kind: str
    memory: float
    hbm: float
    link: float
    network: float
    ring: int
    clock: float
    price: float = 0.0
    shapes: tuple[str, ...] = FLAT
    options: tuple[tuple[str, Any], ...] = ()

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
    """Described devices, in no machine: `name` as it was asked for, their `chip`, and what they are."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def topology(name: str) -> Topology:
    """The devices of "v5e:8x8", or of several slices as in "v5e:8x8*2". An unknown one, or a machine
    without libtpu, is a ConfigError."""
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
            f"a plan for {name} is compiled by libtpu, which is not installed; no TPU is needed: {INSTALL}"
        )
    chip = CHIPS[kind]
    options = dict(chip.options)
    if star and int(slices) > 1:
        options["num_slices"] = int(slices)
    if shape in HOSTS and chip.shapes is FLAT:
        options["chips_per_host_bounds"] = HOSTS[shape]
    quiet(kind)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(name, str(error).splitlines()[0]) from error
    return Topology(name, chip, tuple(found.devices))


def price(name: str) -> float:
    """Dollars a device and hour of the topology, 0 where it is not known."""
    return CHIPS[name.partition(":")[0]].price


def _unknown(name: str, why: str = "") -> ConfigError:
    listed = "\n".join(f"  {kind}: {' '.join(chip.shapes)}" for kind, chip in CHIPS.items())
    every = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes]
    return ConfigError(
        f"topology {name!r} is none that can be described{why and f' ({why})'}."
        f"{suggest(name, every)} Chips and their usual shapes, with *2 for two slices, such as "
        f"v5e:16x16*2:\n{listed}"
    )


def quiet(kind: str) -> None:
    """Say to libtpu what it would ask a machine with TPUs for; only here, where it never sees one."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", f"{kind}-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # nothing is opened that a second process could want
    ):
        os.environ.setdefault(name, value)


def speed(chip: Chip, devices: Sequence[Any], group: Sequence[int]) -> float:
    """Bytes/s that a device of a group sends to the others while all groups exchange: over both directions
    of each side of the torus along which they differ, where the group closes to a ring there, else over
    one; a link between devices of several groups is shared. Over the network where they are in several
    slices."""
    some = [devices[i] for i in group]
    if len({getattr(device, "slice_index", 0) for device in some}) > 1:
        return chip.network
    if not hasattr(some[0], "coords"):
        return chip.link
    links = sum(share for _, share in _sides(chip, devices, some))
    return chip.link * (links or 1)  # two halves of a chip are no slower than a link


def detour(chip: Chip, devices: Sequence[Any], group: Sequence[int]) -> float:
    """How much longer an all-to-all takes than `speed` says: what goes to a distant device goes over all
    links on the way, a quarter of a side on average, not to the next one only."""
    some = [devices[i] for i in group]
    if not hasattr(some[0], "coords"):
        return 1.0
    n = max((count for count, _ in _sides(chip, devices, some)), default=1)
    return max(n * n / 4 / (n - 1), 1.0) if n > 1 else 1.0


def _sides(chip: Chip, devices: Sequence[Any], some: Sequence[Any]) -> list[tuple[int, float]]:
    """Of each side of the torus along which devices differ: how many places they have there, and the
    links that a device has for each of its directions."""
    whole = np.array([device.coords for device in devices])
    found = []
    for side, at in enumerate(np.array([device.coords for device in some]).T):
        places, extent = np.unique(at), np.ptp(whole[:, side]) + 1
        if len(places) > 1:
            step = int(np.diff(places).min())
            ring = len(places) * step == extent and extent % chip.ring == 0
            found.append((len(places), (2 if ring else 1) / step))
    return found
