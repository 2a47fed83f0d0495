"""One stream of rows from one or several sources, and packed batches filled from it.

Row n of the stream follows from the sources, their weights and the seed alone. So a position in it
is a number, and a run that resumes continues at the very row where it stopped.

    an epoch of a mixture   a number of rows of each source (`Mix.sizes`), shuffled
    the rows of a source    all of them, shuffled anew each time; a source without end in its order
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
LongRows = Literal["cut", "drop"]
BadRows = Literal["refuse", "skip"]
ENDLESS_EPOCH = 10_000  # rows in an epoch when no source has an end
MAX_UNUSABLE = 1000  # rows of a source that may be left out one after the other


@dataclasses.dataclass(frozen=True)
class WeightedSource:
    """A source of a mixture. `weight` is its share of the rows relative to the other sources; None:
    each of its rows once an epoch. `cap` is the largest number of its rows in an epoch."""

    source: Source
    weight: float | None = None
    cap: int | None = None

    @property
    def size(self) -> int | None:
        """The number of rows; None for a source without end."""
        return len(self.source) if hasattr(self.source, "__len__") else None


class Tally(NamedTuple):
    """Counts of a source's rows: those used (`rows`), their tokens and how many of them were cut;
    and those left out as too long, as empty (nothing to learn) or as bad (malformed)."""

    rows: int = 0
    tokens: int = 0
    cut: int = 0
    long: int = 0
    empty: int = 0
    bad: int = 0

    @property
    def skipped(self) -> int:
        """The number of rows left out."""
        return self.long + self.empty + self.bad

    def count(self, row: Row | None, outcome: str) -> Tally:
        """With one row more, and its outcome as `fit_row` gives it."""
        tally = self._replace(**{outcome: getattr(self, outcome) + 1}) if outcome else self
        if row is None:
            return tally
        return tally._replace(rows=tally.rows + 1, tokens=tally.tokens + len(row.tokens))


class Position(NamedTuple):
    """A position in a stream: rows read, rows left out, and what became of them by source. Also the
    state of the data in a checkpoint, so its field names stay."""

    read: int = 0
    skipped: int = 0
    tallies: Mapping[str, Tally] = {}

    def save(self, mix: Mix) -> dict[str, Any]:
        """The position as JSON, with the sizes and the seed of the stream that it belongs to."""
        return self._asdict() | {"of": mix.shape, "seed": mix.seed}

    @classmethod
    def load(cls, saved: Mapping[str, Any], mix: Mix) -> Position:
        """The position that `save` gave; DataError where the stream is not the same any more."""
        shape = saved.get("of", mix.shape)
        if shape != mix.shape:
            raise DataError(
                "the data has changed since the checkpoint: [rows, rows in an epoch] of each "
                f"source were {shape} and are {mix.shape} now, which is another order of rows. "
                "Use the same data, or another --workdir with train.start"
            )
        if (seed := saved.get("seed", mix.seed)) != mix.seed:
            raise DataError(
                f"the rows were read in the order of train.seed={seed}, it is {mix.seed} now, "
                "which would repeat some and miss others. Use the same seed, or another --workdir "
                "with train.start"
            )
        tallies = {name: Tally(*tally) for name, tally in saved.get("tallies", {}).items()}
        return cls(saved["read"], saved["skipped"], tallies)


class Mix:
    """Sources by name as one stream of rows. `sizes` says how many rows of each make an epoch (0
    for a single source without end, which has no epochs)."""

    def __init__(self, parts: Mapping[str, WeightedSource], seed: int) -> None:
        self.parts, self.seed = dict(parts), seed
        self.sizes = epoch_sizes(self.parts)
        self.shape = {name: [part.size, self.sizes[name]] for name, part in self.parts.items()}
        # Of the present epochs only, and as flat arrays: an order of 10^8 rows is 400 MB this way,
        # several GB as a list.
        self._orders: dict[str, tuple[int, array.array]] = {}  # source: epoch, shuffled rows
        self._picks: tuple[int, array.array, array.array] | None = None  # epoch, sources, draws

    def row(self, name: str, draw: int) -> list[Piece]:
        """The row that a source gives when it is drawn from for the `draw`-th time, from 0."""
        return self.parts[name].source[self.row_number(name, draw)]

    def row_number(self, name: str, draw: int) -> int:
        """The number of that row in its source."""
        size = self.parts[name].size
        if size is None:
            return draw
        epoch, index = divmod(draw, size)
        if name not in self._orders or self._orders[name][0] != epoch:
            order = array.array("I", range(size))
            random.Random(f"epoch {self.seed} {name} {epoch}").shuffle(order)
            self._orders[name] = epoch, order
        return self._orders[name][1][index]

    def pick(self, index: int) -> tuple[str, int]:
        """The source of row `index` of the stream, and how often it was drawn from before."""
        names = list(self.parts)
        if len(names) == 1:
            return names[0], index
        epoch, index = divmod(index, sum(self.sizes.values()))
        if self._picks is None or self._picks[0] != epoch:
            picks = array.array("H")
            for number, name in enumerate(names):
                picks.extend([number] * self.sizes[name])
            random.Random(f"mixture {self.seed} {epoch}").shuffle(picks)
            drawn = [epoch * self.sizes[name] for name in names]
            draws = array.array("Q")
            for number in picks:
                draws.append(drawn[number])
                drawn[number] += 1
            self._picks = epoch, picks, draws
        _, picks, draws = self._picks
        return names[picks[index]], draws[index]


def epoch_sizes(parts: Mapping[str, WeightedSource]) -> dict[str, int]:
    """The number of rows of each source in an epoch of the mixture.

    Without weights: all rows of a source, or its cap. With weights the epoch is as long as all
    finite sources together, and each source has its share of it; what a cap takes from one source
    goes to the others by their weights.
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
        rows = {name: _min_known(part.size, part.cap) for name, part in parts.items()}
        endless = [name for name, n in rows.items() if n is None]
        if endless:
            raise ConfigError(
                f"the source {endless[0]} has no end: in a mixture it needs a cap, or all sources "
                "need a weight"
            )
        return rows
    if unset:
        raise ConfigError(f"set the weight of all sources or of none: {unset[0]} has none")
    left = sum(part.size or 0 for part in parts.values()) or ENDLESS_EPOCH
    rows, uncapped = {}, dict(parts)
    while uncapped:
        total = sum(part.weight for part in uncapped.values())
        shares = {name: left * part.weight / total for name, part in uncapped.items()}
        capped = {n: p.cap for n, p in uncapped.items() if p.cap is not None and p.cap <= shares[n]}
        if not capped:
            rows |= {name: max(1, round(share)) for name, share in shares.items()}
            break
        # What these cannot give raises the shares of the rest, which may reach their caps in turn.
        rows |= capped
        left -= sum(capped.values())
        uncapped = {name: part for name, part in uncapped.items() if name not in capped}
    return {name: rows[name] for name in parts}


def _min_known(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


class Subset:
    """The rows of a source with these numbers."""

    def __init__(self, source: Source, numbers: array.array) -> None:
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> list[Piece]:
        return self._source[self._numbers[index]]

    def unread(self, index: int) -> set[str]:
        """The keys of a row that nothing reads, where its source knows them."""
        unread = getattr(self._source, "unread", None)
        return unread(self._numbers[index]) if unread else set()


def hold_out(source: Source, rows: int, seed: int) -> tuple[Subset, Subset]:
    """A finite source without `rows` rows that the seed chooses, and those rows."""
    size = WeightedSource(source).size
    if size is None or not 0 < rows < size:
        raise ConfigError(
            f"{rows} rows cannot be held out of a source of {'no end' if size is None else size}: "
            "lower data.eval.rows, or name a source of its own in data.eval.source"
        )
    numbers = array.array("I", range(size))
    random.Random(f"held out {seed}").shuffle(numbers)
    return Subset(source, numbers[rows:]), Subset(source, numbers[:rows])


def fit_row(pieces: list[Piece], longest: int, long: LongRows) -> tuple[Row | None, str]:
    """A row of at most `longest` tokens, and its outcome "" or "cut"; or None and the reason,
    "long" or "empty".

    A longer one is left out with long="drop". With long="cut" it ends after the last turn of the
    policy that fits, and is left out where nothing before that is learned.
    """
    row, outcome = to_row(pieces), ""
    if not row.learn.any():
        return None, "empty"
    if len(row.tokens) > longest:
        end = length = 0
        for piece in pieces:
            length += len(piece.tokens)
            if piece.author == "policy" and length <= longest:
                end = length
        row, outcome = Row(*(part[:end] for part in row)), "cut"
        if long == "drop" or not row.learn.any():
            return None, "long"
    return row, outcome


def load_row(
    get: Callable[[], list[Piece]], longest: int, long: LongRows, bad: BadRows
) -> tuple[Row | None, str]:
    """The row that `get` reads and its outcome, as `fit_row`. A malformed one is None and "bad"
    where `bad` is "skip", otherwise a DataError."""
    try:
        return fit_row(get(), longest, long)
    except DataError as error:
        if bad == "skip":
            return None, "bad"
        raise DataError(
            f"{error}. Correct the row, or leave out malformed rows with data.bad_rows=skip"
        ) from error


def packed_batches(
    source: Source | Mix,
    position: Position,
    *,
    B: int,
    T: int,
    seed: int,
    longest: int | None = None,
    long: LongRows = "cut",
    bad: BadRows = "refuse",
    share: Share | None = None,
) -> Iterator[tuple[Batch, Position]]:
    """Batches of B packed rows of T positions, from `position` on, each with the position after it.

    Rows have at most `longest` tokens, T unless it is said: a model may have fewer positions. They
    are packed in order, each into the first row of the batch with room for it; the batch is
    complete when one fits nowhere. Rows that `load_row` leaves out are counted; DataError where a
    source gives none but such for MAX_UNUSABLE rows, or for all of its rows. With `share`, for one
    of several processes, only the tokens of `share.rows` are sure to be there; everything else in a
    batch is the same in all processes.
    """
    mix = source if isinstance(source, Mix) else Mix({"rows": WeightedSource(source)}, seed)
    longest = min(T, longest or T)

    def load(ref: RowRef) -> tuple[Row | None, str]:
        name, number = ref
        get = functools.partial(mix.parts[name].source.__getitem__, number)
        return load_row(get, longest, long, bad)

    # Looked up in order, and here only: going back by one row may shuffle an epoch anew.
    picks = map(mix.pick, itertools.count(position.read))
    refs = ((name, mix.row_number(name, draw)) for name, draw in picks)
    coming = share.read(refs, load) if share else (ReadRow(ref, *load(ref)) for ref in refs)
    # The one good row of n may be the first of an epoch and the last of the next, with 2n - 2
    # others between.
    limits = {
        name: min(MAX_UNUSABLE, 2 * (part.size or MAX_UNUSABLE)) for name, part in mix.parts.items()
    }
    unusable = dict.fromkeys(mix.parts, 0)  # since the last good row of each source
    read = next(coming)
    while True:
        bins: list[list[ReadRow]] = [[] for _ in range(B)]
        room = [T] * B
        tallies = dict.fromkeys(mix.parts, Tally()) | position.tallies
        index = position.read
        while True:
            name, row = read.ref[0], read.row
            if row is not None:
                length = len(row.tokens)
                b = next((b for b in range(B) if room[b] >= length), None)
                if b is None:
                    break  # it begins the next batch
                bins[b].append(read)
                room[b] -= length
            tallies[name] = tallies[name].count(row, read.outcome)
            index, unusable[name] = index + 1, 0 if row is not None else unusable[name] + 1
            if unusable[name] >= limits[name]:
                raise DataError(
                    f"{unusable[name]} rows of {name}, one after the other, are longer than {longest} "
                    "tokens, have nothing to learn or are malformed: raise batch.length or look at "
                    "the data"
                )
            read = next(coming)
        position = Position(index, sum(tally.skipped for tally in tallies.values()), tallies)
        if share:
            rows = [share.load_missing(b, read_rows, load) for b, read_rows in enumerate(bins)]
        else:
            rows = [[read_row.row for read_row in read_rows] for read_rows in bins]
        yield pack_bins(rows, B, T), position


def prefetch(items: Iterator[Item], n: int) -> Iterator[Item]:
    """The items of an endless iterator, of which a thread makes the next `n` while one is in
    use."""
    with concurrent.futures.ThreadPoolExecutor(1, "rows") as pool:
        coming = collections.deque(pool.submit(next, items) for _ in range(n))
        while True:
            coming.append(pool.submit(next, items))
            yield coming.popleft().result()
