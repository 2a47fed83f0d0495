"""What builds a data set: a frozen dataclass whose fields are its settings, with `build`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Built:
    """What a builder came to: `title` and `rows` of the table to show, `notes` as paragraphs under
    it, `summary` as JSON for programs, and the files it wrote."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    summary: Mapping[str, Any]
    files: Sequence[Path]


class Builder(Protocol):
    """A data set's builder. The same settings and input give the same files."""

    def build(self, workdir: Path) -> Built:
        """Write the data set into `workdir`. ConfigError or DataError for what cannot be used."""
        ...
