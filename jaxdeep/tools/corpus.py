"""Texts to search in: files to documents, documents to passages.

    read_corpus(path)      a file or a folder of .md, .txt, .jsonl, .json    -> documents
    chunk(document, size)  one document                                      -> passages with offsets

What cannot be used raises `DataError` with the file, and the line where there is one.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdeep.errors import DataError

SUFFIXES = (".md", ".txt", ".jsonl", ".json")
TEXT_FIELDS = ("text", "contents", "paragraph_text")

_HEADING = re.compile(r"#{1,6}[ \t]+(\S.*?)(?:[ \t]+#+)?[ \t]*$")


_INK = re.compile(r"\S")
# Where a text may be cut, best first; a cut falls at the end of the match.
_BORDERS = tuple(map(re.compile, (r"\n\s*\n", r"\n", r"[.!?][\"')\]]*\s", r"\s")))


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text. `source` is the file it came from, `headings` are (offset, title) pairs in order."""

    id: str
    title: str
    text: str
    source: str = ""
    headings: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A cut of a document: `document.text[start:end] == text`, offsets in characters."""

    id: str
    title: str
    text: str
    start: int
    end: int
    source: str = ""


def read_corpus(path: str | Path) -> list[Document]:
    """The documents of a file or of all such files below a folder, in order of their paths.

    .md and .txt are one document each; .jsonl has a row a line and .json a list of rows, a row being
    an object with `text`, `contents` or `paragraph_text`, and optionally `title` and `id`. Blank texts
    are left out. DataError: nothing there, unreadable, not JSON, no text, the same id twice.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no corpus at {path}")
    root = path if path.is_dir() else path.parent
    files = sorted(_files(path)) if path.is_dir() else [path]
    documents: dict[str, Document] = {}
    for file in files:
        for document in _documents(file, file.relative_to(root).as_posix()):
            if document.id in documents:
                first = documents[document.id].source
                raise DataError(f"{file}: the id {document.id!r} is taken by a text of {first}")
            if document.text.strip():
                documents[document.id] = document
    if not documents:
        raise DataError(f"the corpus at {path} is empty: no text in any {', '.join(SUFFIXES)} file")
    return list(documents.values())


def read_text(path: Path) -> str:
    """The UTF-8 text of a file with plain line ends; DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The JSON objects of a .jsonl file or of the list in a .json file, each with where it stands."""
    text = read_text(path)
    if path.suffix == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of objects, found {type(rows).__name__}")
        numbered = ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    else:
        lines = ((f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), start=1))
        numbered = ((where, _json(line, where)) for where, line in lines if line.strip())
    for where, row in numbered:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def chunk(document: Document, size: int, overlap: int = 0) -> list[Passage]:
    """Passages of at most `size` characters that together hold all of a document.

    Cuts fall at the last paragraph border in the second half of the window, else at the last line,
    sentence or word border there, else at the last word border, else inside a word. Without
    `overlap` every character that is not white space is in exactly one passage; with it a passage
    begins up to `overlap` characters before the end of the one before, at a word where it can.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"need size >= 1 and 0 <= overlap < size, got {size=}, {overlap=}")
    text = document.text
    passages: list[Passage] = []
    done = 0  # what the passages so far reach to
    while ink := _INK.search(text, done):
        start = fresh = ink.start()
        if passages and overlap:
            start = _back(text, passages[-1], fresh, size, overlap)
        end = _cut(text, start, fresh, size)
        done = start + len(text[start:end].rstrip())
        where = f"{document.id}#{len(passages)}"
        title = _title(document, start)
        passages.append(Passage(where, title, text[start:done], start, done, document.source))
    return passages


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix in SUFFIXES and path.is_file() and not hidden:
            yield path


def _documents(path: Path, source: str) -> Iterator[Document]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}")
    if path.suffix in (".jsonl", ".json"):
        for number, (where, row) in enumerate(read_rows(path)):
            text = next((row[field] for field in TEXT_FIELDS if field in row), None)
            if not isinstance(text, str):
                raise DataError(f"{where}: no text under any of {', '.join(TEXT_FIELDS)}")
            id = str(row.get("id", f"{source}:{number}"))
            yield Document(id, str(row.get("title") or ""), text, source)
        return
    text = read_text(path)
    headings = tuple(_headings(text)) if path.suffix == ".md" else ()
    yield Document(source, headings[0][1] if headings else path.stem, text, source, headings)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _headings(text: str) -> Iterator[tuple[int, str]]:
    """Where the headings of a Markdown text stand, and what they say; fenced code has none."""
    offset, fenced = 0, False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (heading := _HEADING.match(line)):
            yield offset, heading[1]
        offset += len(line) + 1


def _title(document: Document, start: int) -> str:
    """The heading in force where a passage starts, else the document's title."""
    above = bisect.bisect_right(document.headings, start, key=lambda heading: heading[0])
    return document.headings[above - 1][1] if above else document.title


def _cut(text: str, start: int, fresh: int, size: int) -> int:
    """Where a passage from `start` ends: beyond `fresh`, the first character no passage has yet."""
    if len(text) - start <= size:
        return len(text)
    # A border one past the window is still good: its white space is stripped.
    window = (start, start + size + 1)
    half = max(start + size // 2, fresh + 1)
    for border, low in (*((border, half) for border in _BORDERS), (_BORDERS[-1], fresh + 1)):
        cuts = [match.end() for match in border.finditer(text, *window)]
        if cuts and cuts[-1] >= low:
            return cuts[-1]
    return start + size


def _back(text: str, last: Passage, fresh: int, size: int, overlap: int) -> int:
    """Where the passage after `last` begins: inside it, at a word if there is one in the overlap."""
    low = max(last.end - overlap, last.start + 1)
    gap = _BORDERS[-1].search(text, low - 1, last.end)
    start = _INK.search(text, gap.end() if gap else low).start()
    return start if fresh - start < size else fresh
