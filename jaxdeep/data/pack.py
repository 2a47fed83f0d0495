"""Token runs to rows, rows to batches: the only file that lines up predictions with targets.

Several sequences share a packed row; `segments_BT` keeps them apart and positions restart with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.types import Batch, Piece, Row


def to_row(pieces: Iterable[Piece], *, advantage: float = 1.0) -> Row:
    """One sequence from its pieces: what the policy wrote is learned, what the world wrote is not,
    unless a piece says otherwise."""
    tokens, learn, logp = [], [], []
    for piece in pieces:
        n = len(piece.tokens)
        if piece.logps is not None and len(piece.logps) != n:
            raise ValueError(f"a piece of {n} tokens carries {len(piece.logps)} log-probabilities")
        tokens += piece.tokens
        if piece.weights is not None and len(piece.weights) != n:
            raise ValueError(f"a piece of {n} tokens carries {len(piece.weights)} weights")
        learn += [piece.author == "policy"] * n if piece.weights is None else piece.weights
        logp += [0.0] * n if piece.logps is None else piece.logps
    learn = np.asarray(learn, np.float32)
    if len(learn) and learn[0]:
        raise ValueError(
            "the first token of a sequence is predicted by nothing: it cannot be learned"
        )
    return Row(
        np.asarray(tokens, np.int32),
        learn,
        np.asarray(logp, np.float32),
        learn * np.float32(advantage),
    )


def pack(rows: Sequence[Row], *, B: int, T: int, pad: int = 0) -> list[Batch]:
    """`rows` in batches of B packed rows of T positions, first fit by falling length.

    Every sequence is in exactly one place, whole; one longer than T is a DataError. The last batch is
    filled up with empty rows, so that every batch has one shape.
    """
    bins = [[rows[i] for i in held] for held in _bins([len(row.tokens) for row in rows], T)]
    return [pack_bins(bins[i : i + B], B, T, pad) for i in range(0, len(bins), B)]


def unpack(rows: Sequence[Row], arrays: Sequence[np.ndarray], T: int) -> list[np.ndarray]:
    """The values of each row, from an array [B, T] for each batch that `pack` made of the rows."""
    whole = np.concatenate(arrays)
    out: list[Any] = [None] * len(rows)
    for b, held in enumerate(_bins([len(row.tokens) for row in rows], T)):
        at = 0
        for i in held:
            out[i] = whole[b, at : (at := at + len(rows[i].tokens))]
    return out


def _bins(sizes: Sequence[int], T: int) -> list[list[int]]:
    """Which sequences share a packed row, by their numbers."""
    if (long := max(sizes, default=0)) > T:
        raise DataError(f"a sequence of {long} tokens does not fit in {T}: raise the batch length")
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):  # equal lengths keep order
        for i, free in enumerate(room):
            if sizes[number] <= free:
                bins[i].append(number)
                room[i] -= sizes[number]
                break
        else:
            bins.append([number])
            room.append(T - sizes[number])
    return bins


def pack_bins(bins: Sequence[Sequence[Row]], B: int, T: int, pad: int = 0) -> Batch:
    """A batch whose row b holds the sequences of `bins[b]` one after the other; the rest is padding."""
    whole, part = np.int32, np.float32
    batch = Batch(
        tokens_BT=np.full((B, T), pad, whole),
        segments_BT=np.zeros((B, T), whole),
        positions_BT=np.zeros((B, T), whole),
        learn_BT=np.zeros((B, T), part),
        logp_BT=np.zeros((B, T), part),
        advantage_BT=np.zeros((B, T), part),
    )
    for b, rows in enumerate(bins):
        at = 0
        for segment, row in enumerate(rows, 1):
            span = slice(at, at + len(row.tokens))
            batch.tokens_BT[b, span] = row.tokens
            batch.segments_BT[b, span] = segment
            batch.positions_BT[b, span] = np.arange(len(row.tokens))
            batch.learn_BT[b, span] = row.learn
            batch.logp_BT[b, span] = row.logp
            batch.advantage_BT[b, span] = row.advantage
            at = span.stop
    return batch
