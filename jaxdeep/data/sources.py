"""Where training data comes from: rows by number, each a list of pieces.

A source is anything with `source[i] -> list[Piece]`; a finite one also has a length. Files of JSON
lines are read by byte offset, `datasets` by memory map and TFDS by array_record, so that none of
them is ever in memory whole; a JSON list and plain text are. Compressed JSON lines are unpacked to
a temporary file first, since no offset leads into them.
"""

from __future__ import annotations

import array
import bisect
import collections
import glob
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxdeep.chat.format import ChatFormat
from jaxdeep.chat.formats import read, unread_keys
from jaxdeep.chat.learn import LearnConfig
from jaxdeep.errors import DataError
from jaxdeep.files import is_compressed, kind, opened, parse, read_text
from jaxdeep.types import Piece

TEXT = (".txt", ".md")
TABLES = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
"""Files that `datasets` opens by themselves, and what it calls their format."""


class Source(Protocol):
    """Rows to train on, by number."""

    def __getitem__(self, index: int) -> list[Piece]: ...


class Rows(Protocol):
    """Rows of a data set as they were written, by number; `location` says where one is, for
    people."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def location(self, index: int) -> str: ...


class Conversations:
    """Rows with `messages` or `conversations` (`formats.read`) as pieces of tokens. A DataError for
    a row that cannot be read says where it is."""

    def __init__(self, rows: Rows, chat: ChatFormat, learn: LearnConfig | None = None) -> None:
        self.rows, self.chat, self.learn = rows, chat, learn or LearnConfig()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Piece]:
        try:
            return self.chat.pieces(*read(self.rows[index], self.learn), self.learn)
        except DataError as error:
            raise DataError(f"{self.rows.location(index)}: {error}") from error

    def unread(self, index: int) -> set[str]:
        """The keys of a row that can be read whose values are passed over."""
        return unread_keys(self.rows[index])


class Lines:
    """The lines of a JSONL file, each read when it is asked for; 12 bytes of memory per line.

    With `check`, a file that is not UTF-8 and a line that is not a JSON object are refused at once,
    before any training, with a DataError.
    """

    def __init__(self, path: Path, *, check: bool = True) -> None:
        self.path = self._plain = path
        if is_compressed(path):
            # It is there as long as this object is.
            self._unpacked = tempfile.NamedTemporaryFile(prefix="jaxdeep-")  # noqa: SIM115
            self._plain = Path(self._unpacked.name)
            with opened(path) as packed:
                shutil.copyfileobj(packed, self._unpacked, 1 << 20)
            self._unpacked.flush()
        self._starts, self._sizes = array.array("Q"), array.array("I")
        offset = 0
        with self._plain.open("rb") as file:
            # As bytes, because a line of text would also end at U+2028 and its like, inside a
            # string.
            for number, line in enumerate(file, 1):
                body = line.removeprefix(b"\xef\xbb\xbf").strip()
                if body:
                    if check:
                        self._check(body, number)
                    self._starts.append(offset + line.index(body))
                    self._sizes.append(len(body))
                offset += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        with self._plain.open("rb") as file:
            file.seek(self._starts[index])
            return parse(file.read(self._sizes[index]), "the line")

    def location(self, index: int) -> str:
        """The file and the number of the line."""
        # Counted only now: a number per line would cost memory that only an error needs.
        with self._plain.open("rb") as file:
            ends = itertools.accumulate(map(len, file))
            before = itertools.takewhile(lambda end: end <= self._starts[index], ends)
            return f"{self.path}:{1 + sum(1 for _ in before)}"

    def _check(self, body: bytes, number: int) -> None:
        try:
            body.isascii() or body.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} cannot be read: line {number}: {error}") from error
        # Parsing every line would take as long as an epoch: only what looks torn is parsed.
        if not (body.startswith(b"{") and body.endswith(b"}")):
            parse(body, f"{self.path}:{number}")


class Listing:
    """The elements of a JSON list, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = parse(read_text(path), str(path))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]

    def location(self, index: int) -> str:
        """The file and the index in the list."""
        return f"{self.path}[{index}]"


class Joined:
    """Several files, one after the other."""

    def __init__(self, files: Sequence[Rows]) -> None:
        self._files = files
        self._ends = list(itertools.accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        rows, local_index = self._find(index)
        return rows[local_index]

    def location(self, index: int) -> str:
        """The file and where in it."""
        rows, local_index = self._find(index)
        return rows.location(local_index)

    def _find(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)


def files(pattern: str | Path, *, check: bool = True) -> Rows:
    """The rows of a file, or of all files that a pattern matches: JSON lines or a JSON list, told
    apart by the first character. DataError: nothing there, unreadable, no rows."""
    readers: list[Rows] = []
    for path in _paths(pattern):
        try:
            with opened(path) as file:
                start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            readers.append(Listing(path) if start.startswith(b"[") else Lines(path, check=check))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    rows = Joined(readers)
    if not len(rows):
        raise DataError(f"{pattern} holds no conversation")
    return rows


class Table:
    """A data set that another library opened: any sequence of mappings."""

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self._rows, self._name = rows, name
        if not len(rows):
            raise DataError(f"{name} holds no conversation")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]

    def location(self, index: int) -> str:
        """The data set and the number of the row."""
        return f"{self._name}[{index}]"


def hugging_face(name: str, split: str, config: str) -> Rows:
    """A data set opened by `datasets`: a file of one of `TABLES` or a pattern of such, a folder
    written by `save_to_disk`, a folder of data files, or a name on the hub. DataError where there
    is none, or no such split."""
    import datasets  # slow to import, and only needed here

    saved = any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise DataError(f"hf:{name} has no split {split!r}, only {', '.join(dataset)}")
                dataset = dataset[split]
        elif kind(name) in TABLES and not Path(name).is_dir():
            paths = [str(path) for path in _paths(name)]
            dataset = datasets.load_dataset(TABLES[kind(name)], data_files=paths, split=split)
        else:
            dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{name}: no split {split!r} of it can be had ({error}). Check the name, the split, "
            "the configuration and the network, or give a folder"
        ) from error
    return Table(dataset, f"hf:{name}:{split}")


def tensorflow_dataset(name: str, split: str) -> Rows:
    """A data set of TFDS, by its name (`data_dir` is $TFDS_DATA_DIR) or by its folder; it must have
    been prepared in a format with random access. TensorFlow is not needed. DataError where it
    cannot be read."""
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
            dataset = tfds.builder_from_directory(name).as_data_source(split)
        else:
            dataset = tfds.data_source(name, split=split, download=False)
    except (OSError, ValueError, KeyError, NotImplementedError, AssertionError) as error:
        first_line = str(error).split("\n")[0]
        raise DataError(
            f"tfds:{name}: no split {split!r} of it can be read by number ({first_line}). Prepare "
            "it with download_and_prepare(file_format='array_record'), and give its folder or set "
            "TFDS_DATA_DIR"
        ) from error
    return Table(dataset, f"tfds:{name}:{split}")


class Texts:
    """Plain text in windows of at most T tokens. All tokens of a window are learned but the first,
    which has none before it to be predicted from.

    Windows end at the end of a paragraph where one fits; a paragraph longer than T is cut. Each
    file ends with the format's `document_end`. The tokens are kept in memory, 4 bytes each.
    `left_out` counts the files that are blank, and those of a folder that are no text.
    """

    def __init__(self, pattern: str | Path, chat: ChatFormat, T: int) -> None:
        tokens: list[np.ndarray] = []
        starts = [0]
        self.left_out: collections.Counter[str] = collections.Counter()
        if (folder := Path(pattern)).is_dir():
            others = (p for p in folder.rglob("*") if p.is_file() and kind(p) not in TEXT)
            self.left_out.update(f"files that do not end in {' or '.join(TEXT)}" for _ in others)
        for path in _paths(pattern, TEXT):
            text = read_text(path)
            if text.strip():
                # One paragraph at a time: the tokenizer would need several times the memory for a
                # book.
                encoded = [chat.tokenizer.encode(part) for part in paragraphs(text)]
                encoded[-1].append(chat.document_end)
                tokens += [np.asarray(ids, np.int32) for ids in encoded]
                file_start = starts[-1]
                starts += [file_start + end for end in _window_ends(map(len, encoded), T)]
            else:
                self.left_out["blank files"] += 1
        if not tokens:
            raise DataError(f"{pattern} holds no text")
        self._tokens, self._starts = np.concatenate(tokens), starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[Piece]:
        first, *rest = self._tokens[self._starts[index] : self._starts[index + 1]].tolist()
        return [Piece([first], "world"), Piece(rest, "policy")]


def paragraphs(text: str) -> list[str]:
    """The text cut after its blank lines; the parts joined are the text."""
    return re.split(r"(?<=\n\n)(?!\n)", text)


def _window_ends(lengths: Iterable[int], T: int) -> list[int]:
    """Where windows of at most T tokens end that have paragraphs of these lengths in order."""
    ends, window_start, at = [], 0, 0
    for length in lengths:
        if at > window_start and at + length - window_start > T:
            ends.append(at)
            window_start = at
        at += length
        while at - window_start > T:
            window_start += T
            ends.append(window_start)
    return ends if at == window_start else [*ends, at]


def _paths(pattern: str | Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """The file itself, all files that match the pattern, or all files below the folder with one of
    the suffixes; in order. DataError where there is none."""
    path = Path(pattern)
    if path.is_dir() and suffixes:
        inside = sorted(p for p in path.rglob("*") if kind(p) in suffixes and p.is_file())
        if not inside:
            raise DataError(f"{path} holds no file that ends in {' or '.join(suffixes)}")
        return inside
    if path.is_file():
        return [path]
    matches = sorted(p for p in map(Path, glob.glob(str(pattern), recursive=True)) if p.is_file())
    if not matches:
        what = "it is a folder" if path.is_dir() else "no such file, and no file matches it"
        raise DataError(f"{pattern} cannot be read: {what}")
    return matches
