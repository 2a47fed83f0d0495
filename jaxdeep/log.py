"""What a run leaves behind while it runs: metrics, progress, and a lock on its folder.

`metrics.jsonl` has one row per step. It survives a kill at any moment: a torn last line is dropped,
and rows past the checkpoint that a run resumes from are dropped too, so no step appears twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxdeep.errors import DataError, JaxdeepError

SECONDS_BETWEEN_LINES = 5.0


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


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a torn last line; DataError where it is not one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: no run has written its metrics there") from None
    # What follows the last newline is empty, or torn by a kill.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}:{number} is not a row of metrics: {line[:80]!r}")
        rows.append(row)
    return rows


class Metrics:
    """Appends rows to `workdir/metrics.jsonl`, after dropping those past `step`, where the run resumes."""

    def __init__(self, workdir: Path, *, step: int) -> None:
        self.path = workdir / "metrics.jsonl"
        workdir.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read(self.path) if row["step"] <= step] if self.path.exists() else []
        self.step = kept[-1]["step"] if kept else -1
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Adds one row, on disk when this returns, and returns it. Numbers that are not finite become null and are
        named under "nonfinite". ValueError where `step` does not grow."""
        if step <= self.step:
            raise ValueError(f"{step=} is not after the last row of {self.path}, {self.step}")
        row: dict[str, Any] = {"step": step}
        for name, value in values.items():
            row[name] = value if isinstance(value, (int, str)) else float(value)
        nonfinite = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        if nonfinite:
            row |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.step = step
        return row

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lines(tqdm):
    """Progress for a log file: whole lines, one at most every few seconds."""

    monitor_interval = 0  # no thread that prints a line of its own

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        if not self.disable and self.n != self.last_print_n:
            self.display()
        self.disable = True


def progress(items: Iterable | int, desc: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar over `items`, or over a count that the caller moves with `.update()`; `done` were
    done before and do not count as speed. Where stderr is not a terminal it prints lines instead, at
    most one in five seconds."""
    source = {"total": items} if isinstance(items, int) else {"iterable": items}
    if sys.stderr.isatty():
        return tqdm(**source, desc=desc, unit=unit, initial=done, dynamic_ncols=True)
    return _Lines(
        **source,
        desc=desc,
        unit=unit,
        initial=done,
        miniters=1,
        mininterval=SECONDS_BETWEEN_LINES,
        bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
    )


def say(line: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


ENDED = "terminated after step {step}, which is saved: the same command continues"


class Terminated(BaseException):
    """SIGTERM came while work was done that may be dropped."""


class Termination:
    """Makes SIGTERM, what machines that are taken away get, an end in good order: `asked` becomes true
    for the loop to see between two steps, and work inside `droppable()` ends at once by Terminated. One
    inside another tells that one when it ends."""

    def __init__(self) -> None:
        self.asked, self._droppable = False, False

    def __enter__(self) -> Termination:
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        around = getattr(self._before, "__self__", None)
        if self.asked and isinstance(around, Termination):
            around.asked = True

    def _handle(self, *_: object) -> None:
        self.asked = True
        if self._droppable:
            raise Terminated

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """Work that is as if never begun when it is cut off."""
        self._droppable = True
        try:
            if self.asked:
                raise Terminated
            yield
        finally:
            self._droppable = False


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
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
