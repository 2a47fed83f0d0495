"""A walk shared by several processes: the batches of one, and less to read for each."""

import itertools
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxdeep.data.mix import Mix, Position, WeightedSource, packed_batches
from jaxdeep.data.share import ROWS_PER_ROUND, Share
from jaxdeep.errors import DataError
from jaxdeep.types import Piece


class Rounds:
    """`rounds.Rounds` for threads in place of processes: `[i]` is what process i calls."""

    def __init__(self, count):
        self.messages, self.barrier = [None] * count, threading.Barrier(count)

    def __getitem__(self, index):
        def all_gather(message):
            self.messages[index] = json.dumps(message)
            self.barrier.wait()
            received = [json.loads(text) for text in self.messages]
            self.barrier.wait()  # nobody writes the next message before all have read this one
            return received

        return all_gather


class Rows:
    """Conversations of many lengths, some with weights; some malformed, too long, or with nothing
    to learn."""

    def __init__(self, s, size, bad=lambda i: i % 13 == 5):
        self.s, self.size, self.bad, self.asked = s, size, bad, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.asked += 1
        if self.bad(index):
            raise DataError(f"{self.s}:{index}: broken")
        draw = random.Random(f"{self.s} {index}")
        first = 100 if index % 11 == 3 else draw.randint(1, 9)
        out = [Piece([draw.randrange(1, 99) for _ in range(first)], "world")]
        for _ in range(draw.randint(0 if index % 7 else 9, 3 if index % 7 else 12)):
            tokens = [draw.randrange(1, 99) for _ in range(draw.randint(1, 12))]
            weights = [0.1 * draw.randint(0, 9) for _ in tokens] if index % 5 == 0 else None
            out += [Piece(tokens, "policy", None, weights), Piece([7, 8], "world")]
        return out


def mixture(**options):
    parts = {
        "a": WeightedSource(Rows(1, 150, **options), 1.0),
        "b": WeightedSource(Rows(2, 400, **options), 2.0, 300),
    }
    return Mix(parts, seed=5)


def walk(share, count, *, B, position=None, bad="skip", mix=None):
    """Batches with their positions, and how many rows were read from the sources for them."""
    mix = mix or mixture()
    batches = packed_batches(mix, position or Position(), B=B, T=96, seed=5, bad=bad, share=share)
    found = list(itertools.islice(batches, count))
    return found, sum(part.source.asked for part in mix.parts.values())


def several(N, *args, B, **options):
    """The `walk` of each of N processes, and which rows of a batch are on its devices."""
    rounds, rows = Rounds(N), [range(i * B // N, (i + 1) * B // N) for i in range(N)]
    with ThreadPoolExecutor(N) as pool:
        runs = [
            pool.submit(walk, Share(rounds[i], i, N, rows[i]), *args, B=B, **options)
            for i in range(N)
        ]
    return [run.result() for run in runs], rows


@pytest.mark.parametrize(("N", "B"), [(1, 4), (2, 4), (2, 5), (3, 6), (3, 7), (4, 8), (4, 3)])
def test_several_fill_the_batches_of_one(N, B):
    count = 240 // B
    whole, asked = walk(None, count, B=B)
    position = whole[-1][1]
    assert asked == position.read + 1  # each once, and the first of the next batch
    for tally in position.tallies.values():
        assert min(tally) > 0  # some were cut, some too long, empty or malformed
    shared, rows = several(N, count, B=B)
    for (found, mine), here in zip(shared, rows, strict=True):
        for (batch, reached), (wanted, expected) in zip(found, whole, strict=True):
            assert reached == expected
            for name, part in batch._asdict().items():
                full = getattr(wanted, name)
                assert part.dtype == full.dtype
                np.testing.assert_array_equal(part[here], full[here], err_msg=name)
                if name != "tokens_BT":  # all processes count and log from these
                    np.testing.assert_array_equal(part, full, err_msg=name)
        if N > 1 and B >= N:
            assert mine <= 2 / N * position.read + ROWS_PER_ROUND
    assert (whole[0][0].learn_BT % 1).any()


def test_another_number_of_processes_goes_on_where_some_stopped():
    whole, _ = walk(None, 30, B=6)
    for N, stop in ((2, 7), (3, 12), (1, 19)):
        at = Position.load(json.loads(json.dumps(whole[stop - 1][1].save(mixture()))), mixture())
        shared, rows = several(N, 30 - stop, B=6, position=at)
        for (found, _), here in zip(shared, rows, strict=True):
            for (batch, reached), (wanted, expected) in zip(found, whole[stop:], strict=True):
                assert reached == expected
                np.testing.assert_array_equal(batch.tokens_BT[here], wanted.tokens_BT[here])


def test_a_malformed_row_stops_all_at_the_same_batch():
    def until(share):
        mix, found = mixture(bad=lambda i: i == 77), []
        batches = packed_batches(mix, Position(), B=4, T=96, seed=5, share=share)
        with pytest.raises(DataError, match=r":77: broken.*data\.bad_rows=skip") as error:
            for batch, _ in batches:
                found.append(batch)
        return len(found), str(error.value)

    rounds = Rounds(3)
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(until, [Share(rounds[i], i, 3, [i]) for i in range(3)]))
    assert ends == [until(None)] * 3 and ends[0][0] > 3


def test_data_that_is_not_the_same_in_all_processes_is_refused():
    rounds = Rounds(2)

    def run(index):
        mix = Mix({"a": WeightedSource(Rows(index, 100, bad=lambda i: False))}, 5)
        return walk(Share(rounds[index], index, 2, [index]), 1, B=2, mix=mix)

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(run, index) for index in range(2)]
    with pytest.raises(DataError, match="of a, counted from 0, is not the same in all processes"):
        for end in ends:
            end.result()
