"""What a program in the sandbox may take, and what comes back from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxdeep.errors import ConfigError

Level = Literal["full", "guarded", "bare"]
LEVELS: tuple[Level, ...] = ("bare", "guarded", "full")
"""From the weakest to the strongest."""

Status = Literal["exited", "signal", "timeout", "memory", "output", "disk", "infra"]

_BOUNDS = {  # smallest value of each, in its unit
    "seconds": 0.05,
    "cpu_seconds": 1,
    "memory_mb": 16,
    "total_mb": 16,
    "processes": 1,
    "files": 16,
    "output_bytes": 1024,
    "flood_bytes": 1024,
    "report_bytes": 0,
    "disk_mb": 1,
    "temporary_mb": 1,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run. Every one of them is kept at the levels `full` and `guarded`."""

    seconds: float = 10.0  # of the clock; then everything is killed
    cpu_seconds: float | None = None  # of one process; None: as `seconds`, rounded up
    memory_mb: int = 512  # address space of one process
    total_mb: int | None = None  # memory of all processes together; None: as memory_mb
    processes: int = 64  # processes and threads at one time
    files: int = 256  # open files of one process
    output_bytes: int = 64 * 1024  # of the output that are kept: its beginning and its end
    flood_bytes: int = 8 * 1024 * 1024  # of output, at which the run is ended
    report_bytes: int = 4 * 1024 * 1024  # on the report channel; more ends the run
    disk_mb: int = 64  # the work folder
    temporary_mb: int = 32  # /tmp and /dev/shm, each

    def __post_init__(self) -> None:
        for name, least in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in ("cpu_seconds", "total_mb"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < least:
                raise ConfigError(f"a box's {name}={value!r} must be a number of at least {least}")


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What became of a run.

    `status`
      exited    the program ended by itself; `code` is its exit code
      signal    a signal ended it; `code` is the signal's number
      timeout, memory, output, disk    it went over that limit and was killed; of processes too many
                at a time say "memory", where it is the watchdog that saw them
      infra     it could not be run, or ended without a record of how; `detail` says why. This is
                the machine's failure and says nothing about the program.
    `output` is what it wrote, stdout and stderr together; `report` what it wrote to the channel
    whose number is in the environment variable REPORT_FD. `seconds` of the clock, `cpu` seconds of
    all its processes, `peak_mb` the most memory that was seen.
    """

    status: Status
    code: int | None
    output: str
    report: bytes
    seconds: float
    cpu: float
    peak_mb: float
    level: Level
    detail: str = ""
