"""Where jax keeps compiled programs between runs.

By default that is `xla` in the user's cache folder, at most `LIMIT` bytes, of which the programs
that were not used for the longest time go first. jax's own variables come before this default:
`JAX_COMPILATION_CACHE_DIR` names another folder, without a limit, and
`JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Several processes may use the folder at a time:
with a limit, jax reads and writes it under a lock.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from pathlib import Path

from jaxdeep.console import say

FOLDER = "JAX_COMPILATION_CACHE_DIR"
LIMIT = 8 * 2**30  # bytes
SETTINGS = {  # of jax, beside the folder: the size, and the seconds of compiling from which it is kept
    "jax_compilation_cache_max_size": LIMIT,
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}
UNFINISHED = 60.0  # seconds after which a program without its time of use was left by a kill


def cache_folder() -> Path:
    """The user's cache folder of this package, which need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "jaxdeep"


def folder() -> Path:
    """The default folder for compiled programs on machines with this CPU.

    jax's key of a program does not tell CPUs apart, and one that was compiled for another CPU may
    end in an illegal instruction, so machines that share a home folder have a folder each kind.
    """
    kind = hashlib.sha256(_cpu().encode()).hexdigest()[:12]
    return cache_folder() / "xla" / kind


def _cpu() -> str:
    """What tells CPUs apart for a compiler."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.split("\t")[0].strip() in wanted}
    return f"{platform.machine()} {' '.join(sorted(found))}"


def keep() -> Path | None:
    """Lets jax keep the programs of this process and its children in `folder()`, unless the
    environment says where. Returns that folder; None where the environment decides, or where it
    cannot be written, which is said."""
    if FOLDER in os.environ:
        return None
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_compilation_cache_dir:
        return None
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        say(f"compiled programs are not kept for the next run: {error}. {FOLDER} names a folder")
        return None
    os.environ[FOLDER] = str(place)
    wanted = {name: value for name, value in SETTINGS.items() if name.upper() not in os.environ}
    os.environ |= {name.upper(): str(value) for name, value in wanted.items()}
    if jax is not None:  # it has read the environment already
        for name, value in {**wanted, FOLDER.lower(): str(place)}.items():
            jax.config.update(name, value)
    return place


def _drop_unfinished(place: Path) -> None:
    """Removes programs that a kill left without the time of their last use: they may be half
    written, and jax could neither use nor drop them."""
    for program in place.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        try:
            old = time.time() - program.stat().st_mtime > UNFINISHED
            if old and (not used.exists() or used.stat().st_size != 8):
                program.unlink()
        except FileNotFoundError:  # another process was faster
            continue
