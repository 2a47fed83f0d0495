"""Metrics for TensorBoard, and for Weights & Biases where the configuration asks for it.

TensorBoard's event files are written here, without a library: the format is small, TensorFlow is
not, and tensorboardX imports PyTorch wherever that is installed. A file is a sequence of records

    length (8 bytes) | masked CRC-32C of the length | event | masked CRC-32C of the event

An event is a protocol buffer. These of its fields are used: 1 wall time, 2 step, 3 version of the
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

from jaxdeep.workdir import Workdir

# Types of a protocol buffer's fields, in the low 3 bits of a field's key.
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5
SESSION_START = 1


class TensorBoard:
    """Writes one event per row to `workdir/tensorboard`.

    `rows` are the metrics of the steps that the run continues from. Events of later steps are cut
    off and those that a kill prevented are added, so that every step is there exactly once.
    """

    def __init__(self, workdir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        folder = Workdir(workdir).tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(rows)
        last = rows[-1]["step"] if rows else -1
        files = sorted(folder.glob("events.out.tfevents.*"))
        written = max((truncate_after(path, last) for path in files), default=-1)
        # A new file, because an open TensorBoard continues to read the old one from where it was.
        path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._file = path.open("wb")
        self._add(_bytes(3, b"brain.Event:2"))
        # The start of a session makes an open TensorBoard drop the steps that were cut off.
        self._add(_varint(2, last + 1), _bytes(7, _varint(1, SESSION_START)))
        for row in rows:
            if row["step"] > written:
                self.write(row["step"], row)
        self._file.flush()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row and flushes them; anything else in it is left out, and so are
        numbers that a 4-byte float cannot hold."""
        values = [
            _bytes(1, _bytes(1, name.encode()) + struct.pack("<Bf", 2 << 3 | FLOAT, value))
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and abs(value) < 3e38
        ]
        self._add(_varint(2, step), _bytes(5, b"".join(values)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, *fields: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | DOUBLE, time.time()) + b"".join(fields)
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))


def truncate_after(path: Path, step: int) -> int:
    """Truncates an event file at the first event after `step`, or the first incomplete one; returns
    the last step that is left in it, -1 for none."""
    last, end = -1, 0
    for event_step, event_end in read_events(path):
        if event_step > step:
            break
        last, end = max(last, event_step), event_end
    with path.open("r+b") as file:
        file.truncate(end)
    return last


def read_events(path: Path) -> Iterator[tuple[int, int]]:
    """The step of each complete event, -1 for one without values, and its end in the file in
    bytes."""
    data, at = path.read_bytes(), 0
    while data[at + 8 : at + 12] == _masked(data[at : at + 8]):
        (size,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12 : at + 12 + size]
        at += 12 + size + 4
        if at > len(data):
            return
        # in the order of `_add`: 9 bytes of wall time, the step if it has one, the rest
        step, after = _read_varint(event, 10) if event[9] == 2 << 3 | VARINT else (-1, 9)
        yield step if event[after] == 5 << 3 | BYTES else -1, at


class Wandb:
    """Sends rows to Weights & Biases, as one run however often it is resumed. Steps up to `sent`
    have been sent before. The package is checked for by `setup.sections.check_extras`."""

    def __init__(self, workdir: Path, project: str, sent: int) -> None:
        wandb = importlib.import_module("wandb")
        name = Workdir(workdir).wandb_id
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        self.sent = sent
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=name.read_text(),
            resume="allow",
            dir=str(workdir),
            config=json.loads(Workdir(workdir).config.read_text())["config"],
        )

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends one row, unless it was sent before."""
        if step > self.sent:
            self._run.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def close(self) -> None:
        """Waits until all rows are sent."""
        self._run.finish()


def _varint(field: int, value: int) -> bytes:
    """A field that holds a non-negative integer: 7 bits a byte, the lowest first."""
    out = bytearray([field << 3 | VARINT])
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer at this offset, and the offset after it."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _bytes(field: int, value: bytes) -> bytes:
    """A field that holds bytes, after their number."""
    return bytes([field << 3 | BYTES]) + _varint(0, len(value))[1:] + value


def _crc_table() -> list[int]:
    out = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reversed
        out.append(byte)
    return out


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """The CRC-32C checksum, by Castagnoli's polynomial. zlib has another CRC-32 only."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    """The checksum as the file has it: rotated and shifted as LevelDB does, because the CRC of data
    that contains CRCs is problematic."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
