"""The walk over one or several sources, and batches filled from it.

Row n of a walk is decided by the sources, their weights and the seed alone: a position is a number, and a
run goes on at the very row where it stopped.

    epoch of a mixture   so many rows of each source, shuffled         `Mix.sizes`
    rows of a source     all of it, shuffled, again and again; an endless one in order
"""

from __future__ import annotations

import array
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from jaxdeep.data.pack import pack_bins, to_row
from jaxdeep.data.share import ReadRow, RowRef, Share
from jaxdeep.data.sources import Source
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Batch, Piece, Row

Item = TypeVar("Item")
Long = Literal["cut", "drop"]
Bad = Literal["refuse", "skip"]
ENDLESS = 10_000  # rows in an epoch of sources that have no end


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a mixture: its share of the rows beside the others' (None: each row once an epoch),
    and the most rows it gives in an epoch."""

    source: Source
    weight: float | None = None
    cap: int | None = None

    @property
    def size(self) -> int | None:
        """How many rows there are; None where there is no end."""
        return len(self.source) if hasattr(self.source, "__len__") else None


class Tally(NamedTuple):
    """What became of the rows of a source: those used, their tokens and how many of them were cut; those
    left out as too long, with nothing to learn, or malformed."""

    rows: int = 0
    tokens: int = 0
    cut: int = 0
    long: int = 0
    empty: int = 0
    bad: int = 0

    @property
    def skipped(self) -> int:
        """The rows left out."""
        return self.long + self.empty + self.bad


class Position(NamedTuple):
    """How far a walk has come: rows read, rows left out, and the same by source."""

    read: int = 0
    skipped: int = 0
    tallies: Mapping[str, Tally] = {}

    def save(self, mix: Mix) -> dict[str, Any]:
        """The position as JSON, with what it is a position in."""
        return self._asdict() | {"of": mix.shape, "seed": mix.seed}

    @classmethod
    def load(cls, saved: Mapping[str, Any], mix: Mix) -> Position:
        """The position that `save` gave; DataError where the mixture is no longer the same."""
        of = saved.get("of", mix.shape)
        if of != mix.shape:
            raise DataError(
                f"the data has changed since the checkpoint. Rows of each source, and of these in an "
                f"epoch, were {of}, they are {mix.shape}: the order would be another. Use the same data, "
                "or another --workdir with train.start"
            )
        if (seed := saved.get("seed", mix.seed)) != mix.seed:
            raise DataError(
                f"the rows were read in the order of train.seed={seed}, it is {mix.seed} now: some would come "
                "twice. Use the same, or another --workdir with train.start"
            )
        tallies = {name: Tally(*tally) for name, tally in saved.get("tallies", {}).items()}
        return cls(saved["read"], saved["skipped"], tallies)


class Mix:
    """Sources by name as one walk. `sizes` says how many rows of each make an epoch (0: a single source
    without end, which has none)."""

    def __init__(self, parts: Mapping[str, Part], seed: int) -> None:
        self.parts, self.seed = dict(parts), seed
        self.sizes = sizes_of(self.parts)
        self.shape = {name: [p.size, self.sizes[name]] for name, p in self.parts.items()}
        self._orders: dict[str, tuple[int, array.array]] = {}  # of the epoch each source is in
        self._picks: tuple[int, array.array, array.array] | None = None

    def row(self, name: str, draw: int) -> list[Piece]:
        """What a source gives when it is asked for the `draw`-th time, from 0."""
        return self.parts[name].source[self.place(name, draw)]

    def place(self, name: str, draw: int) -> int:
        """The number of that row in its source."""
        part = self.parts[name]
        if part.size is None:
            return draw
        epoch, place = divmod(draw, part.size)
        if name not in self._orders or self._orders[name][0] != epoch:
            order = array.array("I", range(part.size))
            random.Random(f"epoch {self.seed} {name} {epoch}").shuffle(order)
            self._orders[name] = epoch, order
        return self._orders[name][1][place]

    def pick(self, index: int) -> tuple[str, int]:
        """Which source gives row `index` of the walk, and how many rows it has given before."""
        names = list(self.parts)
        if len(names) == 1:
            return names[0], index
        epoch, place = divmod(index, sum(self.sizes.values()))
        if self._picks is None or self._picks[0] != epoch:
            picks = array.array("H")
            for number, name in enumerate(names):
                picks.extend([number] * self.sizes[name])
            random.Random(f"mixture {self.seed} {epoch}").shuffle(picks)
            given = [epoch * self.sizes[name] for name in names]
            draws = array.array("Q")
            for number in picks:
                draws.append(given[number])
                given[number] += 1
            self._picks = epoch, picks, draws
        _, picks, draws = self._picks
        return names[picks[place]], draws[place]


def sizes_of(parts: Mapping[str, Part]) -> dict[str, int]:
    """How many rows each source gives in an epoch of the mixture.

    Without weights: all it has, or its cap. With weights the epoch is as long as all finite sources
    together, and each has its share; what one may not give for its cap, the others give by weight.
    """
    for name, part in parts.items():
        if part.weight is not None and not 0 < part.weight < float("inf"):
            raise ConfigError(
                f"the weight of the source {name} is {part.weight}: it must be above 0"
            )
        if part.cap is not None and part.cap < 1:
            raise ConfigError(f"the cap of the source {name} is {part.cap}: it must be at least 1")
    if not parts:
        raise ConfigError("there is no source of data: set data.source, or data.sources")
    if len(parts) == 1:
        return {name: part.size or 0 for name, part in parts.items()}
    unset = [name for name, part in parts.items() if part.weight is None]
    if len(unset) == len(parts):
        rows = {name: _least(part.size, part.cap) for name, part in parts.items()}
        endless = [name for name, n in rows.items() if n is None]
        if endless:
            raise ConfigError(
                f"the source {endless[0]} has no end: in a mixture it needs a cap, or all need a weight"
            )
        return rows
    if unset:
        raise ConfigError(f"set the weight of all sources or of none: {unset[0]} has none")
    left = sum(part.size or 0 for part in parts.values()) or ENDLESS
    rows, open_ = {}, dict(parts)
    while open_:
        total = sum(part.weight for part in open_.values())
        shares = {name: left * part.weight / total for name, part in open_.items()}
        full = {n: p.cap for n, p in open_.items() if p.cap is not None and p.cap <= shares[n]}
        if not full:
            rows |= {name: max(1, round(share)) for name, share in shares.items()}
            break
        rows |= full
        left -= sum(full.values())
        open_ = {name: part for name, part in open_.items() if name not in full}
    return {name: rows[name] for name in parts}


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


class Subset:
    """The rows of a source that stand at these places."""

    def __init__(self, source: Source, places: array.array) -> None:
        self._source, self._places = source, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> list[Piece]:
        return self._source[self._places[index]]


def held_out(source: Source, rows: int, seed: int) -> tuple[Subset, Subset]:
    """A finite source without some rows that the seed chooses, and those rows."""
    size = Part(source).size
    if size is None or not 0 < rows < size:
        raise ConfigError(
            f"{rows} rows cannot be held out of a source of {'no end' if size is None else size}: "
            "lower data.eval.rows, or name a source of its own in data.eval.source"
        )
    places = array.array("I", range(size))
    random.Random(f"held out {seed}").shuffle(places)
    return Subset(source, places[rows:]), Subset(source, places[:rows])


def fit(pieces: list[Piece], T: int, long: Long) -> tuple[Row | None, str]:
    """The row and what became of it: "" or "cut"; or no row and why: "long" or "empty".

    "cut" ends a row that is longer than T tokens after the last turn of the policy that fits, where
    something before is learned; "drop" leaves it out.
    """
    row, said = to_row(pieces), ""
    if not row.learn.any():
        return None, "empty"
    if len(row.tokens) > T:
        end = at = 0
        for piece in pieces:
            at += len(piece.tokens)
            if piece.author == "policy" and at <= T:
                end = at
        row, said = Row(*(part[:end] for part in row)), "cut"
        if long == "drop" or not row.learn.any():
            return None, "long"
    return row, said


def fill(
    source: Source | Mix,
    position: Position,
    *,
    B: int,
    T: int,
    seed: int,
    long: Long = "cut",
    bad: Bad = "refuse",
    share: Share | None = None,
) -> Iterator[tuple[Batch, Position]]:
    """Batches of B packed rows of T positions from `position` on, each with the position after it.

    Rows enter in order, each in the first place it fits, until one fits nowhere. A row that is too long
    (`fit`), or with nothing to learn, is left out and counted, and so is a malformed one where `bad` is
    "skip"; DataError if a thousand of a source in a row are, or all. One of several processes has only
    the tokens of its `share.rows` for certain; all else of a batch is the same in all.
    """
    mix = source if isinstance(source, Mix) else Mix({"rows": Part(source)}, seed)

    def get(spot: RowRef) -> tuple[Row | None, str]:
        name, place = spot
        return take(functools.partial(mix.parts[name].source.__getitem__, place), T, long, bad)

    # places in order, once: to go back is to shuffle an epoch anew
    picks = map(mix.pick, itertools.count(position.read))
    spots = ((name, mix.place(name, draw)) for name, draw in picks)
    coming = share.read(spots, get) if share else (ReadRow(spot, *get(spot)) for spot in spots)
    # one good row of n can be first in an epoch and last in the next: 2n - 2 others between
    most = {name: min(1000, 2 * (part.size or 1000)) for name, part in mix.parts.items()}
    out = dict.fromkeys(mix.parts, 0)
    seen = next(coming)
    while True:
        bins: list[list[ReadRow]] = [[] for _ in range(B)]
        room = [T] * B
        tallies = dict.fromkeys(mix.parts, Tally()) | position.tallies
        index = position.read
        while True:
            (name, _), row, said, _ = seen
            if row is not None:
                n = len(row.tokens)
                place = next((b for b in range(B) if room[b] >= n), None)
                if place is None:
                    break
                bins[place].append(seen)
                room[place] -= n
            tallies[name] = _count(tallies[name], row, said)
            index, out[name] = index + 1, 0 if row is not None else out[name] + 1
            if out[name] >= most[name]:
                raise DataError(
                    f"{out[name]} rows of {name}, one after the other, are longer than {T} tokens, have "
                    "nothing to learn or are malformed: raise batch.length or look at the data"
                )
            seen = next(coming)
        position = Position(index, sum(tally.skipped for tally in tallies.values()), tallies)
        if share:
            rows = [share.load(b, held, get) for b, held in enumerate(bins)]
        else:
            rows = [[seen.row for seen in held] for held in bins]
        yield pack_bins(rows, B, T), position


def prefetch(items: Iterator[Item], n: int) -> Iterator[Item]:
    """The same items without end, `n` of them made by a thread while the last one is used."""
    with concurrent.futures.ThreadPoolExecutor(1, "rows") as pool:
        coming = collections.deque(pool.submit(next, items) for _ in range(n))
        while True:
            coming.append(pool.submit(next, items))
            yield coming.popleft().result()


def take(get: Callable[[], list[Piece]], T: int, long: Long, bad: Bad) -> tuple[Row | None, str]:
    """The row that `get` gives, if it can be used, and what became of it: as `fit`, or "bad"."""
    try:
        return fit(get(), T, long)
    except DataError as error:
        if bad == "skip":
            return None, "bad"
        raise DataError(
            f"{error}. Mend the row, or leave out what is malformed with data.bad_rows=skip"
        ) from error


def _count(tally: Tally, row: Row | None, said: str) -> Tally:
    if said:
        tally = tally._replace(**{said: getattr(tally, said) + 1})
    if row is not None:
        tally = tally._replace(rows=tally.rows + 1, tokens=tally.tokens + len(row.tokens))
    return tally
