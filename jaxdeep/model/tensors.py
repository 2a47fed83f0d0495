"""Safetensors files read and written a tensor at a time, and folders that appear complete or not at
all.

The header of a file says where the bytes of each tensor are, and only those that are asked for are
read. Files are not memory-mapped: pages of a map count as the process's memory until the kernel
drops them.
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

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import CheckpointError
from jaxdeep.parallel import exchange

DTYPES = {
    "BF16": jnp.dtype("bfloat16"),
    "F16": np.dtype("float16"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGN = 64  # bytes; what XLA's CPU backend asks of memory that it takes over without a copy
BLOCK = 32 * 2**20  # bytes of a file that are read at one time


class Entry(NamedTuple):
    """Where a tensor lies: its file, the offset of its first byte, shape and safetensors dtype."""

    file: pathlib.Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def read_as(self) -> np.dtype:
        """The dtype that `read` gives: float32 for float64, which nothing computes in."""
        return DTYPES["F32" if self.dtype == "F64" else self.dtype]

    def read(self, slices: Sequence[slice] | None = None) -> np.ndarray:
        """The tensor, or the part that `slices`, one a dimension, choose, as `read_as`.
        CheckpointError if the file ends early."""
        dtype, shape = DTYPES[self.dtype], self.shape
        slices = slices or [slice(None)] * len(shape)
        bounds = [s.indices(n)[:2] for s, n in zip(slices, shape, strict=True)]
        (first, last), *rest = bounds
        columns = tuple(slice(*b) for b in rest)
        # numpy cannot read bfloat16 from a file; it is read as integers of the same size
        raw, width = np.dtype(f"u{dtype.itemsize}"), math.prod(shape[1:])
        # aligned, so that XLA's CPU backend takes the memory over and does not copy it
        sizes = [b - a for a, b in bounds]
        memory = np.empty(math.prod(sizes) * raw.itemsize + ALIGN, np.uint8)
        begin = -memory.ctypes.data % ALIGN
        out = memory[begin : memory.size - ALIGN + begin].view(raw).reshape(sizes)
        step = max(1, BLOCK // (width * raw.itemsize))
        with self.file.open("rb") as file:
            file.seek(self.start + first * width * raw.itemsize)
            for row in range(0, last - first, step):
                rows = min(step, last - first - row)
                block = np.fromfile(file, raw, rows * width)
                if block.size != rows * width:
                    raise CheckpointError(f"{self.file} ends within a tensor: fetch it again")
                out[row : row + rows] = block.reshape(rows, *shape[1:])[(slice(None), *columns)]
        return out.view(dtype).astype(self.read_as, copy=False)


def header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a file by name. CheckpointError for a file that is unreadable, or not of the
    size that its header implies (an interrupted download)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("it does not begin with the length of a header")
            described = json.loads(file.read(length))
        described.pop("__metadata__", None)
        data = 8 + length  # offsets count from the end of the header
        entries = {
            name: Entry(
                path, data + about["data_offsets"][0], tuple(about["shape"]), about["dtype"]
            )
            for name, about in described.items()
        }
        end = data + max((about["data_offsets"][1] for about in described.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, its header speaks of {end:,}: the file is not whole, "
            "fetch it again"
        )
    return entries


def write(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[Sequence[int], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Write the named tensors as one file. `arrays` yields them in the order of `shapes`; each is
    freed once it is written."""
    described, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (shape, dtype), array in zip(shapes.values(), arrays, strict=True):
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise ValueError(f"{array.dtype}{array.shape} instead of {dtype}{shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def refuse_used(path: pathlib.Path) -> None:
    """CheckpointError if `path` exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists already: remove it, or choose another folder")


@contextlib.contextmanager
def fresh(path: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A temporary folder that is renamed to `path` when the block succeeds, and removed when it
    fails. With `replace` it takes the place of an existing folder, which stays until then."""
    path = path.absolute()
    if not replace:
        refuse_used(path)
    # beside `path`: a rename is atomic only within a file system
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # exists only after a failure
    shutil.rmtree(old, ignore_errors=True)


def on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array as numpy, on every process: all of them must call it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    return exchange.all_gather(x, tiled=True)
