"""A report: a question, an answer with citations, what was shown for it, and what became of each
citation. As JSON, as Markdown, and back."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxdeep.envs.research import explain, support
from jaxdeep.envs.research.cite import Citation, Parsed, parse_marks, parse_tags
from jaxdeep.envs.research.fold import fold
from jaxdeep.envs.research.pin import Pin, Status, pin
from jaxdeep.envs.research.sources import (
    Sentence,
    Shelf,
    Source,
    assembled,
    normal,
    one_line,
    show,
    source,
)
from jaxdeep.errors import DataError

FORMAT = 1
FAILED = (Status.FABRICATED, Status.MISATTRIBUTED, Status.UNKNOWN_SOURCE)
"""Statuses with which a report does not pass."""

LAST = 10**9
"""The order of an answer that is not known to be older than anything it was shown."""

_TAG = re.compile(r"<\s?(?:\w+:)?cite[\s/>]", re.I)
_FENCE = re.compile(r"^## Sources\n\n(`{3,})text\n(.*?)^\1$\s*\Z", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Report:
    """`answer` is as written, citations and all. `order` is which event of its conversation it is:
    only sentences with a lower one could be cited. `incomplete` is whether it was cut. `notes` say
    what a reader of the report had to assume."""

    question: str
    answer: str
    shelf: Shelf
    order: int = LAST
    incomplete: bool = False
    id: str = ""
    notes: tuple[str, ...] = ()
    changed: frozenset[str] = frozenset()  # ids of sources that are not what they were

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", normal(self.answer).strip())

    @cached_property
    def parsed(self) -> Parsed:
        """The answer without its citations, the citations, and what could not be read."""
        if _TAG.search(self.answer):
            return parse_tags(self.answer)
        return parse_marks(self.answer, {source.id for source in self.shelf})

    @property
    def text(self) -> str:
        """The answer without its citations."""
        return self.parsed.text

    @property
    def citations(self) -> tuple[Citation, ...]:
        return self.parsed.citations

    @cached_property
    def pins(self) -> tuple[tuple[Pin, ...], ...]:
        """For each citation, the places of its references."""
        known: dict[Any, tuple[Pin, ...]] = {}  # an answer may repeat a citation a thousand times
        found = []
        for citation in self.citations:
            key = (citation.references, citation.quote)
            if key not in known:
                known[key] = self._pins(citation)
            found.append(known[key])
        return tuple(found)

    def _pins(self, citation: Citation) -> tuple[Pin, ...]:
        """A quotation belongs to the first of the references that it is found in; where it is in
        none, the first has the status of the failure."""
        places = [pin(r, "", self.order, self.shelf) for r in citation.references]
        if citation.quote.strip():
            quoted = [pin(r, citation.quote, self.order, self.shelf) for r in citation.references]
            best = next((n for n, p in enumerate(quoted) if p.status.pinned), 0)
            places[best] = quoted[best]
        return tuple(self._unchanged(place) for place in places)

    def _unchanged(self, place: Pin) -> Pin:
        if place.source not in self.changed or not place.status.pinned:
            return place
        note = "the source is not what it was when the report was written"
        return Pin(place.reference, Status.CHANGED, place.source, note=note)

    @cached_property
    def counts(self) -> collections.Counter[Status]:
        """How many references have each status."""
        return collections.Counter(place.status for places in self.pins for place in places)

    @property
    def failed(self) -> bool:
        """Whether a citation is fabricated, misattributed or of a source that was not shown."""
        return any(self.counts[status] for status in FAILED)

    @cached_property
    def tree(self) -> explain.Node:
        """The answer's levels, from the top down."""
        return explain.parse(self.text)

    @cached_property
    def claims(self) -> tuple[support.Claim, ...]:
        """Each citation's claim with its evidence."""
        claims = []
        for citation, places in zip(self.citations, self.pins, strict=True):
            start, end = support.widened(self.text, citation.start, citation.end)
            evidence = tuple(self.evidence(p) for p in places if p.status.pinned)
            claims.append(support.Claim(self.text[start:end], start, end, evidence, places))
        return tuple(claims)

    def evidence(self, place: Pin) -> support.Evidence:
        """What a reference leads to."""
        source = self.shelf.get(place.source)
        around = source.around(place.start, place.end)
        sentences = tuple(source.text[s.start : s.end] for s in around)
        return support.Evidence(source.text[place.start : place.end], sentences, source.title)

    @property
    def supported(self) -> list[tuple[int, int]]:
        """The places of the claims that their citations support, in order and apart."""
        results = (support.judged(claim, support.strict) for claim in self.claims)
        return support.union((r.claim.start, r.claim.end) for r in results if r.support == 1)

    @property
    def cases(self) -> dict[str, list[tuple[support.Evidence, ...]]]:
        """Every claim with the sets of evidence that `measures` asks a support about."""
        cases: dict[str, list[tuple[support.Evidence, ...]]] = {}
        for claim in self.claims:
            if claim.evidence:
                cases.setdefault(claim.text, []).extend(support.subsets(claim.evidence))
        return cases

    def measures(self, judge: support.Support = support.strict) -> dict[str, float]:
        """The measures of its citations, see `support.measure`."""
        return support.measure(self.text, self.tree.factual, self.claims, judge)


def to_json(report: Report) -> dict[str, Any]:
    """The report and all that was found out about it, as JSON can hold it. Only `question`,
    `answer`, `order`, `incomplete`, `id`, `notes` and `sources` are read back: the rest follows."""
    citations = []
    for citation, places in zip(report.citations, report.pins, strict=True):
        citations.append(
            {
                "claim": report.text[citation.start : citation.end],
                "claim_start": citation.start,
                "claim_end": citation.end,
                "quote": citation.quote,
                "references": [_pin_json(place, report.shelf) for place in places],
            }
        )
    return {
        "format": FORMAT,
        "id": report.id,
        "question": report.question,
        "answer": report.answer,
        "order": report.order,
        "incomplete": report.incomplete,
        "notes": list(report.notes),
        "problems": list(report.parsed.problems),
        "text": report.text,
        "citations": citations,
        "statuses": {status.value: n for status, n in sorted(report.counts.items())},
        "measures": report.measures() | explain.measures(report.tree, report.supported),
        "tree": explain.to_json(report.tree),
        "sources": [source_json(source) for source in report.shelf],
    }


def _pin_json(place: Pin, shelf: Shelf) -> dict[str, Any]:
    source = shelf.get(place.source) if place.status.pinned else None
    return {
        "reference": place.reference.written,
        "status": place.status.value,
        "source": place.source,
        "start": place.start,
        "end": place.end,
        "text": source.text[place.start : place.end] if source else "",
        "note": place.note,
    }


def source_json(source: Source) -> dict[str, Any]:
    """A source as JSON can hold it, with the hash of its text."""
    return {
        "id": source.id,
        "title": source.title,
        "url": source.url,
        "media_type": source.media_type,
        "retrieved_at": source.retrieved_at,
        "sha256": source.sha256,
        "numbered": source.numbered,
        "text": source.text,
        "sentences": [list(sentence) for sentence in source.sentences],
    }


def from_json(row: Mapping[str, Any]) -> Report:
    """The report of `to_json`. A source whose text has another hash than it says is changed.
    DataError names the field that is missing or of another kind."""
    try:
        if row["format"] != FORMAT:
            raise DataError(f"a report of format {row['format']}: this version reads {FORMAT}")
        sources = [_source(source) for source in row["sources"]]
        changed = {
            s.id for s, r in zip(sources, row["sources"], strict=True) if s.sha256 != r["sha256"]
        }
        return Report(
            str(row["question"]),
            str(row["answer"]),
            Shelf(sources),
            order=int(row["order"]),
            incomplete=bool(row["incomplete"]),
            id=str(row.get("id", "")),
            notes=tuple(map(str, row.get("notes", ()))),
            changed=frozenset(changed),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a whole report: {type(error).__name__}: {error}") from error


def _source(row: Mapping[str, Any]) -> Source:
    text = row["text"]
    sentences = tuple(Sentence(*map(int, sentence)) for sentence in row["sentences"])
    last = 0
    for sentence in sentences:
        if not last <= sentence.start <= sentence.end <= len(text):
            raise ValueError(f"sentence {sentence.number} of {row['id']!r} is not inside its text")
        last = sentence.end
    facts = {n: str(row[n]) for n in ("title", "url", "media_type", "retrieved_at")}
    return Source(str(row["id"]), text, sentences, numbered=bool(row["numbered"]), **facts)


def to_markdown(report: Report) -> str:
    """The report for people, and what was shown in a block at its end: of sources that a model was
    shown as numbered sentences, `from_markdown` reads the same report back."""
    blocks = []
    for shown in report.shelf:
        facts = {"id": shown.id, "title": one_line(shown.title), "url": one_line(shown.url)}
        facts |= {"media_type": shown.media_type, "retrieved_at": shown.retrieved_at}
        facts["orders"] = [s.order for s in shown.sentences]
        lines = show(shown).split("\n")[1:]
        blocks.append("\n".join([json.dumps(facts, ensure_ascii=False), *lines]))
    body = "\n\n".join(blocks)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", body)), default=0))
    about = {"id": report.id, "order": report.order, "incomplete": report.incomplete}
    about["notes"] = list(report.notes)
    head = f"# {one_line(report.question)}\n\n{report.answer.strip()}\n\n## Sources\n\n"
    return f"{head}{fence}text\n{json.dumps(about)}\n\n{body}\n{fence}\n"


def from_markdown(text: str) -> Report | None:
    """The report of `to_markdown`; None where the text is none of its."""
    text = normal(text)
    match = _FENCE.search(text)
    head = re.match(r"# ([^\n]*)\n\n", text)
    if not (match and head):
        return None
    sources: list[tuple[dict[str, Any], list[tuple[int, str]]]] = []
    try:
        first, *lines = match[2].split("\n")
        about = json.loads(first)
        for line in lines:
            if line.startswith("{"):
                sources.append((json.loads(line), []))
            elif numbered := re.fullmatch(r"\[(\d+)\] ?(.*)", line):
                sources[-1][1].append((int(numbered[1]), numbered[2]))
        shelf = Shelf(_from_lines(facts, found) for facts, found in sources)
        about["notes"] = tuple(about["notes"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"the block of sources at the end cannot be read: {error}") from error
    return Report(head[1], text[head.end() : match.start()].strip(), shelf, **about)


def _from_lines(facts: dict[str, Any], found: Sequence[tuple[int, str]]) -> Source:
    orders = facts.pop("orders")
    pieces = [(n, words, order) for (n, words), order in zip(found, orders, strict=True)]
    return assembled(facts.pop("id"), pieces, numbered=True, **facts)


def with_sources(report: Report, texts: Mapping[str, str]) -> Report:
    """The report checked against texts by source id: a source that had no text gets one; one that
    had another text is changed, unless all that was shown of it stands in the new one."""
    shelf, changed = Shelf(), set(report.changed)
    known = {source.id for source in report.shelf}
    for old in report.shelf:
        text = texts.get(old.id)
        if text is not None and not old.text:
            old = _whole(old, text)
        elif text is not None and not _holds(normal(text), old):
            changed.add(old.id)
        shelf.add(old)
    for id in texts.keys() - known:
        shelf.add(_whole(Source(id, "", ()), texts[id]))
    return dataclasses.replace(report, shelf=shelf, changed=frozenset(changed))


def _holds(text: str, source: Source) -> bool:
    """Whether every sentence of the source stands in the text, which may be more than was shown."""
    folded = fold(text).text
    shown = (fold(source.text[s.start : s.end]).text.strip() for s in source.sentences)
    return text == source.text or all(sentence in folded for sentence in shown)


def _whole(named: Source, text: str) -> Source:
    return source(named.id, text, title=named.title, url=named.url)


def summary(report: Report) -> str:
    """One line: how many references, by status."""
    total = sum(report.counts.values())
    parts = (f"{n} {status.value}" for status, n in report.counts.most_common())
    return f"{total} references: {', '.join(parts)}" if total else "no citations"


def totals(reports: Iterable[Report]) -> collections.Counter[Status]:
    """The statuses of several reports together."""
    return sum((report.counts for report in reports), collections.Counter())
