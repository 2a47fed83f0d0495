"""What a conversation was shown, as numbered sentences that an answer can cite.

    show(source)                    the text that a model reads: a title, then one sentence a line
    read_shown(text, order, shelf)  the same text read back, after it was cut, into a shelf
    Shelf                           the sources of a conversation by handle

    S2 Cyprus - https://example.org/cyprus
    [1] Cyprus is an island country.
    [2] The currency of Cyprus is the Euro.

A sentence is shown on one line, so no text of a source can begin a line and pass for a header or
for a sentence of its own. What can be cited is what `read_shown` finds in the messages of the
conversation, never what an environment remembers having found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jaxdeep.envs.research.fold import Folded, fold
from jaxdeep.envs.research.words import ABBREVIATIONS, BEFORE_NUMBERS

LONGEST_SENTENCE = 600  # characters; a longer one is divided, so that a handle stays a small place

_HEADER = re.compile(r"S(\d{1,9})(?: (.*))?")
_NUMBERED = re.compile(r"\[(\d{1,9})\] ?(.*)")
_CUT = re.compile(r"\[cut here: \d+ of \d+ tokens shown\]")
_URL = re.compile(r"(?:^| - )(https?://\S+)$")

_END = re.compile(
    r"[.!?…][\"'”’)\]»]*(?=\s)(?!\s{1,3}[a-z])"
    r"|[。！？][”’」』）]*"
    r"|\n(?=[ \t]{0,80}(?:\n|\||(?:[-*•]|#{1,6}|\d{1,3}[.)])\s))"
)


class Sentence(NamedTuple):
    """A citable place: `text[start:end]` of its source, numbered from 1, first shown by message
    (or other event) number `order` of the conversation."""

    number: int
    start: int
    end: int
    order: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A text that was shown. `text` is in NFC with "\\n" as line end; offsets in it are code
    points. A source without text is one that is only named, in a list of references say."""

    id: str
    text: str
    sentences: tuple[Sentence, ...]
    title: str = ""
    url: str = ""
    media_type: str = "text/plain"
    retrieved_at: str = ""
    numbered: bool = False  # whether the model was shown the numbers of its sentences

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def folded(self) -> Folded:
        """The text as quotations are compared with it."""
        return fold(self.text)

    @cached_property
    def by_number(self) -> Mapping[int, Sentence]:
        return {sentence.number: sentence for sentence in self.sentences}

    def around(self, start: int, end: int) -> list[Sentence]:
        """The sentences that `text[start:end]` touches."""
        return [s for s in self.sentences if s.start < end and start < s.end]


def source(id: str, text: str, *, order: int = 0, **facts: Any) -> Source:
    """A source of the whole text, divided into sentences. `facts` are the other fields."""
    text = normal(text)
    spans = enumerate(split(text), start=1)
    return Source(id, text, tuple(Sentence(n, *span, order) for n, span in spans), **facts)


def normal(text: str) -> str:
    """The text as it is stored: NFC, "\\n" for every line end, no character that is not text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    return unicodedata.normalize("NFC", text)


def split(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence, in order and without white space around it.

    A sentence ends at ., ! or ? before white space, at their full-width forms, at an empty line and
    before an item of a list or a row of a table, but not after an abbreviation or an initial. A
    heading of Markdown is one by itself. What is longer than `LONGEST_SENTENCE` is divided at a
    space.
    """
    spans, start = [], 0
    for match in _END.finditer(text):
        if match.end() <= start or _goes_on(text, match):
            continue
        spans.append((start, match.end()))
        start = match.end()
    spans.append((start, len(text)))
    return [part for span in spans for part in _parts(text, *span)]


def _goes_on(text: str, match: re.Match[str]) -> bool:
    """Whether the match is the full stop of an abbreviation rather than of a sentence."""
    if match[0] != ".":
        return False
    words = text[max(0, match.start() - 30) : match.start()].split()
    word = words[-1].lstrip("([\"'“‘") if words else ""
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    number = (
        word.lower() in BEFORE_NUMBERS and text[match.end() : match.end() + 2].strip().isdigit()
    )
    return initial or number or word.lower() in ABBREVIATIONS


def _parts(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span without outer white space, divided where it is too long; nothing where it is
    empty."""
    while start < end:
        piece = text[start : min(end, start + LONGEST_SENTENCE)]
        if (heading := piece.lstrip()).startswith("#") and "\n" in heading:
            piece = piece[: piece.index("\n", len(piece) - len(heading)) + 1]
        elif start + len(piece) < end:
            at = max(piece.rfind(" "), piece.rfind("\n"))
            piece = piece[: at + 1] if at > LONGEST_SENTENCE // 2 else piece
        left = len(piece) - len(piece.lstrip())
        if stripped := piece.strip():
            yield start + left, start + left + len(stripped)
        start += len(piece)


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def show(shown: Source, numbers: Iterable[int] | None = None) -> str:
    """A source as a model reads it, all sentences or those of `numbers`."""
    chosen = shown.sentences if numbers is None else [shown.by_number[n] for n in numbers]
    about = " - ".join(filter(None, (one_line(shown.title), one_line(shown.url))))
    head = f"{shown.id} {about}".rstrip()
    lines = (f"[{s.number}] {one_line(shown.text[s.start : s.end])}" for s in chosen)
    return "\n".join([head, *lines])


class Shelf:
    """The sources that a conversation was shown, by handle, in order of appearance. What is shown
    again adds the sentences that were not there, or only in part; any other keeps the text that it
    first had."""

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        self._sources: dict[str, Source] = {}
        self._ids: dict[str, str] = {}  # in lower case
        self._vocabulary: frozenset[str] | None = None
        for each in sources:
            self.add(each)

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Source]:
        return iter(self._sources.values())

    def get(self, id: str) -> Source | None:
        """The source of that handle, however its letters are cased; None without one."""
        return self._sources.get(id) or self._sources.get(self._ids.get(id.lower(), ""))

    def add(self, new: Source) -> None:
        """Puts a source on the shelf, or what of it was not there: of a numbered one the sentences
        with other numbers, of one that was shown as a text the sentences with other words, which
        are then numbered on."""
        self._vocabulary = None
        self._ids.setdefault(new.id.lower(), new.id)
        old = self._sources.get(new.id)
        if old is None or not old.text:
            self._sources[new.id] = new
            return
        if new.numbered:
            fresh = [s for s in new.sentences if _is_more(new, s, old)]
        else:
            fresh = [s for s in new.sentences if new.text[s.start : s.end] not in old.text]
            last = max((s.number for s in old.sentences), default=0)
            fresh = [s._replace(number=last + n) for n, s in enumerate(fresh, start=1)]
        if fresh:
            self._sources[new.id] = _joined(old, new, fresh)

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every word of every source, in lower case."""
        if self._vocabulary is None:
            words = (re.findall(r"\w+", s.folded.text) for s in self)
            self._vocabulary = frozenset(word for found in words for word in found)
        return self._vocabulary


def _is_more(new: Source, sentence: Sentence, old: Source) -> bool:
    """Whether a sentence was not shown before, or was cut then."""
    before = old.by_number.get(sentence.number)
    if before is None:
        return True
    text, cut = new.text[sentence.start : sentence.end], old.text[before.start : before.end]
    return len(text) > len(cut) and text.startswith(cut)


def _joined(old: Source, new: Source, fresh: Sequence[Sentence]) -> Source:
    """The source with sentences of another showing, all in the order of their numbers."""
    numbers = {s.number for s in fresh}
    kept = [s for s in old.sentences if s.number not in numbers]
    pieces = [(s.number, old.text[s.start : s.end], s.order) for s in kept]
    pieces += [(s.number, new.text[s.start : s.end], s.order) for s in fresh]
    facts = {"title": old.title or new.title, "url": old.url or new.url}
    facts |= {"media_type": old.media_type, "retrieved_at": old.retrieved_at}
    return assembled(old.id, sorted(pieces), numbered=old.numbered, **facts)


def assembled(id: str, pieces: Sequence[tuple[int, str, int]], **facts: Any) -> Source:
    """A source of separate sentences, one a line: (number, text, order) of each."""
    text, sentences = "", []
    for number, words, order in pieces:
        start = len(text)
        text += words + "\n"
        sentences.append(Sentence(number, start, start + len(words), order))
    return Source(id, text, tuple(sentences), **facts)


def read_shown(text: str, order: int, shelf: Shelf) -> None:
    """Add to the shelf what a result with numbered sentences showed.

    The result must begin with the header of a source, as `show` writes it: a message of a tool that
    repeats a query or an error shows nothing, whatever is in it. Where the result was cut, the last
    sentence is as much of it as was shown, and a sentence of which nothing was shown is not there.
    """
    lines = normal(text).split("\n")
    if not _HEADER.fullmatch(lines[0]):
        return
    about, pieces = "", []
    id = ""
    for line in [*lines, "S0"]:
        if header := _HEADER.fullmatch(line):
            if pieces:
                url = match[1] if (match := _URL.search(about)) else ""
                title = about.removesuffix(url).removesuffix(" - ")
                shelf.add(assembled(id, pieces, title=title, url=url, numbered=True))
            id, about, pieces = f"S{int(header[1])}", header[2] or "", []
        elif _CUT.fullmatch(line):
            continue
        elif (numbered := _NUMBERED.fullmatch(line)) and numbered[2].strip():
            pieces.append((int(numbered[1]), numbered[2], order))
