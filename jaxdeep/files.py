"""Files of text and of JSON as they lie on disk: plain, or compressed by gzip or zstd.

Which of the three is told by the first bytes; what is in a file, by its name without ".gz" or
".zst". zstd needs the package `zstandard` (extra `zst`).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxdeep.errors import DataError

COMPRESSED = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def kind(path: str | Path) -> str:
    """The ending that says what is in a file: ".jsonl" of "a.jsonl" and of "a.jsonl.gz"."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def is_compressed(path: str | Path) -> bool:
    """Whether the file is compressed. DataError where it cannot be read."""
    with reading(path), Path(path).open("rb") as file:
        return file.read(4).startswith((_GZIP, _ZSTD))


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What may go wrong while a file is read, as a DataError that names it."""
    try:
        yield
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, *_zstd_errors()) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _zstd_errors() -> tuple[type[Exception], ...]:
    """What a damaged zstd file raises; nothing where none has been opened."""
    module = sys.modules.get("zstandard")
    return (module.ZstdError,) if module else ()


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file as they were before it was compressed. DataError: it cannot be read, or
    the package for it is absent."""
    with reading(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(Path(path).open("rb"))
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(_GZIP):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif magic == _ZSTD:
            file = io.BufferedReader(stack.enter_context(_zstd(file, path)))
        yield file


def _zstd(file: BinaryIO, path: str | Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path} is compressed by zstd: pip install 'jaxdeep[zst]', or compress it by gzip"
        ) from error
    # a file may be several frames, as parallel compressors and `cat` make it
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file with plain line ends; DataError where it cannot be read."""
    with opened(path) as file:
        # universal newlines
        return io.TextIOWrapper(file, encoding="utf-8-sig").read()


def read_rows(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The JSON objects of a file of JSON lines, or of the list in a .json file, each with its
    location: the file and the line, or the index in the list. DataError with that location."""
    text = read_text(path)
    if kind(path) == ".json":
        rows = parse(text, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of objects, found {type(rows).__name__}")
        numbered = ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    else:
        # Not splitlines(), which would also cut at U+2028 and its like inside a JSON string.
        lines = ((f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), start=1))
        numbered = ((location, parse(line, location)) for location, line in lines if line.strip())
    for location, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{location}: expected an object, found {type(row).__name__}")
        yield location, row


def parse(text: str | bytes, location: str) -> Any:
    """The value of a JSON text; DataError with its location."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not JSON: {error}") from error
