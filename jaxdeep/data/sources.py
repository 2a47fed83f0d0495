"""Where training data comes from: rows by number, each a list of pieces.

A source is anything with `source[i] -> list[Piece]`; a finite one also has a length. Files of JSON lines
are read by byte offset, `datasets` by memory map and TFDS by array_record, so none of them is ever in
memory whole; a JSON list and plain text are.
"""

from __future__ import annotations

import array
import bisect
import glob
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxdeep.chat.formats import read
from jaxdeep.chat.learn import LearnConfig
from jaxdeep.chat.qwen3 import Chat, Mark
from jaxdeep.errors import DataError
from jaxdeep.types import Piece

TEXT = (".txt", ".md")


class Source(Protocol):
    """Rows to train on, by number."""

    def __getitem__(self, index: int) -> list[Piece]: ...


class Rows(Protocol):
    """Rows as they were written, by number; `where` says for people where one stands."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def where(self, index: int) -> str: ...


class Conversations:
    """Rows with `messages` or `conversations` (`formats.read`) as pieces; an error names the row."""

    def __init__(self, rows: Rows, chat: Chat, learn: LearnConfig | None = None) -> None:
        self.rows, self.chat, self.learn = rows, chat, learn or LearnConfig()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Piece]:
        try:
            return self.chat.pieces(*read(self.rows[index], self.learn), self.learn)
        except DataError as error:
            raise DataError(f"{self.rows.where(index)}: {error}") from error


class Lines:
    """The lines of a JSONL file, each read when it is asked for: 12 bytes of memory a line.

    With `check` a file that is not UTF-8, or a line that is no JSON object, is refused at once.
    """

    def __init__(self, path: Path, *, check: bool = True) -> None:
        self.path = path
        self._starts, self._sizes = array.array("Q"), array.array("I")
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):  # only "\n" ends a line of bytes
                body = line.removeprefix(b"\xef\xbb\xbf").strip()
                if body:
                    if check:
                        self._check(body, number)
                    self._starts.append(at + line.index(body))
                    self._sizes.append(len(body))
                at += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return _json(file.read(self._sizes[index]), "the line")

    def where(self, index: int) -> str:
        """The file and the number of the line, counted when it is needed."""
        with self.path.open("rb") as file:
            before = itertools.takewhile(lambda end: end <= self._starts[index], _ends(file))
            return f"{self.path}:{1 + sum(1 for _ in before)}"

    def _check(self, body: bytes, number: int) -> None:
        try:
            body.isascii() or body.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} cannot be read: line {number}: {error}") from error
        if not (body.startswith(b"{") and body.endswith(b"}")):
            _json(body, f"{self.path}:{number}")


def _ends(file: Any) -> Any:
    """Where each line of a file ends."""
    return itertools.accumulate(map(len, file))


class Listing:
    """The elements of a JSON list, read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows = _json(path.read_text(encoding="utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]

    def where(self, index: int) -> str:
        """The file and the place in the list."""
        return f"{self.path}[{index}]"


class Joined:
    """Several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        part, place = self._find(index)
        return part[place]

    def where(self, index: int) -> str:
        """Where its file says."""
        part, place = self._find(index)
        return part.where(place)

    def _find(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def files(pattern: str | Path, *, check: bool = True) -> Rows:
    """The rows of a file, or of all files that a pattern matches: JSON lines or a JSON list."""
    parts: list[Rows] = []
    for path in _paths(pattern):
        try:
            with path.open("rb") as file:
                start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            parts.append(Listing(path) if start.startswith(b"[") else Lines(path, check=check))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    rows = Joined(parts)
    if not len(rows):
        raise DataError(f"{pattern} holds no conversation")
    return rows


class Table:
    """A data set that another library opened: any sequence of mappings, cleaned row by row."""

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self._rows, self._name = rows, name
        if not len(rows):
            raise DataError(f"{name} holds no conversation")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return _clean(self._rows[index])

    def where(self, index: int) -> str:
        """The data set and the number of the row."""
        return f"{self._name}[{index}]"


def _clean(value: Any) -> Any:
    """Plain Python: bytes as text, arrays as lists, and no keys without a value, which a table gives
    every object that shares a column with one that has them."""
    match value:
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"a text is not UTF-8: {error}") from error
        case np.ndarray() | np.generic():
            return _clean(value.tolist())
        case Mapping():
            return {key: _clean(x) for key, x in value.items() if x is not None}
        case list() | tuple():
            return [_clean(x) for x in value]
    return value


def hugging_face(name: str, split: str, config: str) -> Rows:
    """A data set by `datasets`: what `save_to_disk` left in a folder, a folder of data files (Parquet,
    Arrow, JSON), or a name on the hub."""
    import datasets  # slow to import, and only needed here

    saved = any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise DataError(f"hf:{name} has no split {split!r}, only {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{name}: no split {split!r} of it can be had ({error}). Check the name, the split, the "
            "configuration and the network, or give a folder"
        ) from error
    return Table(found, f"hf:{name}:{split}")


def tensorflow_dataset(name: str, split: str) -> Rows:
    """A data set of TFDS that was prepared in a format with random access, by its name (`data_dir` is
    $TFDS_DATA_DIR) or by its folder. TensorFlow is not needed."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"tfds:{name} needs tensorflow-datasets and array_record ({error}): pip install "
            "'tensorflow-datasets>=4.9.9' array_record (Linux and macOS), or export it to JSONL"
        ) from error
    try:
        if Path(name).is_dir():
            found = tfds.builder_from_directory(name).as_data_source(split)
        else:
            found = tfds.data_source(name, split=split, download=False)
    except (OSError, ValueError, KeyError, NotImplementedError, AssertionError) as error:
        said = str(error).split("\n")[0]
        raise DataError(
            f"tfds:{name}: no split {split!r} of it can be read by number ({said}). Prepare it with "
            f"download_and_prepare(file_format='array_record'), and give its folder or set TFDS_DATA_DIR"
        ) from error
    return Table(found, f"tfds:{name}:{split}")


class Texts:
    """Plain text in windows of at most T tokens, each token learned but the first of a window.

    Windows end where paragraphs do; one that is longer than T is cut. Each file ends with
    `<|endoftext|>`. The tokens are held in memory, 4 bytes each.
    """

    def __init__(self, pattern: str | Path, chat: Chat, T: int) -> None:
        tokens: list[np.ndarray] = []
        starts = [0]
        for path in _paths(pattern, TEXT):
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            if text.strip():
                parts = [chat.tokenizer.encode(part) for part in paragraphs(text)]
                parts[-1].append(chat.tokenizer.id(Mark.EOT))
                tokens += [np.asarray(part, np.int32) for part in parts]
                begun = starts[-1]
                starts += [begun + end for end in _cuts(map(len, parts), T)]
        if not tokens:
            raise DataError(f"{pattern} holds no text")
        self._tokens, self._starts = np.concatenate(tokens), starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[Piece]:
        first, *rest = self._tokens[self._starts[index] : self._starts[index + 1]].tolist()
        return [Piece([first], "world"), Piece(rest, "policy")]


def paragraphs(text: str) -> list[str]:
    """The text cut after its blank lines; joined again it is the text."""
    return re.split(r"(?<=\n\n)(?!\n)", text)


def _cuts(lengths: Any, T: int) -> list[int]:
    """Where windows of at most T end that hold runs of these lengths in order."""
    cuts, begun, at = [], 0, 0
    for length in lengths:
        if at > begun and at + length - begun > T:
            cuts.append(at)
            begun = at
        at += length
        while at - begun > T:
            begun += T
            cuts.append(begun)
    return cuts if at == begun else [*cuts, at]


def _paths(pattern: str | Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """The file, or in order all files that the pattern matches, or those with such a suffix in the
    folder."""
    path = Path(pattern)
    if path.is_dir() and suffixes:
        found = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
        if not found:
            raise DataError(f"{path} holds no file that ends in {' or '.join(suffixes)}")
        return found
    if path.is_file():
        return [path]
    found = sorted(p for p in map(Path, glob.glob(str(pattern), recursive=True)) if p.is_file())
    if not found:
        what = "it is a folder" if path.is_dir() else "no such file, and no file matches it"
        raise DataError(f"{pattern} cannot be read: {what}")
    return found


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
