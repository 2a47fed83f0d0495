"""What the check of an answer comes to, and what a book says about its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Verdict(NamedTuple):
    """`equal`: whether the answer is right, None where that is not known. `credit`: the share of
    the gold's parts that are right, 0 or 1 where it has one, None with `equal`. `kind`: the type
    that the gold was read as. `unit_missing`: the answer was accepted without the gold's unit."""

    equal: bool | None
    credit: float | None
    kind: str
    note: str = ""
    unit_missing: bool = False


@dataclasses.dataclass(frozen=True)
class Book:
    """How the answers of one book are read: `log` is the base of a logarithm without one (None: e),
    `synonyms` are groups of words that mean the same."""

    log: float | None = None
    synonyms: Sequence[Sequence[str]] = ()


def right(kind: str, note: str = "", *, unit_missing: bool = False) -> Verdict:
    return Verdict(True, 1.0, kind, note, unit_missing)


def wrong(kind: str, note: str = "") -> Verdict:
    return Verdict(False, 0.0, kind, note)


def unknown(kind: str, note: str = "") -> Verdict:
    return Verdict(None, None, kind, note)
