"""Packing: every sequence whole in one place, nothing learned that was not written, one shape."""

import collections

import numpy as np
import pytest

from jaxdeep.data import pack as pack_
from jaxdeep.data.pack import pack, pack_bins, to_row
from jaxdeep.errors import DataError
from jaxdeep.types import Piece, Row

FIELDS = {"tokens": np.int32, "learn": np.float32, "logp": np.float32, "advantage": np.float32}


def random_rows(rng, most=60, longest=40):
    """Rows as rollouts make them: runs of the world and of a policy in turn."""
    rows = []
    for _ in range(rng.integers(1, most)):
        room, pieces, author = rng.integers(2, longest + 1), [], "world"
        while room:
            n = rng.integers(1, room + 1)
            tokens = rng.integers(1, 1000, n).tolist()
            logps = (-rng.random(n)).tolist() if author == "policy" else None
            pieces.append(Piece(tokens, author, logps))
            author = "policy" if author == "world" else "world"
            room -= n
        rows.append(to_row(pieces, advantage=float(rng.normal())))
    return rows


def unpack(batches):
    """The sequences of batches, each with its positions; its places must lie side by side."""
    found = []
    for batch in batches:
        for b, segments in enumerate(batch.segments_BT):
            for segment in range(1, segments.max(initial=0) + 1):
                at = np.flatnonzero(segments == segment)
                assert len(at) and at[-1] - at[0] + 1 == len(at)
                row = Row(*(getattr(batch, f"{name}_BT")[b, at] for name in FIELDS))
                found.append((row, batch.positions_BT[b, at]))
    return found


def key(row):
    return tuple(part.tobytes() for part in row)


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_is_whole_in_exactly_one_place(seed):
    rng = np.random.default_rng(seed)
    rows, B, T = random_rows(rng), int(rng.integers(1, 6)), int(rng.integers(40, 90))
    found = unpack(pack(rows, B=B, T=T))
    assert collections.Counter(map(key, rows)) == collections.Counter(key(row) for row, _ in found)
    for row, positions in found:
        assert (positions == np.arange(len(row.tokens))).all()


@pytest.mark.parametrize("seed", range(10))
def test_values_of_batches_go_back_to_their_rows(seed):
    rng = np.random.default_rng(seed)
    rows, B, T = random_rows(rng), int(rng.integers(1, 6)), int(rng.integers(40, 90))
    batches = pack(rows, B=B, T=T)
    values = pack_.unpack(rows, [batch.tokens_BT for batch in batches], T)
    assert [v.tolist() for v in values] == [row.tokens.tolist() for row in rows]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_no_sequence_is_padding_at_the_end_that_teaches_nothing(seed):
    rng = np.random.default_rng(seed)
    rows, pad = random_rows(rng), 7
    batches = pack(rows, B=3, T=64, pad=pad)
    for batch in batches:
        empty_BT = batch.segments_BT == 0
        assert (np.diff(empty_BT.astype(int), axis=1) >= 0).all()
        assert (batch.tokens_BT[empty_BT] == pad).all()
        for name in ("positions", "learn", "logp", "advantage"):
            assert not getattr(batch, f"{name}_BT")[empty_BT].any(), name
    assert sum(b.learn_BT.sum() for b in batches) == sum(row.learn.sum() for row in rows) > 0
    assert sum((b.segments_BT > 0).sum() for b in batches) == sum(len(row.tokens) for row in rows)


@pytest.mark.parametrize("seed", range(30))
def test_batches_have_one_shape_and_are_packed_tight(seed):
    rng = np.random.default_rng(seed)
    rows, B, T = random_rows(rng), int(rng.integers(1, 6)), 48
    batches = pack(rows, B=B, T=T)
    for batch in batches:
        for name, part in batch._asdict().items():
            whole = name in ("tokens_BT", "segments_BT", "positions_BT")
            assert part.shape == (B, T) and part.dtype == (np.int32 if whole else np.float32), name
    used = [(row > 0).sum() for batch in batches for row in batch.segments_BT]
    filled = [n for n in used if n]
    assert used == filled + [0] * (len(used) - len(filled)) and len(used) - len(filled) < B
    # first fit: no two rows that would have fitted into one
    assert sum(n <= T / 2 for n in filled) <= 1


def test_room_is_used_to_the_last_position_and_the_longest_come_first():
    def row(n):
        return to_row([Piece([n] * n, "world")])

    (batch,) = pack([row(n) for n in (4, 4, 6, 3, 6, 3, 4)], B=3, T=10)
    assert [sorted(set(tokens.tolist())) for tokens in batch.tokens_BT] == [[4, 6], [4, 6], [3, 4]]
    assert (batch.segments_BT > 0).all()


def test_a_sequence_as_long_as_the_batch_fits_and_a_longer_one_is_refused():
    def row(n):
        return to_row([Piece([1] * (n - 1), "world"), Piece([2], "policy")])

    (batch,) = pack([row(10), row(10)], B=2, T=10)
    assert (batch.segments_BT == 1).all()
    with pytest.raises(DataError, match=r"11 tokens .* 10"):
        pack([row(3), row(11), row(4)], B=2, T=10)


def test_no_rows_are_no_batches_and_no_bins_are_padding():
    assert pack([], B=2, T=10) == []
    batch = pack_bins([], 2, 10, pad=3)
    assert (batch.tokens_BT == 3).all()
    assert not any(part.any() for part in batch[1:])


@pytest.mark.parametrize("seed", range(10))
def test_a_row_learns_what_the_policy_wrote_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    pieces = [Piece([5, 6], "world")]
    for _ in range(rng.integers(1, 6)):
        n = int(rng.integers(0, 5))
        author = rng.choice(["policy", "world"])
        logps = [-1.5] * n if author == "policy" and rng.random() < 0.5 else None
        pieces.append(Piece(rng.integers(0, 99, n).tolist(), author, logps))
    row = to_row(pieces, advantage=-0.75)
    assert {name: part.dtype for name, part in row._asdict().items()} == FIELDS
    assert len({len(part) for part in row}) == 1
    assert row.tokens.tolist() == [t for piece in pieces for t in piece.tokens]
    wrote = [piece.author == "policy" for piece in pieces for _ in piece.tokens]
    assert row.learn.tolist() == wrote
    assert row.advantage.tolist() == [-0.75 * w for w in wrote]
    sampled = [x for p in pieces for x in (p.logps or [0.0] * len(p.tokens))]
    assert row.logp.tolist() == sampled


def test_a_token_that_nothing_predicts_is_not_learned():
    with pytest.raises(ValueError, match="first token"):
        to_row([Piece([1, 2], "policy")])
    with pytest.raises(ValueError, match="first token"):
        to_row([Piece([], "world"), Piece([1, 2], "policy")])


def test_log_probabilities_that_do_not_match_their_tokens_are_refused():
    with pytest.raises(ValueError, match="2 tokens carries 1"):
        to_row([Piece([1], "world"), Piece([2, 3], "policy", [-0.5])])
