"""Rows read through once, before any training: what becomes of each, so that nothing is left out
without a word and a malformed line is not met hours later."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from jaxdeep.data.mix import LongRows, Mix, Tally, fit_row
from jaxdeep.errors import DataError

SHOWN = 5  # malformed rows that are told


@runtime_checkable
class Keyed(Protocol):
    """A source that knows which keys of a row nothing reads."""

    def unread(self, index: int) -> set[str]: ...


@dataclasses.dataclass
class Found:
    """What became of the rows of each source, by its name: how many are used, cut and left out; how
    many have a key that nothing reads, by key; and the first errors of malformed rows, by number.
    """

    tallies: dict[str, Tally] = dataclasses.field(default_factory=dict)
    unread: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    errors: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)


def check(
    mix: Mix,
    longest: int,
    long: LongRows,
    *,
    part: int = 0,
    parts: int = 1,
    on_row: Callable[[], object] = lambda: None,
) -> Found:
    """Reads each row of the sources that have an end, or every `parts`-th of them from `part` on.
    `longest` is the number of tokens that a row may have, and `on_row` is called after each."""
    found = Found()
    for name, weighted in mix.parts.items():
        if weighted.size is None:
            continue
        tally, unread, errors = Tally(), collections.Counter(), {}
        for index in range(part, weighted.size, parts):
            try:
                row, outcome = fit_row(weighted.source[index], longest, long)
                if isinstance(weighted.source, Keyed):
                    unread.update(weighted.source.unread(index))
            except DataError as error:
                row, outcome = None, "bad"
                if len(errors) < SHOWN:
                    errors[index] = str(error)
            tally = tally.count(row, outcome)
            on_row()
        found.tallies[name], found.unread[name], found.errors[name] = tally, unread, errors
    return found


def joined(some: Iterable[Found]) -> Found:
    """What several processes found in their parts, together."""
    out = Found()
    for found in some:
        for name, tally in found.tallies.items():
            old = out.tallies.get(name, Tally())
            out.tallies[name] = Tally(*map(sum, zip(old, tally, strict=True)))
            out.unread.setdefault(name, collections.Counter()).update(found.unread[name])
            errors = out.errors.get(name, {}) | found.errors[name]
            out.errors[name] = dict(sorted(errors.items())[:SHOWN])
    return out
