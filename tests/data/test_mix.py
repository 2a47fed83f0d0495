"""Several sources as one stream: shares, caps, an order from the seed, and exact resumption."""

import collections
import itertools
import json

import pytest

from jaxdeep.data.mix import (
    Mix,
    Position,
    WeightedSource,
    epoch_sizes,
    fit_row,
    hold_out,
    packed_batches,
    prefetch,
)
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Piece


class Rows:
    """Row i of source s says s, i; it is `n` tokens long, and malformed where `bad` says so."""

    def __init__(self, s, size, n=lambda i: 3 + i % 5, bad=lambda i: False):
        self.s, self.size, self.n, self.bad = s, size, n, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if self.bad(index):
            raise DataError(f"{self.s}:{index}: broken")
        return [Piece([self.s, index], "world"), Piece([1] * (self.n(index) - 2), "policy")]


class Endless(Rows):
    __len__ = None

    def __init__(self, s, n=lambda i: 4):
        super().__init__(s, 0, n)


def endless(s):
    source = Endless(s)
    return type("Open", (), {"__getitem__": lambda self, i: source[i]})()


def picked(mix, count, start=0):
    """(source, row) of each place of the walk."""
    return [tuple(mix.row(*mix.pick(index))[0].tokens) for index in range(start, start + count)]


def test_without_weights_an_epoch_has_each_row_once():
    mix = Mix({"a": WeightedSource(Rows(1, 7)), "b": WeightedSource(Rows(2, 30))}, seed=3)
    assert mix.sizes == {"a": 7, "b": 30}
    every = sorted([(1, i) for i in range(7)] + [(2, i) for i in range(30)])
    walk = picked(mix, 3 * 37)
    epochs = [walk[i : i + 37] for i in range(0, len(walk), 37)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {s for s, _ in walk[:12]} == {1, 2}  # mixed, not one after the other
    again = Mix({"a": WeightedSource(Rows(1, 7)), "b": WeightedSource(Rows(2, 30))}, seed=3)
    assert picked(again, 37, start=37) == epochs[1]
    other = Mix({"a": WeightedSource(Rows(1, 7)), "b": WeightedSource(Rows(2, 30))}, seed=4)
    assert picked(other, 37) != epochs[0]


def test_a_cap_is_the_most_rows_of_a_source_in_an_epoch_and_none_is_favoured():
    mix = Mix({"a": WeightedSource(Rows(1, 5)), "b": WeightedSource(Rows(2, 60), cap=20)}, seed=0)
    assert mix.sizes == {"a": 5, "b": 20}
    walk = picked(mix, 3 * 25)
    counts = collections.Counter(walk)
    assert all(counts[1, i] == 3 for i in range(5))
    assert all(counts[2, i] == 1 for i in range(60))  # three epochs walk the sixty once


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (
            {"a": WeightedSource(Rows(1, 90), 1.0), "b": WeightedSource(Rows(2, 10), 3.0)},
            {"a": 25, "b": 75},
        ),
        (
            {"a": WeightedSource(Rows(1, 90), 1.0), "b": WeightedSource(Rows(2, 10), 3.0, 20)},
            {"a": 80, "b": 20},
        ),
        (
            {
                "a": WeightedSource(Rows(1, 60), 2.0),
                "b": WeightedSource(Rows(2, 30), 1.0, 5),
                "c": WeightedSource(Rows(3, 10), 1.0),
            },
            {"a": 63, "b": 5, "c": 32},
        ),
        (
            {"a": WeightedSource(Rows(1, 90), 1.0, 3), "b": WeightedSource(Rows(2, 10), 1.0, 4)},
            {"a": 3, "b": 4},
        ),
        (
            {"a": WeightedSource(Rows(1, 50), 1.0), "b": WeightedSource(endless(2), 1.0)},
            {"a": 25, "b": 25},
        ),
        (
            {"a": WeightedSource(endless(1), 1.0), "b": WeightedSource(endless(2), 3.0)},
            {"a": 2500, "b": 7500},
        ),
        (
            {"a": WeightedSource(Rows(1, 50)), "b": WeightedSource(endless(2), cap=10)},
            {"a": 50, "b": 10},
        ),
        (
            {"a": WeightedSource(Rows(1, 999), 999.0), "b": WeightedSource(Rows(2, 1), 0.001)},
            {"a": 1000, "b": 1},
        ),
    ],
)
def test_shares(parts, sizes):
    assert epoch_sizes(parts) == sizes
    mix = Mix(parts, seed=1)
    walk = picked(mix, 2 * sum(sizes.values()))
    assert [sum(s == k for s, _ in walk) for k in (1, 2, 3)[: len(parts)]] == [
        2 * n for n in sizes.values()
    ]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({}, "no source of data"),
        ({"a": WeightedSource(Rows(1, 5), 0.0)}, "weight of the source a is 0"),
        (
            {"a": WeightedSource(Rows(1, 5), -1.0), "b": WeightedSource(Rows(2, 5), 1.0)},
            "weight of the source a is -1",
        ),
        ({"a": WeightedSource(Rows(1, 5), float("nan"))}, "weight of the source a is nan"),
        ({"a": WeightedSource(Rows(1, 5), cap=0)}, "cap of the source a is 0"),
        (
            {"a": WeightedSource(Rows(1, 5), 1.0), "b": WeightedSource(Rows(2, 5))},
            "of all sources or of none: b",
        ),
        ({"a": WeightedSource(Rows(1, 5)), "b": WeightedSource(endless(2))}, "source b has no end"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(parts, says):
    with pytest.raises(ConfigError, match=says):
        Mix(parts, seed=0)


def mixture(seed=5):
    parts = {
        "a": WeightedSource(Rows(1, 11, bad=lambda i: i == 3), 1.0),
        "b": WeightedSource(Rows(2, 40, n=lambda i: 90 if i % 9 == 4 else 5), 2.0, 30),
        "c": WeightedSource(endless(3), 1.0),
    }
    return Mix(parts, seed)


def walk(mix, count, position=None, **options):
    options = dict(B=2, T=32, seed=5, bad="skip") | options
    return list(itertools.islice(packed_batches(mix, position or Position(), **options), count))


def test_a_walk_resumed_anywhere_is_the_walk_that_never_stopped():
    whole = walk(mixture(), 20)
    for stop, (_, position) in enumerate(whole[:-3]):
        mix = mixture()  # another process
        kept = json.loads(json.dumps(position.save(mix)))
        parts = zip(walk(mix, 3, Position.load(kept, mix)), whole[stop + 1 :], strict=False)
        for (a, here), (b, there) in parts:
            assert here == there
            assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert whole[-1][1].read > sum(mixture().sizes.values())


def test_the_counts_of_each_source_say_what_became_of_its_rows():
    mix, seen = mixture(), collections.Counter()
    position = walk(mix, 20)[-1][1]
    for index in range(position.read):
        name, draw = mix.pick(index)
        try:
            tokens = mix.row(name, draw)
        except DataError:
            seen[name, "bad"] += 1
            continue
        n = sum(len(piece.tokens) for piece in tokens)
        seen[name, "long" if n > 32 else "rows"] += 1
        seen[name, "tokens"] += n if n <= 32 else 0
    for name, tally in position.tallies.items():
        assert tally._asdict() == dict(
            {key: seen[name, key] for key in ("rows", "tokens", "long", "bad")}, cut=0, empty=0
        )
    assert position.skipped == sum(t.skipped for t in position.tallies.values()) > 0
    assert position.read == sum(t.rows + t.skipped for t in position.tallies.values())


def test_data_that_changed_since_the_checkpoint_is_refused():
    kept = walk(mixture(), 1)[0][1].save(mixture())
    larger = mixture()
    larger.parts["a"] = WeightedSource(Rows(1, 12), 1.0)
    with pytest.raises(DataError, match="changed since the checkpoint"):
        Position.load(kept, Mix(larger.parts, 5))
    mine = mixture()
    with pytest.raises(DataError, match=f"train.seed={mine.seed}, it is 77 now"):
        Position.load(kept, Mix(mine.parts, 77))


def test_a_malformed_row_stops_the_walk_unless_it_may_be_skipped():
    with pytest.raises(DataError, match=r"1:3: broken.*data\.bad_rows=skip"):
        walk(mixture(), 20, bad="refuse")
    with pytest.raises(DataError, match="20 rows of a, one after the other"):
        walk(Mix({"a": WeightedSource(Rows(1, 10, bad=lambda i: True))}, 0), 1)


def test_a_source_of_a_mixture_that_gives_nothing_is_named():
    parts = {"a": WeightedSource(Rows(1, 10)), "b": WeightedSource(Rows(2, 10, n=lambda i: 99))}
    with pytest.raises(DataError, match="20 rows of b, one after the other"):
        walk(Mix(parts, 0), 100)


# too long


def turns(*lengths, mute=()):
    """World and policy in turn, of these lengths; the tokens count up."""
    at, out = 0, []
    for index, n in enumerate(lengths):
        weights = [0.0] * n if index in mute else None
        author = "policy" if index % 2 else "world"
        out.append(Piece(list(range(at, at + n)), author, None, weights))
        at += n
    return out


@pytest.mark.parametrize(
    ("pieces", "T", "n", "outcome"),
    [
        (turns(3, 4, 3, 4), 14, 14, ""),
        (turns(3, 4, 3, 4), 13, 7, "cut"),
        (turns(3, 4, 3, 4), 10, 7, "cut"),
        (turns(3, 4, 3, 4), 7, 7, "cut"),
        (turns(3, 4, 3, 4), 6, None, "long"),
        (turns(3, 4, 3, 4, 3, 4), 20, 14, "cut"),
        (turns(3, 4, 3, 4, mute=[1]), 13, None, "long"),  # what is left would teach nothing
        (turns(3, 4, 3, 4, mute=[1, 3]), 20, None, "empty"),
        (turns(9), 20, None, "empty"),
        (turns(3, 4, 9), 15, 7, "cut"),
    ],
)
def test_a_long_row_is_cut_after_a_turn_that_is_learned(pieces, T, n, outcome):
    row, found = fit_row(pieces, T, "cut")
    assert found == outcome and (row is None) == (n is None)
    if row is not None:
        assert row.tokens.tolist() == list(range(n)) and row.learn.any()
        assert len({len(part) for part in row}) == 1
    dropped, why = fit_row(pieces, T, "drop")
    assert (dropped is not None, why) == (
        outcome == "",
        {"cut": "long"}.get(outcome, outcome),
    )


def test_cut_rows_are_counted_and_used():
    class Long:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return turns(2, 3, 20, 3) if index % 2 else turns(2, 3)

    ((batch, position),) = walk(Long(), 1, B=2, T=15)
    (tally,) = position.tallies.values()
    assert (tally.rows, tally.cut, tally.tokens, tally.skipped) == (6, 3, 30, 0)
    assert (batch.segments_BT > 0).all() and batch.learn_BT.sum() == 18
    ((_, position),) = walk(Long(), 1, B=2, T=15, long="drop")
    (tally,) = position.tallies.values()
    assert tally.rows == 6 and tally.cut == 0 and tally.long >= 3


def test_what_is_held_out_is_not_walked():
    source = Rows(1, 50)
    kept, held = hold_out(source, 8, seed=2)
    numbers = [[part[i][0].tokens[1] for i in range(len(part))] for part in (kept, held)]
    assert sorted(numbers[0] + numbers[1]) == list(range(50)) and len(numbers[1]) == 8
    again = hold_out(source, 8, seed=2)[1]
    assert [again[i] for i in range(8)] == [held[i] for i in range(8)]
    for bad in (source, endless(1)):
        with pytest.raises(ConfigError, match="cannot be held out"):
            hold_out(bad, 50, seed=0)


def test_rows_made_ahead_are_the_same_and_so_are_their_mistakes():
    plain = walk(mixture(), 9)
    made = packed_batches(mixture(), Position(), B=2, T=32, seed=5, bad="skip")
    for (a, here), (b, there) in zip(plain, prefetch(made, 3), strict=False):
        assert here == there and all((x == y).all() for x, y in zip(a, b, strict=True))
    broken = Mix({"a": WeightedSource(Rows(1, 40, bad=lambda i: i == 3))}, 0)
    with pytest.raises(DataError, match="1:3: broken"):
        for _ in prefetch(packed_batches(broken, Position(), B=1, T=16, seed=0), 2):
            pass
