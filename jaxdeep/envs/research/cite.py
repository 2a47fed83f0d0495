"""Citations in an answer: which places they name, and for which words.

    <cite id="S2.2">The currency is the Euro.</cite>      the words inside are the claim
    <cite id="S1, S2.2-4" quote="pays in Euro">...</cite> several places; a quotation narrows them
    The currency is the Euro. [S2.2]             a mark: the claim is the sentence before it

The forms of other systems are read as well: `ids=`, other namespaces, unquoted values, `[20]`,
`[1-3, 5]`, `[S2.2]`, footnotes. Nothing raises: what cannot be read is a problem of the answer.
"""

from __future__ import annotations

import bisect
import html
import re
from collections.abc import Callable, Container
from typing import NamedTuple

from jaxdeep.envs.research.sources import normal, split

LONGEST_TAG = 4000  # characters; a tag that does not end within them is text

_OPENING = re.compile(
    r"<\s?(?:[a-z]\w{0,19}:)?cite(?=[\s/>])|<\s?/\s?(?:[a-z]\w{0,19}:)?cite\s{0,9}>", re.I
)
_CUT_TAG = re.compile(r"<[\s/]{0,2}(?:[a-z]\w{0,19}:)?(?:c(?:i(?:te?)?)?)?\Z", re.I)
_NAME = re.compile(r"\s*([A-Za-z][\w:-]{0,39})\s*(=?)\s*")
_HANDLE = re.compile(
    r"S(\d{1,9})(?:\.(\d{1,9})(?:\s{0,2}[-‐‑‒–—]\s{0,2}(?:S?(\d{1,9})\.)?(\d{1,9}))?)?", re.I
)
_BLOCK_END = re.compile(r"\n[ \t]*\n|\n(?=#{1,6} )")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.M | re.S)
_CODE = re.compile(r"(?<!`)(`{1,2})(?!`)[^\n]{1,400}?(?<!`)\1(?!`)")
_MARK = re.compile(r"(?<!!)\[{1,2}([^\[\]\n]{1,120})\]{1,2}")
_NUMBERS = re.compile(r"\d{1,9}(?:\s?[-–]\s?\d{1,9})?(?:\s?[,;]\s?\d{1,9}(?:\s?[-–]\s?\d{1,9})?)*")
_YEARS = range(1500, 2101)
DEEPEST = 8  # citations inside one another; a deeper one is not read
MOST_IN_RANGE = 100  # a range of more numbers in brackets is no citation


class Reference(NamedTuple):
    """A place that a citation names: sentences `first` to `last` of a source, or all of it where
    they are None. `written` is the reference as the answer has it."""

    written: str
    source: str
    first: int | None = None
    last: int | None = None


class Citation(NamedTuple):
    """`start` and `end` are the claim's place in the text of the answer without its citations.
    `tail` is whether the claim was found from a mark after it, rather than wrapped in a tag."""

    references: tuple[Reference, ...]
    start: int
    end: int
    quote: str = ""
    tail: bool = False


class Parsed(NamedTuple):
    """An answer without its citations, the citations in order of their claims, and what could not
    be read."""

    text: str
    citations: tuple[Citation, ...]
    problems: tuple[str, ...]


def references(written: str) -> tuple[Reference, ...]:
    """The places in the value of `id`: handles or other systems' ids, by comma or semicolon."""
    found = []
    for part in re.split(r"[,;]", written):
        part = part.strip().strip("[]()#\"'").strip()
        pieces = part.split()
        handles = len(pieces) > 1 and all(_HANDLE.fullmatch(piece) for piece in pieces)
        found += [reference(piece) for piece in (pieces if handles else [part]) if piece]
    return tuple(found)


def reference(written: str) -> Reference:
    """One place. A range that ends in another source names no source that there is."""
    match = _HANDLE.fullmatch(written)
    if match is None or (match[3] and match[3] != match[1]):
        return Reference(written, written)
    source, first, _, last = match.groups()
    if first is None:
        return Reference(written, f"S{int(source)}")
    return Reference(written, f"S{int(source)}", int(first), int(last or first))


def parse_tags(answer: str) -> Parsed:
    """The answer's `<cite>` tags. One that is not closed ends with its block; one in the last words
    of an answer that was cut is no citation."""
    answer = normal(answer)
    writer, problems = _Writer(), []
    hidden = _code(answer)
    opened: list[tuple[dict[str, str], int, int]] = []  # attributes, place, number of pieces
    found: list[Citation] = []
    last = 0
    for match in _OPENING.finditer(answer):
        start = match.start()
        if start < last or hidden(start):
            continue
        tag = None if "/" in match[0] else _attributes(answer, match.end())
        if tag is None and "/" not in match[0]:
            problems.append(f"a tag that does not end: {answer[start : start + 40]!r}")
            if len(answer) - start <= LONGEST_TAG and ">" not in answer[start:]:
                writer.write(answer[last:start])  # the answer was cut inside it
                last = len(answer)
                break
            continue
        writer.write(answer[last:start])
        if tag is None:
            last = match.end()
            if opened:
                attributes, begin, pieces = opened.pop()
                inside = "".join(writer.pieces[pieces:])
                end = begin + len(inside)
                if block := _BLOCK_END.search(inside.rstrip()):
                    problems.append(f"a citation over more than one block: {inside[:40]!r}")
                    end = begin + block.start()
                found += _citation(attributes, begin, end, problems)
            else:
                problems.append("a closing tag without an opening one")
            continue
        attributes, last, alone = tag
        if alone:
            found += _citation(attributes, writer.size, writer.size, problems)
        elif len(opened) < DEEPEST:
            opened.append((attributes, writer.size, len(writer.pieces)))
        else:
            problems.append(f"a citation inside {DEEPEST} others")
    writer.write(_CUT_TAG.sub("", answer[last:]))
    text = writer.text
    if marks := handle_marks(text):
        problems.append(f"{marks} marks in brackets beside tags were not read as citations")
    for attributes, begin, _ in opened:
        end = match.start() if (match := _BLOCK_END.search(text, begin)) else len(text)
        problems.append(f"a citation that is not closed: {text[begin : begin + 40]!r}")
        if end < len(text.rstrip()):
            found += _citation(attributes, begin, end, problems)
    located = _claims(text, found)
    return Parsed(text, tuple(sorted(located, key=lambda c: (c.start, c.end))), tuple(problems))


def parse_marks(answer: str, known: Container[str] = ()) -> Parsed:
    """The marks `[n]`, `[1-3, 5]`, `[S2.2]` and `[id]` of an answer, ids being those that are
    `known`. A mark's claim is the sentence that it ends, or that it begins. Years in brackets are
    no marks unless a source has that id; they are told among the problems."""
    answer = normal(answer)
    writer, problems, found = _Writer(), [], []
    hidden = _code(answer)
    last = years = 0
    for match in _MARK.finditer(answer):
        if match.start() < last or hidden(match.start()):
            continue
        places, year = _marked(match[1], known)
        years += year
        if not places:
            continue
        before = answer[last : match.start()]
        follows = bool(found) and found[-1].start == writer.size and not before.strip(" ")
        if not follows:
            writer.write(before.rstrip(" ") or before)
        last = match.end()
        if answer[last : last + 1] == "(":  # a link: its address says nothing of the place
            close = answer.find(")", last, last + 2000)
            last = close + 1 if close > 0 else last
        place = writer.size
        if follows:
            found[-1] = found[-1]._replace(references=found[-1].references + places)
        else:
            found.append(Citation(places, place, place, tail=True))
    writer.write(answer[last:])
    if years:
        problems.append(f"{years} numbers in brackets were taken for years, not for citations")
    return Parsed(writer.text, tuple(_claims(writer.text, found)), tuple(problems))


def _marked(inside: str, known: Container[str]) -> tuple[tuple[Reference, ...], bool]:
    """The places that a mark names, none where it is no mark, and whether it is a year."""
    inside = inside.strip()
    if inside in known:
        return (reference(inside),), False
    if inside.startswith("^"):
        return (Reference(inside, inside[1:]),), False
    if _NUMBERS.fullmatch(inside):
        places = []
        for part in re.split(r"[,;]", inside):
            ends = [int(n) for n in re.split(r"[-–]", part)]
            if ends[-1] - ends[0] not in range(MOST_IN_RANGE):
                return (), False
            places += [Reference(part.strip(), str(n)) for n in range(ends[0], ends[-1] + 1)]
        if all(place.source not in known and int(place.source) in _YEARS for place in places):
            return (), True
        return tuple(places), False
    places = references(inside)
    if all(_HANDLE.fullmatch(place.written) or place.source in known for place in places):
        return places, False
    return (), False


class _Writer:
    """A text that is put together, and its size so far."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.size = 0

    def write(self, piece: str) -> None:
        self.pieces.append(piece)
        self.size += len(piece)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def _attributes(answer: str, place: int) -> tuple[dict[str, str], int, bool] | None:
    """The attributes of a tag from `place` on, where it ends, and whether it closes itself; None
    where it does not end."""
    found: dict[str, str] = {}
    limit = min(len(answer), place + LONGEST_TAG)
    while place < limit:
        if answer[place] == ">":
            return found, place + 1, False
        if answer.startswith("/>", place):
            return found, place + 2, True
        if answer[place] == "<":
            return None
        named = _NAME.match(answer, place, limit)
        if not named:
            place += 1
            continue
        value, place = _value(answer, named.end(), limit) if named[2] else ("", named.end())
        found.setdefault(named[1].lower(), value)
    return None


def _value(answer: str, place: int, limit: int) -> tuple[str, int]:
    """The value at `place`, quoted or not, and where it ends. A quotation mark that is not closed
    before another tag begins is taken for one that was forgotten."""
    quote = answer[place : place + 1]
    if quote and quote in "\"'“‘":
        closing = {"“": "”", "‘": "’"}.get(quote, quote)
        end = place + 1
        while (end := answer.find(closing, end, limit)) > 0 and answer[end - 1] == "\\":
            end += 1
        inside = answer[place + 1 : end] if end > 0 else "<"
        if not re.search(r"<\s?/?\s?(?:\w+:)?cite\b|\n\s*\n|\A<\Z", inside, re.I):
            return html.unescape(inside.replace("\\" + closing, closing)), end + 1
        place += 1
    end = place
    while end < limit and answer[end] not in "<> \t\n" and not answer.startswith("/>", end):
        end += 1
    return html.unescape(answer[place:end].rstrip("\"'”’")), end


def _citation(
    attributes: dict[str, str], begin: int, end: int, problems: list[str]
) -> list[Citation]:
    written = next((attributes[name] for name in ("id", "ids") if name in attributes), "")
    places = references(written)
    if not places:
        problems.append("a citation without an id")
        places = (Reference(written, ""),)
    return [Citation(places, begin, end, normal(attributes.get("quote", "")), begin == end)]


def _claims(text: str, found: list[Citation]) -> list[Citation]:
    """The citations, with the sentence that each mark belongs to as its claim."""
    if not any(citation.start == citation.end for citation in found):
        return found
    spans = split(text)
    starts = [start for start, _ in spans]
    located = []
    for citation in found:
        if citation.start == citation.end:
            start, end = _claim(text, citation.start, spans, starts)
            citation = citation._replace(start=start, end=end)
        located.append(citation)
    return located


def _claim(
    text: str, place: int, spans: list[tuple[int, int]], starts: list[int]
) -> tuple[int, int]:
    """The sentence of a mark at `place`: the one it stands in or ends; where nothing of its line
    comes before it, or the sentence before ended and the words after go on in lower case, the one
    that it begins."""
    n = bisect.bisect_right(starts, place) - 1
    following = spans[n + 1] if n + 1 < len(spans) else None
    if n < 0:
        return following or (place, place)
    start, end = spans[n]
    if start < place < end:
        return start, end
    if start == place and n > 0 and "\n" not in text[spans[n - 1][1] : place]:
        previous, here = spans[n - 1], text[place:].lstrip()[:1]
        return spans[n] if here.islower() else previous
    if start == place:
        return start, end
    if "\n" in text[end:place] and following and "\n" not in text[place : following[0]]:
        return following
    return start, end


def _code(text: str) -> Callable[[int], bool]:
    """Whether a place is in a block or a span of code."""
    if "`" not in text and "~~~" not in text:
        return lambda place: False
    spans = [match.span() for match in _FENCE.finditer(text)]
    fenced = _inside(spans)
    spans += [m.span() for m in _CODE.finditer(text) if not fenced(m.start())]
    return _inside(sorted(spans))


def _inside(spans: list[tuple[int, int]]) -> Callable[[int], bool]:
    starts = [start for start, _ in spans]

    def inside(place: int) -> bool:
        n = bisect.bisect_right(starts, place) - 1
        return n >= 0 and place < spans[n][1]

    return inside


def handle_marks(text: str) -> int:
    """How many marks with a handle, `[S2.2]`, stand in a text outside code."""
    hidden = _code(text)
    marks = (m for m in _MARK.finditer(text) if not hidden(m.start()))
    return sum(all(map(_HANDLE.fullmatch, re.split(r"[,;]\s*", m[1]))) for m in marks)
