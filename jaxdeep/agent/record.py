"""Trajectories to JSON lines and back: what was rolled out can be read, replayed and trained on.

One trajectory a line, with everything it holds; `read` gives back what `write` was given. With a
tokenizer each piece also says its text, for people: `read` does not look at it. What training found out
about the sampled tokens lies in a file of its own: `write_gaps`, `with_gaps`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.types import Message, Piece, Role, Stop, Task, ToolCall, Trajectory

if TYPE_CHECKING:
    from jaxdeep.chat.tokenizer import Tokenizer

FIELDS = tuple(field.name for field in dataclasses.fields(Trajectory))
LATER = {"advantage"}  # records of before have none


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
                    line = json.dumps(_row(trajectory, tokenizer), allow_nan=False)
                except (TypeError, ValueError, RecursionError) as error:
                    where = f"trajectory {index}, task {trajectory.task.id!r}"
                    raise DataError(f"{where}, cannot be written to {path}: {error}") from error
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> list[Trajectory]:
    """The trajectories of a file; DataError names the line that is torn or holds something else."""
    return list(stream(path))


def stream(path: str | Path) -> Iterator[Trajectory]:
    """As `read`, one at a time: a file may be larger than memory."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _read_line(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def write_gaps(
    path: str | Path, trajectories: Iterable[Trajectory], gaps: Iterable[np.ndarray | None]
) -> None:
    """For each trajectory of a record, in nats, how much more the trainer's log-probability of each
    sampled token was than the sampler's; None where it was not trained on. To half precision."""
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
    """The trajectories of a record, each with its gaps; None where there are none."""
    flat = np.load(path, allow_pickle=False) if Path(path).exists() else None
    at = 0
    for trajectory in trajectories:
        gap = None if flat is None else flat[at : (at := at + trajectory.sampled)]
        if gap is not None and len(gap) != trajectory.sampled:
            raise DataError(f"{path} is of {len(flat)} tokens, its record of more: remove it")
        yield trajectory, None if gap is None or np.isnan(gap).all() else gap.astype(np.float32)


def _read_line(line: str, where: str) -> Trajectory:
    try:
        return _trajectory(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{where} is no whole trajectory ({why})") from error


def _row(trajectory: Trajectory, tokenizer: Tokenizer | None) -> dict[str, Any]:
    pieces = [piece._asdict() for piece in trajectory.pieces]
    if tokenizer is not None:
        for piece in pieces:
            piece["text"] = tokenizer.decode(piece["tokens"])
    messages = [_fields(message) for message in trajectory.messages]
    for message in messages:
        message["calls"] = [_fields(call) for call in message["calls"]]
    return _fields(trajectory) | {
        "task": _fields(trajectory.task),
        "pieces": pieces,
        "messages": messages,
        "stop": trajectory.stop.value,
    }


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, not copied (as asdict would, which a deeply nested call overflows)."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _trajectory(row: dict[str, Any]) -> Trajectory:
    if set(row) | LATER != set(FIELDS):
        raise ValueError(f"expected the fields {FIELDS}, found {tuple(row)}")
    return Trajectory(
        **row
        | {
            "task": Task(**row["task"] | {"answers": tuple(row["task"]["answers"])}),
            "pieces": [_piece(piece) for piece in row["pieces"]],
            "messages": [_message(message) for message in row["messages"]],
            "stop": Stop(row["stop"]),
        }
    )


def _piece(row: dict[str, Any]) -> Piece:
    tokens, author, logps = row["tokens"], row["author"], row["logps"]
    if author not in ("policy", "world") or not all(type(token) is int for token in tokens):
        raise ValueError("a piece needs an author and integer tokens")
    if logps is not None and len(logps) != len(tokens):
        raise ValueError(f"{len(logps)} log-probabilities for {len(tokens)} tokens")
    return Piece(tokens, author, logps, version=row.get("version", 0))


def _message(row: dict[str, Any]) -> Message:
    if row["role"] not in get_args(Role):
        raise ValueError(f"no such role: {row['role']!r}")
    return Message(**row | {"calls": tuple(ToolCall(**call) for call in row["calls"])})
