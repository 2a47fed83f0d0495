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


def check_batch(batch: Batch) -> None:
    """ValueError with the first row and position at which a batch breaks what `Batch` promises. A wrong
    mask or a misaligned sequence would raise nothing later: the run would train on something else."""
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
