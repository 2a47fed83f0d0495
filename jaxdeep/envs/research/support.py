"""Whether a place in a source supports a claim, and how well the citations of a report do.

Three judges of (claim, evidence), each giving 1 (full), 0.5 (partial) or 0 (none):

    strict    every content word of the claim stands in one sentence of the evidence, in the same
              order, with as many negations: for rewards. Paraphrases fail, and so do changed
              numbers, names, subjects and objects, negations and invented tails.
    lenient   the claim's numbers and names are there, the negations as many, and 70 % of its
              content words: as a metric only, since it accepts antonyms and exchanged subjects.
    a Judge   of yours, a language model say, for paraphrase: `verdicts` asks it first.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxdeep.envs.research.pin import Pin, Status
from jaxdeep.envs.research.sources import split
from jaxdeep.envs.research.words import CJK, NEGATIONS, PRONOUNS, SEPARATORS, STOP_WORDS, count

LENIENT = 0.7  # share of the claim's content words
FEWEST_CONTENT = 3  # content words; a claim of fewer is read with the clause that it stands in
SPAN_WORDS = 40  # of a span; a longer one is less concise

_TOKEN = re.compile(
    rf"(?:(?<![\w.])[-−+])?\d+(?:[.,:/]\d+)*|[{CJK}]|[^\W\d_{CJK}][^\W_{CJK}]*(?:['’][^\W_]+)?"
    r"|[%‰°$€£¥]"
)
_NOT = re.compile(r"n['’]t$")
_CLAUSE = re.compile(r"[.;:!?。；：！？]\s|\n")


class Evidence(NamedTuple):
    """What a reference leads to: its place in the source, `span`, the whole sentences that the
    place is part of, and the title of the source."""

    span: str
    sentences: tuple[str, ...]
    title: str = ""


Support = Callable[[str, Sequence[Evidence]], float]
"""How far several places together support a claim: 1, 0.5 or 0."""

Judge = Callable[[str, str], Awaitable[float]]
"""Asked with a claim and the text of its evidence; 1, 0.5 or 0. See `verdicts`."""


class Token(NamedTuple):
    """A content word: `stem` is what is compared."""

    stem: str
    name: bool
    number: bool
    begins: bool  # after a comma or a word that may begin another clause


class Content(NamedTuple):
    tokens: tuple[Token, ...]
    negations: int

    @property
    def stems(self) -> frozenset[str]:
        """Of words that are no numbers."""
        return frozenset(t.stem for t in self.tokens if not t.number)

    @property
    def numbers(self) -> frozenset[str]:
        return frozenset(t.stem for t in self.tokens if t.number)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(t.stem for t in self.tokens if t.name)


@functools.lru_cache(maxsize=8192)
def content(text: str) -> Content:
    """The content words of a text in order, and how many negations it has."""
    tokens, negations, begins, first = [], 0, False, True
    place = 0
    for match in _TOKEN.finditer(text):
        begins |= bool(re.search("[,;:，；：]", text[place : match.start()]))
        place = match.end()
        word = match[0]
        lower = word.lower().replace("’", "'")
        if lower in NEGATIONS or _NOT.search(lower):
            negations += 1
        elif lower in STOP_WORDS:
            begins |= lower in SEPARATORS
        else:
            number = any(c.isdigit() for c in word)
            name = word[0].isupper() and not first
            tokens.append(Token(_number(lower) if number else stem(lower), name, number, begins))
            begins = False
        first = text[place : place + 1] in ".!?" and text[place : place + 1] != ""
    return Content(tuple(tokens), negations)


def stem(word: str) -> str:
    """A word in lower case without a possessive or the commonest English endings."""
    word = word.removesuffix("'s").removesuffix("'")
    for ending, new in (
        ("ies", "y"),
        ("sses", "ss"),
        ("ing", ""),
        ("ed", ""),
        ("es", "e"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return (word.removesuffix(ending) + new).removesuffix("e")
    return word.removesuffix("e") if len(word) > 4 else word


def _number(word: str) -> str:
    """A number with one form of the minus, without separators of thousands and a plus sign."""
    return re.sub(r",(?=\d{3}(?!\d))", "", word.replace("−", "-").removeprefix("+"))


def strict(claim: str, evidence: Sequence[Evidence]) -> float:
    """1 where every sentence of the claim has all its content words in one sentence of the
    evidence, in order and with equally many negations."""
    sentences = [claim[start:end] for start, end in split(claim)]
    contents = [c for sentence in sentences if (c := content(sentence)).tokens]
    if not contents:
        return 0.0
    return float(all(any(_strict(c, place) for place in evidence) for c in contents))


def _strict(claim: Content, place: Evidence) -> bool:
    title = content(place.title).tokens
    for sentence in place.sentences:
        found = content(sentence)
        if found.negations != claim.negations:
            continue
        if _in_order(claim.tokens, found.tokens):
            return True
        # A title is the subject only of a sentence that has no other one of its own.
        own = {t.stem for t in found.tokens if t.name} | _subject(sentence)
        if title and own <= {t.stem for t in claim.tokens}:
            titles = {t.stem for t in title} - {t.stem for t in found.tokens}
            rest = [t for t in claim.tokens if t.stem not in titles]
            if len(rest) > 1 and _in_order(rest, found.tokens):
                return True
    return False


def _subject(sentence: str) -> set[str]:
    """The stem of the first word where it may be a name."""
    first = _TOKEN.search(sentence)
    if first is None or first[0].lower() in STOP_WORDS | PRONOUNS or not first[0][0].isupper():
        return set()
    return {stem(first[0].lower())}


def _in_order(claim: Sequence[Token], there: Sequence[Token]) -> bool:
    """Whether the claim's words stand there in order, and no words are left out between them that
    begin a clause with a name or number of its own: "A is B and C is D" does not say "A is D"."""
    for start, token in enumerate(there):
        if token.stem != claim[0].stem:
            continue
        place, clause = start, False
        for wanted in claim[1:]:
            place += 1
            while place < len(there) and there[place].stem != wanted.stem:
                clause |= there[place].begins
                if clause and (there[place].name or there[place].number):
                    break
                place += 1
            else:
                clause = False
            if place >= len(there) or there[place].stem != wanted.stem:
                break
        else:
            return True
    return False


def lenient(claim: str, evidence: Sequence[Evidence]) -> float:
    """1 where numbers and names of the claim are in the evidence (names also in a title), the
    negations are as many, and at least `LENIENT` of its content words are there."""
    said = content(claim)
    if not said.tokens or not evidence:
        return 0.0
    spans = [content(place.span) for place in evidence]
    there = {t.stem for c in spans for t in c.tokens}
    titles = {t.stem for place in evidence for t in content(place.title).tokens}
    stems = said.stems
    return float(
        said.numbers <= there
        and said.names <= there | titles
        and said.negations == sum(c.negations for c in spans)
        and len(stems & (there | (said.names & titles))) >= LENIENT * len(stems)
    )


async def verdicts(judge: Judge, cases: Mapping[str, Sequence[Sequence[Evidence]]]) -> Support:
    """A `Support` that knows what the judge says of each claim with each of its sets of evidence;
    the judge is asked once for each. `Report.cases` gives what `measure` will ask."""
    known: dict[tuple[str, str], float] = {}
    for claim, sets in cases.items():
        for evidence in sets:
            text = "\n".join(place.span for place in evidence)
            if (claim, text) not in known:
                known[claim, text] = await judge(claim, text)

    def support(claim: str, evidence: Sequence[Evidence]) -> float:
        return known[claim, "\n".join(place.span for place in evidence)]

    return support


class Claim(NamedTuple):
    """A claim as it is judged, and the evidence of its references that have a place. `start` and
    `end` are its place in the text of the answer."""

    text: str
    start: int
    end: int
    evidence: tuple[Evidence, ...]
    pins: tuple[Pin, ...]


class Judged(NamedTuple):
    """What a support said of a claim, and which of its evidence it needs."""

    claim: Claim
    support: float
    needed: tuple[bool, ...]


def widened(text: str, start: int, end: int) -> tuple[int, int]:
    """The span of a claim; where it has few content words, of the clause that it stands in."""
    if len(content(text[start:end]).tokens) >= FEWEST_CONTENT:
        return start, end
    left = max((m.end() for m in _CLAUSE.finditer(text, max(0, start - 400), start)), default=0)
    left = max(left, start - 400)
    match = _CLAUSE.search(text, end, end + 400)
    return left, match.start() + (match[0] != "\n") if match else min(len(text), end + 400)


def subsets(evidence: Sequence[Evidence]) -> list[tuple[Evidence, ...]]:
    """The sets of evidence that precision asks about: all, each alone, all but each."""
    sets = [tuple(evidence)]
    if len(evidence) > 1:
        sets += [(place,) for place in evidence]
        sets += [tuple(p for m, p in enumerate(evidence) if m != n) for n in range(len(evidence))]
    return sets


def judged(claim: Claim, support: Support) -> Judged:
    """A reference is needed where it supports the claim alone, or where the claim has less support
    without it (ALCE, Gao et al. 2023)."""
    evidence = claim.evidence
    if not evidence:
        return Judged(claim, 0.0, ())
    together = support(claim.text, evidence)
    if len(evidence) == 1:
        return Judged(claim, together, (together > 0,))
    needed = []
    for n, place in enumerate(evidence):
        rest = tuple(p for m, p in enumerate(evidence) if m != n)
        needed.append(support(claim.text, (place,)) > 0 or support(claim.text, rest) < together)
    return Judged(claim, together, tuple(needed))


def measure(
    text: str, sentences: Sequence[tuple[int, int]], claims: Sequence[Claim], support: Support
) -> dict[str, float]:
    """The measures of a report's citations, each from 0 to 1.

        id_validity        references that have a place, of all
        span_exact         references that are exact or normalised, of all
        citation_precision references that their claim needs, of all
        citation_recall    supported sentences, of the factual ones
        citation_f1        of the last two
        coverage           words in supported claims, of the words of factual sentences
        concision          mean over places of 40 words by their words, at most 1

    `sentences` are the factual ones of the text. One is supported where supported claims hold at
    least half of its words.
    """
    pins = [pin for claim in claims for pin in claim.pins]
    results = [judged(claim, support) for claim in claims]
    total = len(pins)
    needed = sum(sum(result.needed) for result in results)
    spans = [place.span for claim in claims for place in claim.evidence]
    covered = union((r.claim.start, r.claim.end) for r in results if r.support == 1)
    shares = [
        (_words(text, start, end), _overlap(text, start, end, covered)) for start, end in sentences
    ]
    supported = sum(2 * inside >= words for words, inside in shares)
    exact = sum(pin.status in (Status.EXACT, Status.NORMALISED) for pin in pins)
    precision = needed / total if total else 0.0
    recall = supported / len(sentences) if sentences else 0.0
    words = sum(words for words, _ in shares)
    return {
        "id_validity": sum(pin.status.pinned for pin in pins) / total if total else 0.0,
        "span_exact": exact / total if total else 0.0,
        "citation_precision": precision,
        "citation_recall": recall,
        "citation_f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "coverage": sum(inside for _, inside in shares) / words if words else 0.0,
        "concision": sum(min(1.0, SPAN_WORDS / max(1, count(s))) for s in spans) / len(spans)
        if spans
        else 0.0,
    }


def _words(text: str, start: int, end: int) -> int:
    return count(text[start:end])


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, those that touch joined."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _overlap(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> int:
    """How many words of `text[start:end]` are in the spans, which are in order."""
    first = max(0, bisect.bisect_right(spans, (start, start)) - 1)
    words = 0
    for low, high in spans[first:]:
        if low >= end:
            break
        if min(end, high) > max(start, low):
            words += _words(text, max(start, low), min(end, high))
    return words
