"""Reads and writes `metrics.jsonl`, which has one row of numbers per step.

The file survives a kill at any moment: an incomplete last line is dropped, and so are rows after
the checkpoint that a run resumes from, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdeep.errors import DataError
from jaxdeep.workdir import Workdir, write_atomic


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without an incomplete last line; DataError where it does not
    exist or is not a metrics file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: no run has written its metrics there") from None
    # What follows the last newline is empty, or the beginning of a row that a kill cut short.
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
    """Appends rows to `workdir/metrics.jsonl`, after dropping those later than `step`, from which
    the run resumes."""

    def __init__(self, workdir: Path, *, step: int) -> None:
        self.path = Workdir(workdir).metrics
        workdir.mkdir(parents=True, exist_ok=True)
        kept = (
            [row for row in read_metrics(self.path) if row["step"] <= step]
            if self.path.exists()
            else []
        )
        self.step = kept[-1]["step"] if kept else -1
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one row and returns it; it is on disk then. Numbers that are not finite become
        null, which JSON has, and are named under "nonfinite". ValueError unless `step` is later
        than the last."""
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
