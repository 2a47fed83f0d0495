"""What each of several processes reads of the data, so that all fill the same batches.

Where a row lands in a batch depends on its length and on all rows before it, so every process must
know the lengths of all rows. Reading and tokenizing all of them in each would waste the others.
Instead each process reads its share of the coming rows and sends the others an outline of each: its
length and which tokens are learned. All then fill the same batches, and each process reads again
those rows of other processes that land on its own devices, for their tokens. With N processes each
reads (2N - 1) / N^2 of all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.types import Row

ROWS_PER_ROUND = 16  # rows that each process reads between two exchanges of outlines

RowRef = tuple[str, int]  # a source's name, and the number of a row in it
LoadRow = Callable[[RowRef], tuple[Row | None, str]]  # the row and its outcome, as `mix.load_row`


class ReadRow(NamedTuple):
    """A row of the data, None where it cannot be used, and its outcome as in `mix.fit_row`. Where
    another process has read it, `has_tokens` is False: its tokens are all 0, the rest is right."""

    ref: RowRef
    row: Row | None
    outcome: str
    has_tokens: bool = True


class Share(NamedTuple):
    """The part of process `index` of `count`, whose devices hold the `rows` of each batch.
    `all_gather` sends a message (JSON) to all processes and returns the messages of all by index;
    every process calls it equally often."""

    all_gather: Callable[[Any], list[Any]]
    index: int
    count: int
    rows: Container[int]

    def read(self, refs: Iterator[RowRef], load: LoadRow) -> Iterator[ReadRow]:
        """The rows at `refs`, in order, of which this process loads every `count`-th. Where one
        process cannot read a row, all raise its DataError when they reach that row."""
        while True:
            coming = list(itertools.islice(refs, self.count * ROWS_PER_ROUND))
            own = [_load(load, ref) for ref in coming[self.index :: self.count]]
            outlines = self.all_gather([_outline(*loaded) for loaded in own])
            for number, ref in enumerate(coming):
                nth, reader = divmod(number, self.count)
                is_own = reader == self.index
                row, outcome = own[nth] if is_own else _from_outline(outlines[reader][nth])
                if isinstance(outcome, DataError):
                    raise outcome
                yield ReadRow(ref, row, outcome, is_own)

    def load_missing(self, b: int, read_rows: list[ReadRow], load: LoadRow) -> list[Row]:
        """The rows that share row b of a batch, with their tokens if this process's devices need
        them."""
        if b not in self.rows:
            return [read.row for read in read_rows]
        return [read.row if read.has_tokens else _load_again(read, load) for read in read_rows]


def _load(load: LoadRow, ref: RowRef) -> tuple[Row | None, str | DataError]:
    try:
        return load(ref)
    except DataError as error:
        # kept until all reach the row: an error at once would leave the others waiting
        return None, error


def _outline(row: Row | None, outcome: str | DataError) -> list[Any]:
    """[outcome, [[length, weight], ...] of runs of tokens with the same weight in the loss]; of a
    row that is left out [outcome, []], of an error [its text]."""
    if isinstance(outcome, DataError):
        return [str(outcome)]
    if row is None:
        return [outcome, []]
    changes = (np.flatnonzero(row.learn[1:] != row.learn[:-1]) + 1).tolist()
    edges = itertools.pairwise([0, *changes, len(row.learn)])
    return [outcome, [[end - start, float(row.learn[start])] for start, end in edges]]


def _from_outline(outline: list[Any]) -> tuple[Row | None, str | DataError]:
    """The row that an outline describes, with tokens that are all 0, and its outcome."""
    outcome, *rest = outline
    if not rest:
        return None, DataError(outcome)
    if not rest[0]:
        return None, outcome
    lengths, weights = zip(*rest[0], strict=True)
    learn = np.repeat(np.asarray(weights, np.float32), lengths)
    # No policy sampled a row of data: it has no log-probabilities, and its advantage is 1.
    return Row(np.zeros(len(learn), np.int32), learn, np.zeros_like(learn), learn), outcome


def _load_again(read: ReadRow, load: LoadRow) -> Row:
    row, _ = load(read.ref)
    # Files that differ between hosts would train different batches in different processes.
    if row is None or not np.array_equal(row.learn, read.row.learn):
        name, number = read.ref
        raise DataError(
            f"row {number} of {name}, counted from 0, is not the same in all processes: "
            "give all of them the same data"
        )
    return row
