"""Where things lie in a run's folder, files that are replaced in one step, and the lock on the folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from jaxdeep.errors import JaxdeepError


def write_atomic(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader, or a kill, sees the old text or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds the folder for one run; JaxdeepError where another run holds it. The kernel drops the lock
    with the process, so a killed run leaves nothing to clean up."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise JaxdeepError(
                f"{workdir} is in use by another run (process {owner}): "
                "wait for it, stop it, or choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
