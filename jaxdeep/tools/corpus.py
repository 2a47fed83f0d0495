"""A corpus to search: files to documents, documents to passages.

    read_corpus(path)      a file or a folder of .md, .txt, .jsonl, .json   -> documents
    chunk(document, size)  one document                                     -> passages with offsets

What cannot be used raises `DataError` with the file, and with the line where there is one.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from jaxdeep.errors import DataError
from jaxdeep.files import kind, read_rows, read_text

SUFFIXES = (".md", ".txt", ".jsonl", ".json")
TEXT_FIELDS = ("text", "contents", "paragraph_text")

_HEADING = re.compile(r"#{1,6}[ \t]+(\S.*?)(?:[ \t]+#+)?[ \t]*$")
_VISIBLE = re.compile(r"\S")
# Where a text may be cut, best first (paragraph, line, sentence, word); a cut is at the end of a
# match.
_SENTENCE = r"[.!?][\"')\]]*\s|[。！？｡][」』”’）]*\s?"
_BORDERS = tuple(map(re.compile, (r"\n\s*\n", r"\n", _SENTENCE, r"\s")))


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text. `source` is the file it came from, relative to the corpus; `headings` are pairs of
    (offset in characters, title), in order."""

    id: str
    title: str
    text: str
    source: str = ""
    headings: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document: `document.text[start:end] == text`, offsets in characters."""

    id: str
    title: str
    text: str
    start: int
    end: int
    source: str = ""


def read_corpus(
    path: str | Path, left_out: collections.Counter[str] | None = None
) -> list[Document]:
    """The documents of a file or of all such files below a folder, in order of their paths; any may
    be compressed (.gz, .zst).

    .md and .txt are one document each; .jsonl has one row per line and .json a list of rows, where
    a row is an object with `text`, `contents` or `paragraph_text`, and optionally `title` and `id`.
    Blank texts, hidden files and those with another ending are left out, and counted by reason in
    `left_out`. DataError: nothing there, unreadable, not JSON, no text, the same id twice.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no corpus at {path}")
    left_out = collections.Counter() if left_out is None else left_out
    root = path if path.is_dir() else path.parent
    files = sorted(_files(path, left_out)) if path.is_dir() else [path]
    documents: dict[str, Document] = {}
    for file in files:
        for document in _documents(file, file.relative_to(root).as_posix()):
            if document.id in documents:
                first = documents[document.id].source
                raise DataError(f"{file}: the id {document.id!r} is taken by a text of {first}")
            if document.text.strip():
                documents[document.id] = document
            else:
                left_out["blank texts"] += 1
    if not documents:
        raise DataError(f"the corpus at {path} is empty: no text in any {', '.join(SUFFIXES)} file")
    return list(documents.values())


def chunk(document: Document, size: int, overlap: int = 0) -> list[Passage]:
    """Passages of at most `size` characters that together have all of a document's text.

    A passage ends at the last paragraph border in the second half of its window, else at the last
    line, sentence or word border there, else at the last word border, else inside a word. Without
    `overlap` every character that is not white space is in exactly one passage; with it a passage
    begins up to `overlap` characters before the end of the previous one, at a word where it can.
    ValueError: sizes that cannot work.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"need size >= 1 and 0 <= overlap < size, got {size=}, {overlap=}")
    text = document.text
    passages: list[Passage] = []
    done = 0  # where the text of the last passage ends
    while visible := _VISIBLE.search(text, done):
        start = fresh = visible.start()
        if passages and overlap:
            start = _overlap_start(text, passages[-1], fresh, size, overlap)
        end = _passage_end(text, start, fresh, size)
        done = start + len(text[start:end].rstrip())
        id = f"{document.id}#{len(passages)}"
        title = _title(document, start)
        passages.append(Passage(id, title, text[start:done], start, done, document.source))
    return passages


def _files(folder: Path, left_out: collections.Counter[str]) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            left_out["hidden files"] += 1
        elif kind(path) in SUFFIXES:
            yield path
        else:
            left_out[
                f"files that end in {kind(path)}" if kind(path) else "files without ending"
            ] += 1


def _documents(path: Path, source: str) -> Iterator[Document]:
    if kind(path) not in SUFFIXES:
        raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}")
    if kind(path) in (".jsonl", ".json"):
        for number, (location, row) in enumerate(read_rows(path)):
            text = next((row[field] for field in TEXT_FIELDS if field in row), None)
            if not isinstance(text, str):
                raise DataError(f"{location}: no text under any of {', '.join(TEXT_FIELDS)}")
            id = str(row.get("id", f"{source}:{number}"))
            yield Document(id, str(row.get("title") or ""), text, source)
        return
    text = read_text(path)
    headings = tuple(_headings(text)) if kind(path) == ".md" else ()
    yield Document(source, headings[0][1] if headings else path.stem, text, source, headings)


def _headings(text: str) -> Iterator[tuple[int, str]]:
    """The headings of a Markdown text as (offset, title); lines in fenced code are none."""
    offset, fenced = 0, False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (heading := _HEADING.match(line)):
            yield offset, heading[1]
        offset += len(line) + 1


def _title(document: Document, start: int) -> str:
    """The last heading at or above the start of a passage, else the document's title."""
    above = bisect.bisect_right(document.headings, start, key=lambda heading: heading[0])
    return document.headings[above - 1][1] if above else document.title


def _passage_end(text: str, start: int, fresh: int, size: int) -> int:
    """Where a passage from `start` ends: after `fresh`, the first character that no passage has
    yet, so that each passage moves on."""
    if len(text) - start <= size:
        return len(text)
    # The white space at a border is stripped, so it may stand one past the window.
    window = (start, start + size + 1)
    half = max(start + size // 2, fresh + 1)
    for border, low in (*((border, half) for border in _BORDERS), (_BORDERS[-1], fresh + 1)):
        cuts = [match.end() for match in border.finditer(text, *window)]
        if cuts and cuts[-1] > start + size and not text[start + size].isspace():
            cuts.pop()  # a sentence may end without white space
        if cuts and cuts[-1] >= low:
            return cuts[-1]
    return start + size


def _overlap_start(text: str, last: Passage, fresh: int, size: int, overlap: int) -> int:
    """Where the passage after `last` begins: inside it, at a word if one begins in the overlap."""
    earliest = max(last.end - overlap, last.start + 1)
    gap = _BORDERS[-1].search(text, earliest - 1, last.end)
    start = _VISIBLE.search(text, gap.end() if gap else earliest).start()
    # Much white space after `last` can fill the whole window: then there is no room for an overlap.
    return start if fresh - start < size else fresh
