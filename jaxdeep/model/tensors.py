"""Safetensors files read and written a tensor at a time, and folders that appear whole or not at all.

The header of a file says where the bytes of each tensor are. Nothing is mapped into memory: it holds what
was asked for and no more.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import CheckpointError

DTYPES = {"BF16": jnp.dtype("bfloat16"), "F16": np.dtype("float16"), "F32": np.dtype("float32")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGN = 64  # bytes
BLOCK = 32 * 2**20  # bytes of a file read at one time


class Entry(NamedTuple):
    """Where a tensor is: its file, the offset of its first byte, its shape and safetensors dtype."""

    file: pathlib.Path
    start: int
    shape: tuple[int, ...]
    dtype: str


def header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a file; CheckpointError where it is unreadable or shorter than its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("it does not begin with the length of a header")
            listed = json.loads(file.read(length))
        listed.pop("__metadata__", None)
        found = {
            name: Entry(path, 8 + length + at["data_offsets"][0], tuple(at["shape"]), at["dtype"])
            for name, at in listed.items()
        }
        end = 8 + length + max((at["data_offsets"][1] for at in listed.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, its header speaks of {end:,}: the file is not whole, "
            "fetch it again"
        )
    return found


def read(entry: Entry, at: Sequence[slice] | None = None) -> np.ndarray:
    """The tensor, or the part of it that one slice a dimension chooses."""
    dtype, shape = DTYPES[entry.dtype], entry.shape
    bounds = [
        s.indices(n)[:2] for s, n in zip(at or [slice(None)] * len(shape), shape, strict=True)
    ]
    (first, last), *rest = bounds
    columns = tuple(slice(*b) for b in rest)
    # numpy cannot read bfloat16 from a file, but integers of its size
    raw, width = np.dtype(f"u{dtype.itemsize}"), math.prod(shape[1:])
    # aligned, so that the CPU's backend takes the memory itself in the place of a copy
    sizes = [b - a for a, b in bounds]
    memory = np.empty(math.prod(sizes) * raw.itemsize + ALIGN, np.uint8)
    begin = -memory.ctypes.data % ALIGN
    out = memory[begin : memory.size - ALIGN + begin].view(raw).reshape(sizes)
    step = max(1, BLOCK // (width * raw.itemsize))
    with entry.file.open("rb") as file:
        file.seek(entry.start + first * width * raw.itemsize)
        for row in range(0, last - first, step):
            rows = min(step, last - first - row)
            block = np.fromfile(file, raw, rows * width)
            if block.size != rows * width:
                raise CheckpointError(f"{entry.file} ends within a tensor: fetch it again")
            out[row : row + rows] = block.reshape(rows, *shape[1:])[(slice(None), *columns)]
    return out.view(dtype)


def write(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[Sequence[int], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Write the named tensors as one file; `arrays` yields them in order, and each is let go of once it
    is on disk."""
    listed, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        listed[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (shape, dtype), array in zip(shapes.values(), arrays, strict=True):
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise ValueError(f"{array.dtype}{array.shape} in the place of {dtype}{shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def refuse_used(path: pathlib.Path) -> None:
    """CheckpointError where `path` is something else than an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists already: remove it, or choose another folder")


@contextlib.contextmanager
def fresh(path: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill that becomes `path` when the block ends well, and is removed when it fails. With
    `replace` it takes the place of what was there."""
    path = path.absolute()
    if not replace:
        refuse_used(path)
    part, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if replace and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there only where this failed
    shutil.rmtree(old, ignore_errors=True)
