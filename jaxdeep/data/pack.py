"""Pieces to rows, and rows to packed batches.

A row keeps what is predicted aligned with its tokens: mask, log-probability and advantage at
position t are those of token t. Only here are they lined up. Several sequences share a packed row
of a batch; `segments_BT` keeps them apart, and positions restart with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.types import Batch, Piece, Row


def to_row(pieces: Iterable[Piece], *, advantage: float = 1.0) -> Row:
    """One sequence from its pieces. The policy's tokens are learned and the world's are not, unless
    a piece has weights that say otherwise. ValueError where a piece's lists differ in length, or
    where the first token would be learned."""
    tokens, learn, logp = [], [], []
    for piece in pieces:
        n = len(piece.tokens)
        if piece.logps is not None and len(piece.logps) != n:
            raise ValueError(f"a piece of {n} tokens carries {len(piece.logps)} log-probabilities")
        if piece.weights is not None and len(piece.weights) != n:
            raise ValueError(f"a piece of {n} tokens carries {len(piece.weights)} weights")
        tokens += piece.tokens
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

    Every sequence is whole and in exactly one place; DataError for one longer than T. The last
    batch is filled up with empty rows, so that all batches have one shape and one program serves
    them.
    """
    bins = [[rows[i] for i in indices] for indices in _bins([len(row.tokens) for row in rows], T)]
    return [pack_bins(bins[i : i + B], B, T, pad) for i in range(0, len(bins), B)]


def unpack(rows: Sequence[Row], arrays: Sequence[np.ndarray], T: int) -> list[np.ndarray]:
    """The values of each row, from an array [B, T] for each batch that `pack` made of the rows."""
    packed = np.concatenate(arrays)
    out: list[Any] = [None] * len(rows)
    for b, indices in enumerate(_bins([len(row.tokens) for row in rows], T)):
        start = 0
        for i in indices:
            end = start + len(rows[i].tokens)
            out[i], start = packed[b, start:end], end
    return out


def _bins(sizes: Sequence[int], T: int) -> list[list[int]]:
    """The indices of the sequences that share each packed row. It follows from the sizes alone, so
    `unpack` finds again where `pack` put them."""
    if (longest := max(sizes, default=0)) > T:
        raise DataError(f"a sequence of {longest} tokens does not fit in {T}: raise batch.length")
    bins: list[list[int]] = []
    room: list[int] = []  # positions left in each bin
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # stable: equal sizes in order
        for b, free in enumerate(room):
            if sizes[index] <= free:
                bins[b].append(index)
                room[b] -= sizes[index]
                break
        else:
            bins.append([index])
            room.append(T - sizes[index])
    return bins


def pack_bins(bins: Sequence[Sequence[Row]], B: int, T: int, pad: int = 0) -> Batch:
    """A batch whose row b holds the sequences of `bins[b]` one after the other; the rest is
    padding."""
    ids, values = np.int32, np.float32
    batch = Batch(
        tokens_BT=np.full((B, T), pad, ids),
        segments_BT=np.zeros((B, T), ids),
        positions_BT=np.zeros((B, T), ids),
        learn_BT=np.zeros((B, T), values),
        logp_BT=np.zeros((B, T), values),
        advantage_BT=np.zeros((B, T), values),
    )
    for b, rows in enumerate(bins):
        start = 0
        for segment, row in enumerate(rows, 1):
            span = slice(start, start + len(row.tokens))
            batch.tokens_BT[b, span] = row.tokens
            batch.segments_BT[b, span] = segment
            batch.positions_BT[b, span] = np.arange(len(row.tokens))
            batch.learn_BT[b, span] = row.learn
            batch.logp_BT[b, span] = row.logp
            batch.advantage_BT[b, span] = row.advantage
            start = span.stop
    return batch


def check_batch(batch: Batch) -> None:
    """ValueError with the first row and position at which a batch breaks what `Batch` promises. A
    wrong mask or a misaligned sequence would raise nothing later: the run would train on something
    else."""
    _, segments_BT, positions_BT, learn_BT, logp_BT, advantage_BT = batch
    shapes = {name: part.shape for name, part in batch._asdict().items()}
    if len(set(shapes.values())) != 1 or segments_BT.ndim != 2:
        raise ValueError(f"the arrays of a batch must have one shape [B, T]: {shapes}")
    # each position's left neighbour; column 0 has none, as if padding ended there
    left_segments_BT, left_positions_BT = (
        np.roll(x_BT, 1, axis=1) for x_BT in (segments_BT, positions_BT)
    )
    left_segments_BT[:, :1], left_positions_BT[:, :1] = 0, -1
    learned_BT, used_BT = learn_BT != 0, segments_BT != 0
    starts_BT = segments_BT != left_segments_BT
    after_padding_BT = (left_segments_BT == 0) & (np.arange(segments_BT.shape[1]) > 0)
    violations = {
        "segments do not count 1, 2, ... up to the padding": used_BT
        & starts_BT
        & (after_padding_BT | (segments_BT != left_segments_BT + 1)),
        "positions do not count up from 0 in each segment": used_BT
        & (positions_BT != np.where(starts_BT, 0, left_positions_BT + 1)),
        "the mask is negative or not finite": ~((learn_BT >= 0) & (learn_BT < np.inf)),
        "padding is learned": learned_BT & ~used_BT,
        "the first token of a segment is learned, but nothing predicts it": learned_BT & starts_BT,
        "there is an advantage where nothing is learned": (advantage_BT != 0) & ~learned_BT,
        "an advantage is not finite": ~np.isfinite(advantage_BT),
        # rounding may put the log-probability of a certain token a little above 0
        "the log-probability of a learned token is not a number up to 0": learned_BT
        & ~((logp_BT <= 1e-3) & (logp_BT > -np.inf)),
    }
    for violation, wrong_BT in violations.items():
        if wrong_BT.any():
            b, t = np.argwhere(wrong_BT)[0].tolist()
            values = batch.__class__(*(part[b, t].item() for part in batch))
            raise ValueError(f"{violation}: row {b}, position {t} of a batch, {values}")
