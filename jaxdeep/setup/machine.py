"""What this machine has: cores, memory and their limits, accelerators, disks. Linux says all of it
in files; `root` stands for another file system in tests. What no file says is None."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
UNLIMITED = 2**60  # bytes: from here on version 1 of control groups means "no limit"
NVIDIA, GOOGLE = "0x10de", "0x1ae0"
DISPLAY = "0x03"  # PCI's class of GPUs, with those that have no display
# v2 and v3, v4, v5p, v5e, v6e, 7x; network cards of Google's machines have the same vendor
TPUS = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


class Cores(NamedTuple):
    """Cores of the machine, cores that this process may run on, and the limit of its control group
    in cores."""

    machine: int
    allowed: int
    limit: float | None


class Memory(NamedTuple):
    """Bytes of the machine, bytes that are free for programs, and the limit of the control
    group."""

    machine: int | None
    available: int | None
    limit: int | None


class Accelerators(NamedTuple):
    """How many NVIDIA GPUs and TPU chips are plugged in, and whether NVIDIA's driver is there."""

    nvidia: int
    tpu: int
    driver: bool


def cores(root: Path = ROOT) -> Cores:
    """The cores of this machine."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    limits = []
    for group in _groups("cpu", root):
        quota, _, period = (_text(group / "cpu.max") or "max").partition(" ")
        if quota == "max":  # none, or version 1
            quota = _text(group / "cpu.cfs_quota_us") or "max"
            period = _text(group / "cpu.cfs_period_us") or "100000"
        if quota not in ("max", "-1"):
            limits.append(int(quota) / int(period))
    return Cores(machine, allowed, min(limits, default=None))


def memory(root: Path = ROOT) -> Memory:
    """The memory of this machine."""
    lines = (_text(root / "proc/meminfo") or "").splitlines()
    known = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    def read(name: str) -> int | None:
        return int(known[name][0]) * 1024 if name in known else None

    limits = []
    for group in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(group / name) or "max"
            if text != "max" and int(text) < UNLIMITED:
                limits.append(int(text))
    return Memory(read("MemTotal"), read("MemAvailable"), min(limits, default=None))


def accelerators(root: Path = ROOT) -> Accelerators:
    """What is plugged into this machine, whether or not jax can use it."""
    nvidia = tpu = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor = _text(device / "vendor")
        if vendor == NVIDIA:
            nvidia += (_text(device / "class") or "").startswith(DISPLAY)
        elif vendor == GOOGLE:
            tpu += _text(device / "device") in TPUS
    windows = (root / "dev/dxg").exists()  # WSL2, which lists no devices
    driver = windows or (root / "dev/nvidiactl").exists()
    return Accelerators(max(nvidia, int(windows)), tpu, driver)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of those that it is in, for both versions.
    Inside a container the path may be that of the host: the folder at the top is always tried."""
    mounted = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controllers if controllers else mounted
        if controllers and not top.is_dir():
            top = mounted / controller
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def free(path: Path) -> int:
    """Bytes free on the disk where a path is or would be."""
    return shutil.disk_usage(existing(path)).free


def writable(path: Path) -> bool:
    """Whether this process may write at a path, or make it."""
    return os.access(existing(path), os.W_OK)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def size(folder: Path, seconds: float) -> tuple[int, bool]:
    """Bytes of the files below a folder, and whether all were counted in that time."""
    total, end = 0, time.monotonic() + seconds
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone since it was listed
                continue
        if time.monotonic() > end:
            return total, False
    return total, True
