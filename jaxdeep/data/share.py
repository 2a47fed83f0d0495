"""What one of several processes loads of a walk, so that all fill the same batches.

Where a row lands in a batch depends on its length and on those before it. So each process reads its share
of the rows that come next, and tells the others their outlines: how long each is and what is learned of
it. All then fill the same batches, and each reads again, of the rows on its own devices, those that others
read. With N processes that is (2N - 1) / N^2 of all rows, in place of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.types import Row

ROUND = 16  # rows that each process reads before it tells the others

RowRef = tuple[str, int]  # a source's name, and the number of a row in it
Get = Callable[[RowRef], tuple[Row | None, str]]  # as `mix.take`


class ReadRow(NamedTuple):
    """A row of the walk, or none, and what became of it, as of `mix.fit`. Of a row that another process
    read (not `whole`) all is known but what its tokens are."""

    spot: RowRef
    row: Row | None
    said: str
    whole: bool = True


class Share(NamedTuple):
    """The part of process `index` of `count`, whose devices hold `rows` of a batch. `tell` says something
    (JSON) to all and returns what all said, in their order; every process tells equally often."""

    tell: Callable[[Any], list[Any]]
    index: int
    count: int
    rows: Container[int]

    def read(self, spots: Iterator[RowRef], get: Get) -> Iterator[ReadRow]:
        """What `get` gives for each spot, in order. A DataError of one process is raised by all, where
        the row is reached."""
        while True:
            coming = list(itertools.islice(spots, self.count * ROUND))
            mine = [_try(get, spot) for spot in coming[self.index :: self.count]]
            told = self.tell([_outline(*found) for found in mine])
            for place, spot in enumerate(coming):
                nth, whose = divmod(place, self.count)
                row, said = mine[nth] if whose == self.index else _stand_in(told[whose][nth])
                if isinstance(said, DataError):
                    raise said
                yield ReadRow(spot, row, said, whose == self.index)

    def load(self, b: int, held: list[ReadRow], get: Get) -> list[Row]:
        """Row b of a batch, of what lands there: with its tokens where this process needs them."""
        if b not in self.rows:
            return [seen.row for seen in held]
        return [seen.row if seen.whole else _again(seen, get) for seen in held]


def _try(get: Get, spot: RowRef) -> tuple[Row | None, str | DataError]:
    try:
        return get(spot)
    except DataError as error:
        return None, error


def _outline(row: Row | None, said: str | DataError) -> list[Any]:
    """[what became of it, [length, weight] of each run of tokens that are learned alike], or of an error
    [its text]."""
    if isinstance(said, DataError):
        return [str(said)]
    if row is None:
        return [said, []]
    edges = [0, *(np.flatnonzero(row.learn[1:] != row.learn[:-1]) + 1).tolist(), len(row.learn)]
    return [said, [[end - at, float(row.learn[at])] for at, end in itertools.pairwise(edges)]]


def _stand_in(outline: list[Any]) -> tuple[Row | None, str | DataError]:
    """The row that an outline is of, its tokens all 0."""
    said, *rest = outline
    if not rest:
        return None, DataError(said)
    if not rest[0]:
        return None, said
    lengths, weights = zip(*rest[0], strict=True)
    learn = np.repeat(np.asarray(weights, np.float32), lengths)
    # rows of data were sampled by nobody, and their advantage is 1
    return Row(np.zeros(len(learn), np.int32), learn, np.zeros_like(learn), learn), said


def _again(seen: ReadRow, get: Get) -> Row:
    row, _ = get(seen.spot)
    if row is None or not np.array_equal(row.learn, seen.row.learn):
        name, place = seen.spot
        raise DataError(
            f"row {place} of {name}, counted from 0, is not the same in all processes: give all the same data"
        )
    return row
