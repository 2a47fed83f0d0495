"""Each place that an answer cites, looked up in what the conversation was shown.

    pin(reference, quote, order, shelf) -> Pin(status, source, start, end, note)

Without a quotation the handle names the place and the text is copied from the source. A quotation
narrows the place and is never believed: what is shown is the source's own text.

    exact          the sentences of the handle; or the quotation stands there word for word, once
    normalised     so it does after `fold`: white space, quote and dash shapes, emphasis, case
    ambiguous      it stands there several times; the first place is taken
    repaired       it differs from the source by little words or typing errors alone
    altered        it differs by more: another number, name, negation or word
    fabricated     it resembles nothing in its source
    misattributed  it stands in another shown source, which the note names
    wrong_sentence it stands in its source, but not in the sentences of the handle
    unknown_source no such source was shown
    out_of_range   the source has no such sentence, or it was not shown
    not_yet_shown  it was shown only after the answer cited it
    too_short      the quotation has fewer than three words
    no_text        the source is named in a list of references, its text is not here
    changed        the source's text is not what it was when the report was written

The first four have a place. The rule for `repaired` compares the sequences of words: bags of words
and sets of numbers let dropped words and exchanged names pass.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import NamedTuple

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from jaxdeep.envs.research.cite import Reference
from jaxdeep.envs.research.fold import fold
from jaxdeep.envs.research.sources import Sentence, Shelf, Source, normal
from jaxdeep.envs.research.words import CJK, LITTLE, QUANTITIES

FEWEST_WORDS = 3
ALIKE = 80.0  # of 100: how similar a passage must be for its differences to be looked at
LONGEST_QUOTE = 2000  # characters that are aligned; a longer quotation is cut for that
WHOLE = 4000  # characters of a source in which a quotation is aligned directly
PLACES = 24  # in a longer one: passages around its longest words that are tried


class Status(enum.StrEnum):
    """What became of a reference; see the module."""

    EXACT = "exact"
    NORMALISED = "normalised"
    AMBIGUOUS = "ambiguous"
    REPAIRED = "repaired"
    ALTERED = "altered"
    FABRICATED = "fabricated"
    MISATTRIBUTED = "misattributed"
    WRONG_SENTENCE = "wrong_sentence"
    UNKNOWN_SOURCE = "unknown_source"
    OUT_OF_RANGE = "out_of_range"
    NOT_YET_SHOWN = "not_yet_shown"
    TOO_SHORT = "too_short"
    NO_TEXT = "no_text"
    CHANGED = "changed"

    @property
    def pinned(self) -> bool:
        """Whether the reference has a place in a source."""
        return self in (Status.EXACT, Status.NORMALISED, Status.AMBIGUOUS, Status.REPAIRED)


class Pin(NamedTuple):
    """A reference and its place, `text[start:end]` of the source with the id `source`; both ends
    are 0 where the status has no place. `note` is for people."""

    reference: Reference
    status: Status
    source: str = ""
    start: int = 0
    end: int = 0
    note: str = ""


_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’.,][^\W_{CJK}]+)*|[-+−±<>≤≥≈~=%‰°$€£¥²³]")
_OUTER = "\"'`“”‘’„«» \t\n"
_SIGNS = "-‐−–+±<>≤≥≈~$€£¥#"


def pin(reference: Reference, quote: str, order: int, shelf: Shelf) -> Pin:
    """The place of a reference in an answer that is event number `order` of its conversation. An
    empty quotation is none."""
    source = shelf.get(reference.source)
    if source is None:
        return Pin(reference, Status.UNKNOWN_SOURCE, note=_suggestion(reference, quote, shelf))
    id = source.id
    if not source.text:
        return Pin(reference, Status.NO_TEXT, id, note="the text of this source is not here")
    sentences, problem = _named(reference, source, order)
    if problem is not None:
        return problem
    start, end = sentences[0].start, sentences[-1].end
    if not quote.strip():
        return Pin(reference, Status.EXACT, id, start, end)
    quote = _trimmed(normal(quote))
    if len(words(quote)) < FEWEST_WORDS:
        return Pin(
            reference, Status.TOO_SHORT, id, note=f"a quotation of under {FEWEST_WORDS} words"
        )
    return _pin_quote(reference, quote, order, shelf, source, (start, end))


def words(text: str) -> list[str]:
    """The words, numbers and signs of a text; of Chinese, Japanese and Korean each character."""
    return _WORD.findall(text)


def _named(reference: Reference, source: Source, order: int) -> tuple[list[Sentence], Pin | None]:
    """The sentences that the reference names, or what is wrong with it."""
    shown = [s for s in source.sentences if s.order < order]
    late = Pin(reference, Status.NOT_YET_SHOWN, source.id, note="it was shown after the answer")
    if reference.first is None:
        return shown, None if shown else late
    first, last = reference.first, reference.last
    numbers = range(first, last + 1)
    if (
        not numbers
        or len(numbers) > len(source.sentences)
        or any(number not in source.by_number for number in numbers)
    ):
        there = [s.number for s in source.sentences]
        note = f"{source.id} has {len(there)} sentences that were shown, {there[0]} to {there[-1]}"
        return [], Pin(reference, Status.OUT_OF_RANGE, source.id, note=note)
    named = [source.by_number[number] for number in numbers]
    return named, late if any(s.order >= order for s in named) else None


def _pin_quote(
    reference: Reference,
    quote: str,
    order: int,
    shelf: Shelf,
    source: Source,
    inside: tuple[int, int],
) -> Pin:
    id = source.id
    needle = fold(quote).text.strip()
    if found := _stands(quote, needle, source, inside, order):
        status, start, end = found
        return Pin(reference, status, id, start, end)
    everywhere = (0, len(source.text))
    if found := _stands(quote, needle, source, everywhere, order):
        numbers = [str(s.number) for s in source.around(found[1], found[2])]
        note = f"the quotation stands in sentence {', '.join(numbers)}"
        return Pin(reference, Status.WRONG_SENTENCE, id, note=note)
    if _stands(quote, needle, source, everywhere, None):
        return Pin(reference, Status.NOT_YET_SHOWN, id, note="it was shown after the answer")
    score, start, end = _alike(needle, source, inside)
    if score >= ALIKE and (place := _repaired(quote, source, (start, end), inside, shelf)):
        return Pin(reference, Status.REPAIRED, id, *place, note=f"quoted as {quote!r}")
    if other := _elsewhere(quote, needle, id, order, shelf):
        return Pin(reference, Status.MISATTRIBUTED, id, note=f"the quotation stands in {other}")
    if score < ALIKE and inside != everywhere:
        score, start, end = _alike(needle, source, everywhere)
    if score >= ALIKE:
        there = " ".join(source.text[start:end].split())
        return Pin(reference, Status.ALTERED, id, note=f"the source says {there!r}")
    return Pin(reference, Status.FABRICATED, id, note="the quotation stands in no shown source")


def _suggestion(reference: Reference, quote: str, shelf: Shelf) -> str:
    if not reference.source:
        return "the citation names no source"
    if not len(shelf):
        return "no source was shown"
    bare = re.sub(r"^\w{1,8}:\s?|\W", "", reference.source).lower()
    near = next((s.id for s in shelf if re.sub(r"\W", "", s.id).lower() == bare), "")
    return f"did it mean {near}?" if near else "no source of this name was shown"


def _trimmed(quote: str) -> str:
    """The quotation without outer quotation marks, the mark of an omission at an end, and a full
    stop or comma after it."""
    quote = quote.strip(_OUTER)
    quote = re.sub(r"^(?:…|\.{3,}|\[(?:…|\.{3,})\])\s*(?!\d)", "", quote)
    return re.sub(r"[\s.,;:…]+$|\s*\[(?:…|\.{3,})\]$", "", quote).strip(_OUTER)


def _stands(
    quote: str, needle: str, source: Source, inside: tuple[int, int], order: int | None
) -> tuple[Status, int, int] | None:
    """How and where the quotation, or `needle`, what it is folded, stands in a part of the source,
    in sentences that were shown before `order` (None: at any time)."""
    found = _places(quote, source.text, *inside)
    places = [p for p in found if _shown(source, p, order)]
    status = Status.EXACT
    if not places:
        folded = source.folded
        low, high = folded.position(inside[0]), folded.position(inside[1])
        found = (folded.span(*place) for place in _places(needle, folded.text, low, high))
        places = [p for p in found if _shown(source, p, order) and _bounded(source.text, *p)]
        status = Status.NORMALISED
    if not places:
        return None
    return (Status.AMBIGUOUS if len(places) > 1 else status), *places[0]


def _places(quote: str, text: str, low: int, high: int) -> list[tuple[int, int]]:
    """The first two places between `low` and `high` where the quotation stands as whole words."""
    found: list[tuple[int, int]] = []
    start = text.find(quote, low, high) if quote else -1
    while start >= 0 and len(found) < 2:
        if _bounded(text, start, start + len(quote)):
            found.append((start, start + len(quote)))
        start = text.find(quote, start + max(1, len(quote) // 2), high)
    return found


def _shown(source: Source, place: tuple[int, int], order: int | None) -> bool:
    return order is None or all(s.order < order for s in source.around(*place))


def _bounded(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` begins and ends with whole words and whole numbers: "312 people" is
    not in "1,312 people", "5 degrees" not in "-5 degrees", "profit" not in "non-profit"."""
    before, first = text[max(0, start - 2) : start], text[start]
    if before and not _apart(before[::-1], first, _SIGNS + ".,:/%"):
        return False
    after, last = text[end : end + 2], text[end - 1]
    if last.isdigit() and after.strip() == "%":
        return False
    return not after or _apart(after, last, ".,:/-–‐%‰°")


def _apart(outside: str, edge: str, joining: str) -> bool:
    """Whether a text with `edge` at its end is whole beside the two characters `outside`, the
    nearest first."""
    near, far = outside[0], outside[1:]
    if not edge.isalnum() or _is_cjk(edge):
        return True
    if near.isalnum() or near == "_":
        return _is_cjk(near)
    if edge.isdigit() and near in "%‰°" + _SIGNS and near in joining:
        return False
    if edge.isnumeric() and near in joining and far.isdigit():
        return False
    return not (near in "'’-‐‑" and far.isalnum())


def _is_cjk(character: str) -> bool:
    return bool(re.match(f"[{CJK}]", character))


def _elsewhere(quote: str, needle: str, id: str, order: int, shelf: Shelf) -> str:
    """The other shown source that the quotation stands in, "" for none."""
    for other in shelf:
        if other.id == id or not (needle in other.folded.text or quote in other.text):
            continue
        if _stands(quote, needle, other, (0, len(other.text)), order):
            return other.id
    return ""


def _alike(needle: str, source: Source, inside: tuple[int, int]) -> tuple[float, int, int]:
    """How similar the most similar passage of a part of the source is, from 0 to 100, and where it
    is. Of a long part only passages around the quotation's longest words are looked at."""
    folded = source.folded
    low, high = folded.position(inside[0]), folded.position(inside[1])
    needle = needle[:LONGEST_QUOTE]
    best = (0.0, low, low)
    for start, end in _windows(needle, folded.text, low, high):
        found = fuzz.partial_ratio_alignment(needle, folded.text[start:end], score_cutoff=best[0])
        if found and found.score > best[0] and found.dest_end > found.dest_start:
            best = (found.score, start + found.dest_start, start + found.dest_end)
    score, start, end = best
    return (score, *folded.span(start, end)) if end > start else (0.0, *inside)


def _windows(needle: str, text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    if high - low <= WHOLE:
        yield low, high
        return
    width = 2 * len(needle)
    tried = 0
    done: list[tuple[int, int]] = []
    for word in sorted(set(re.findall(r"\w+", needle)), key=len, reverse=True)[:4]:
        place = text.find(word, low, high)
        while place >= 0 and tried < PLACES:
            if not any(start <= place < end for start, end in done):
                window = max(low, place - width), min(high, place + width)
                done.append((max(low, place - width // 2), min(high, place + width // 2)))
                yield window
                tried += 1
            place = text.find(word, place + 1, high)


def _repaired(
    quote: str, source: Source, place: tuple[int, int], inside: tuple[int, int], shelf: Shelf
) -> tuple[int, int] | None:
    """The place of the passage that the quotation is a mistyped form of; None where it says
    anything else. The words of both are compared in order: little words may differ, and a plain
    word by one letter inside it."""
    margin = 30  # characters around the alignment, which may have missed a word at its ends
    low, high = max(inside[0], place[0] - margin), min(inside[1], place[1] + margin)
    theirs = [m for m in _WORD.finditer(source.text, low, high)]
    said = words(quote)
    here, there = [w.casefold() for w in said], [m[0].casefold() for m in theirs]
    changes = [o for o in Levenshtein.opcodes(here, there) if o.tag != "equal"]
    first, last = 0, len(theirs)
    if changes and changes[0].tag == "insert" and changes[0].src_start == 0:
        first = changes.pop(0).dest_end
    if changes and changes[-1].tag == "insert" and changes[-1].src_end == len(said):
        last = changes.pop().dest_start
    if last <= first:
        return None
    vocabulary = shelf.vocabulary
    dropped = [w for c in changes for w in there[c.dest_start : c.dest_end]]
    added = [w for c in changes for w in here[c.src_start : c.src_end]]
    if any(word in added and word in LITTLE for word in dropped):
        return None  # it was moved, which changes more than a slip does
    for change in changes:
        old = [m[0] for m in theirs[change.dest_start : change.dest_end]]
        new = said[change.src_start : change.src_end]
        # With a capital inside a sentence it is part of a name.
        little = all(word in LITTLE for word in old) and all(w.lower() in LITTLE for w in new)
        typing = len(old) == len(new) and all(
            old_word.lower() == new_word.lower() or _mistyped(new_word, old_word, vocabulary)
            for old_word, new_word in zip(old, new, strict=True)
        )
        if not (little or typing):
            return None
    start, end = theirs[first].start(), theirs[last - 1].end()
    return (start, end) if _bounded(source.text, start, end) else None


def _mistyped(said: str, true: str, vocabulary: frozenset[str]) -> bool:
    """Whether a word is another with one letter wrong inside it. Its ends must be right, since they
    carry number, tense and negation, and it must not be a word that the sources use."""
    said = said.lower()
    return (
        len(true) >= 5
        and true.isalpha()
        and true.islower()
        and said.isalpha()
        and said[0] == true[0]
        and said[-1] == true[-1]
        and true not in QUANTITIES
        and said not in vocabulary
        and (Levenshtein.distance(said, true) == 1 or _swapped(said, true))
    )


def _swapped(said: str, true: str) -> bool:
    """Whether two letters beside each other have changed places."""
    different = [n for n, (a, b) in enumerate(zip(said, true, strict=False)) if a != b]
    return (
        len(said) == len(true)
        and len(different) == 2
        and different[1] == different[0] + 1
        and said[different[0]] == true[different[1]]
        and said[different[1]] == true[different[0]]
    )
