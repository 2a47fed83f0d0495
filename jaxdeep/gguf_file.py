"""GGUF files: their metadata and where their tensors lie, read without taking memory for weights.

`open_gguf` reads the header of a file, or of all parts of a split one, with the `gguf` package of
llama.cpp. The model half takes the tensors from it, the chat half the tokenizer.
"""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any, NamedTuple

from jaxdeep.errors import CheckpointError

SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # the names of the parts of a split file


class Tensor(NamedTuple):
    """Where a tensor lies: its file, the offset of its first byte, its shape with the inner
    dimension last, and the name of its GGML type."""

    file: pathlib.Path
    start: int
    shape: tuple[int, ...]
    type: str


class GgufFile(NamedTuple):
    """The content of a GGUF file: metadata by key, tensors by name."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str) -> Any:
        """A value of the metadata; CheckpointError where there is none."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} lacks {key} in its metadata")
        return self.metadata[key]


def is_gguf(path: str | pathlib.Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return str(path).endswith(".gguf")


def open_gguf(path: str | pathlib.Path) -> GgufFile:
    """The header of a GGUF file; of a split one all parts, whichever is named. CheckpointError for
    a file that is no GGUF, that is cut short, or whose parts are not all there."""
    path = pathlib.Path(path).expanduser()
    files = _parts(path)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"there is no {', '.join(missing)}")
    return _open(path, tuple((file, file.stat().st_mtime_ns) for file in files))


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    match = SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{i + 1:05}-of-{count}.gguf") for i in range(int(count))]


@functools.lru_cache(maxsize=4)  # the texts of a vocabulary take a second or two to read
def _open(path: pathlib.Path, files: tuple[tuple[pathlib.Path, int], ...]) -> GgufFile:
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for file, _ in files:
        more, located = _read_header(file)
        metadata = more | metadata
        tensors |= located
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise CheckpointError(f"{path} speaks of {expected} tensors, its parts hold {len(tensors)}")
    return GgufFile(path, metadata, tensors)


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of one file."""
    import gguf  # only who reads such a file needs the package

    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        # the reader maps all tensors at once: a file that is cut short fails there
        raise CheckpointError(
            f"{path} ({size:,} bytes) cannot be read as GGUF: it is another kind of file, or not "
            f"whole ({error}); fetch it again"
        ) from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} has big-endian numbers: take the little-endian file")
    tensors = {}
    for tensor in reader.tensors:
        end = tensor.data_offset + tensor.n_bytes
        if end > size:
            raise CheckpointError(
                f"{path} has {size:,} bytes, but {tensor.name} ends at {end:,}: the file is not "
                "whole, fetch it again"
            )
        shape = tuple(int(n) for n in tensor.shape[::-1])
        tensors[tensor.name] = Tensor(path, int(tensor.data_offset), shape, tensor.tensor_type.name)
    return metadata, tensors
