"""Trajectories to JSON lines and back: what was rolled out can be read, replayed and trained on.

One trajectory a line, with everything it holds; `read` returns what `write` was given. With a
tokenizer each piece also has its text, for people; `read` ignores it. What training measured at the
sampled tokens is in a file beside the record: `write_gaps`, `with_gaps`.

Every line says the version of the format it is in. Version 1, which said none, had one token
sequence a trajectory; it is still read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from jaxdeep import files
from jaxdeep.errors import DataError
from jaxdeep.types import Branch, Message, Piece, Role, Stop, Task, ToolCall, Trajectory, plain

if TYPE_CHECKING:
    from jaxdeep.chat.tokenizer import Tokenizer

VERSION = 2
FIELDS = tuple(field.name for field in dataclasses.fields(Trajectory))


def write(
    path: str | Path, trajectories: Iterable[Trajectory], tokenizer: Tokenizer | None = None
) -> None:
    """Write a file of trajectories, whole or not at all.

    DataError for what JSON cannot hold: NaN, infinities, other objects in a task's `meta`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for index, trajectory in enumerate(trajectories):
                try:
                    row = _row(trajectory, tokenizer)
                    line = json.dumps(row, allow_nan=False, default=plain)
                except (TypeError, ValueError, RecursionError) as error:
                    label = f"trajectory {index}, task {trajectory.task.id!r}"
                    raise DataError(f"{label}, cannot be written to {path}: {error}") from error
                file.write(line + "\n")
            file.flush()
            # Renamed only once it is on the disk: a crash leaves the old file or the new one.
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> list[Trajectory]:
    """The trajectories of a file. DataError names the first line that is torn or foreign."""
    return list(stream(path))


def stream(path: str | Path) -> Iterator[Trajectory]:
    """As `read`, one trajectory at a time: a file may be larger than memory, and compressed."""
    # As bytes, whose lines end with b"\n" alone: a text may hold U+2028 and its like.
    with files.opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _read_line(line.decode(), f"{path}:{number}")


def write_gaps(
    path: str | Path, trajectories: Iterable[Trajectory], gaps: Iterable[np.ndarray | None]
) -> None:
    """Write the gaps between trainer and sampler for the trajectories of a record, in its order.

    A trajectory's gaps are, for each of its sampled tokens over all its branches, the trainer's
    log-probability minus the sampler's, in nats; None where it was not trained on. They are rounded
    to half precision, which is enough to look at.
    """
    flat = [
        np.full(trajectory.sampled, np.nan, np.float16) if gap is None else gap.astype(np.float16)
        for trajectory, gap in zip(trajectories, gaps, strict=True)
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.concatenate(flat))


def with_gaps(
    trajectories: Iterable[Trajectory], path: str | Path
) -> Iterator[tuple[Trajectory, np.ndarray | None]]:
    """The trajectories of a record, each with the gaps that `write_gaps` wrote, or None where it
    was not trained on or there is no such file. DataError where the file belongs to another
    record."""
    flat = np.load(path, allow_pickle=False) if Path(path).exists() else None
    start = 0
    for trajectory in trajectories:
        if flat is None:
            yield trajectory, None
            continue
        end = start + trajectory.sampled
        gap, start = flat[start:end], end
        if len(gap) != trajectory.sampled:
            raise DataError(
                f"{path} holds {len(flat)} tokens and its record more: they are of different runs, "
                "remove it"
            )
        yield trajectory, None if np.isnan(gap).all() else gap.astype(np.float32)


def _read_line(line: str, location: str) -> Trajectory:
    try:
        return _trajectory(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{location} is not a whole trajectory ({reason})") from error


def _row(trajectory: Trajectory, tokenizer: Tokenizer | None) -> dict[str, Any]:
    messages = [_fields(message) for message in trajectory.messages]
    for message in messages:
        message["calls"] = [_fields(call) for call in message["calls"]]
    return (
        {"version": VERSION}
        | _fields(trajectory)
        | {
            "task": _fields(trajectory.task),
            "branches": [_branch_row(branch, tokenizer) for branch in trajectory.branches],
            "messages": messages,
            "stop": trajectory.stop.value,
        }
    )


def _branch_row(branch: Branch, tokenizer: Tokenizer | None) -> dict[str, Any]:
    pieces = [piece._asdict() for piece in branch.pieces]
    if tokenizer is not None:
        for piece in pieces:
            piece["text"] = tokenizer.decode(piece["tokens"])
    return {"pieces": pieces}


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass. Not dataclasses.asdict: it copies, and its recursion overflows on
    a deeply nested call."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _trajectory(row: dict[str, Any]) -> Trajectory:
    version = row.pop("version", 1)
    if version > VERSION:
        raise ValueError(f"version {version} of the format, of which {VERSION} is known here")
    if version == 1:
        row = _from_version_1(row)
    if set(row) != set(FIELDS):
        raise ValueError(f"expected the fields {FIELDS}, found {tuple(row)}")
    return Trajectory(
        **row
        | {
            "task": Task(**row["task"] | {"answers": tuple(row["task"]["answers"])}),
            "branches": [_branch(branch) for branch in row["branches"]],
            "messages": [_message(message) for message in row["messages"]],
            "stop": Stop(row["stop"]),
        }
    )


def _from_version_1(row: dict[str, Any]) -> dict[str, Any]:
    """A row of version 1 as one of version 2. The first of them had no advantage."""
    pieces = row.pop("pieces")
    return {"advantage": None} | row | {"branches": [{"pieces": pieces}] if pieces else []}


def _branch(row: dict[str, Any]) -> Branch:
    return Branch([_piece(piece) for piece in row["pieces"]])


def _piece(row: dict[str, Any]) -> Piece:
    tokens, author, logps, weights = row["tokens"], row["author"], row["logps"], row.get("weights")
    if author not in ("policy", "world") or not all(type(token) is int for token in tokens):
        raise ValueError("a piece needs an author and integer tokens")
    if logps is not None and len(logps) != len(tokens):
        raise ValueError(f"{len(logps)} log-probabilities for {len(tokens)} tokens")
    if weights is not None and len(weights) != len(tokens):
        raise ValueError(f"{len(weights)} weights for {len(tokens)} tokens")
    return Piece(tokens, author, logps, weights, row.get("version", 0))


def _message(row: dict[str, Any]) -> Message:
    if row["role"] not in get_args(Role):
        raise ValueError(f"no such role: {row['role']!r}")
    return Message(**row | {"calls": tuple(ToolCall(**call) for call in row["calls"])})
