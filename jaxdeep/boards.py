"""The rows of `metrics.jsonl` for TensorBoard, and for Weights & Biases where it is asked for.

TensorBoard's files are written here: they are a few lines, and tensorboardX, which does it without
TensorFlow, imports PyTorch wherever that is installed. One record is

    length (8 bytes) | masked CRC-32C of the length | event | masked CRC-32C of the event

and the event a protocol buffer of which these fields are used: 1 wall time, 2 step, 3 version of the
file, 5 summary (1 value: 1 tag, 2 number), 7 session (1 status).
"""

from __future__ import annotations

import importlib
import json
import secrets
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdeep.errors import ConfigError

FOLDER = "tensorboard"


class TensorBoard:
    """Events in `workdir/tensorboard`, one a row, each on its way to the disk when `write` returns.

    `rows` are those that the run goes on from: events of later steps are cut off, those that a kill
    left out are added, so that no step is there twice or not at all.
    """

    def __init__(self, workdir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        folder = workdir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(rows)
        last = rows[-1]["step"] if rows else -1
        files = sorted(folder.glob("events.out.tfevents.*"))
        seen = max((cut(path, last) for path in files), default=-1)
        # a new file, because a TensorBoard that is open reads on where it was in the old one
        path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._file = path.open("wb")
        self._add(_bytes(3, b"brain.Event:2"))
        self._add(
            _varint(2, last + 1), _bytes(7, _varint(1, 1))
        )  # it is to forget what was cut off
        for row in rows:
            if row["step"] > seen:
                self.write(row["step"], row)
        self._file.flush()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """All numbers of a row; what is no number is left out."""
        values = [
            _bytes(1, _bytes(1, name.encode()) + struct.pack("<Bf", 2 << 3 | 5, value))
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and abs(value) < 3e38
        ]
        self._add(_varint(2, step), _bytes(5, b"".join(values)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, *fields: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + b"".join(fields)
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))


def cut(path: Path, step: int) -> int:
    """Cuts a file of events where the first one after `step` begins, or is torn; the last step in it."""
    last, end = -1, 0
    for found, end_of in events(path):
        if found > step:
            break
        last, end = max(last, found), end_of
    with path.open("r+b") as file:
        file.truncate(end)
    return last


def events(path: Path) -> Iterator[tuple[int, int]]:
    """The step of each whole event (-1 where it has no values), and where it ends in the file."""
    data, at = path.read_bytes(), 0
    while data[at + 8 : at + 12] == _masked(data[at : at + 8]):
        (size,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12 : at + 12 + size]
        at += 12 + size + 4
        if at > len(data):
            return
        # as `_add` writes them: the time in 9 bytes, the step, what it has
        step, after = _read_varint(event, 10) if event[9] == 2 << 3 else (-1, 9)
        yield step if event[after] == 5 << 3 | 2 else -1, at


class Wandb:
    """A run of Weights & Biases that goes on where it was. Steps up to `sent` are there already."""

    def __init__(self, workdir: Path, project: str, sent: int) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ConfigError(
                f"log.wandb={project!r} needs a package that is not here: pip install wandb"
            ) from None
        name = workdir / "wandb-id"
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        self.sent = sent
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=name.read_text(),
            resume="allow",
            dir=str(workdir),
            config=json.loads((workdir / "config.json").read_text())["config"],
        )

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """One row, unless it was sent before."""
        if step > self.sent:
            self._run.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def _varint(field: int, value: int) -> bytes:
    """A whole number that is not negative, as a field."""
    out = bytearray([field << 3])
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number, and where it ends."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(0, len(value))[1:] + value


def _table() -> list[int]:
    out = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        out.append(byte)
    return out


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    """The checksum as it stands in the file, mixed so that a checksum of checksums is one."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
