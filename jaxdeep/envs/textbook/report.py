"""What was found in a book, what is missing and what looks wrong: numbers for programs and
people."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdeep.envs.textbook import finish, verify
from jaxdeep.envs.textbook.files import Folder
from jaxdeep.envs.textbook.schema import Data, Item, Span

_SHOWN = 200  # notes and ids listed by name; all are counted


def coverage(data: Data, folder: Folder) -> float | None:
    """The share of the letters and digits of the book's content that stand in a field; None for a
    book without content."""
    held: dict[str, list[tuple[int, int]]] = {}
    for row in (*data.sections, *data.items):
        for origin in row.spans.values():
            for span in origin.spans:
                held.setdefault(span.file, []).append((span.start, span.end))
    merged = {name: _merged(ranges) for name, ranges in held.items()}
    total = covered = 0
    total -= sum(map(_letters(folder), data.dropped))
    for span in data.content:
        file = folder.file(span.file)
        total += len(verify.letters_of_source(file, span.start, span.end))
        for start, end in _inside(merged.get(span.file, []), span):
            covered += len(verify.letters_of_source(file, start, end))
    return min(1.0, covered / total) if total else None


def _letters(folder: Folder) -> Callable[[Span], int]:
    """The number of letters and digits of a span."""
    return lambda span: len(verify.letters_of_source(folder.file(span.file), span.start, span.end))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _inside(ranges: Sequence[tuple[int, int]], span: Span) -> list[tuple[int, int]]:
    cut = [(max(start, span.start), min(end, span.end)) for start, end in ranges]
    return [(start, end) for start, end in cut if start < end]


def summarize(data: Data, folder: Folder | None, left_out: Mapping[str, str]) -> dict[str, Any]:
    """The report: counts, coverage, the notes of the reader, flags, near duplicates, what was left
    out and why."""
    exercises = [item for item in data.items if item.kind == "exercise"]
    examples = [item for item in data.items if item.kind == "example"]
    flags = collections.Counter(_kind(flag) for item in data.items for flag in item.flags)
    near = finish.overlaps(data.items)
    groups = collections.Counter(item.group for item in data.items)
    share = coverage(data, folder) if folder is not None else None
    added = [
        end - start
        for row in (*data.sections, *data.items)
        for origin in row.spans.values()
        for start, end in origin.added
    ]
    return {
        "book": {
            "id": data.book.id,
            "title": data.book.title,
            "licence": data.book.licence,
            "profile": data.book.profile,
            "sha256": data.book.sha256,
        },
        "sections": len(data.sections),
        "sections without text": [s.id for s in data.sections if not s.text][:_SHOWN],
        "examples": len(examples),
        "examples with reasoning": sum(bool(item.reasoning) for item in examples),
        "exercises": len(exercises),
        "answered": sum(bool(item.answer) for item in exercises),
        "gradable": sum(bool(item.final) for item in exercises),
        "needs image": sum(item.needs_image for item in data.items),
        "roles": dict(sorted(collections.Counter(item.role for item in data.items).items())),
        "answer kinds": dict(
            sorted(collections.Counter(item.answer_kind for item in exercises).items())
        ),
        "splits": dict(sorted(collections.Counter(item.split for item in data.items).items())),
        "items with a twin": sum(count for count in groups.values() if count > 1),
        "near duplicates": len(near),
        "near duplicates, first": near[:20],
        "flags": dict(sorted(flags.items())),
        "fields checked": verify.checked(data) + len(left_out),
        "fields left out": dict(left_out),
        "characters added": sum(added),
        "headings dropped": len(data.dropped),
        "coverage": None if share is None else round(share, 5),
        "notes": len(data.notes),
        "notes, first": data.notes[:_SHOWN],
    }


def _kind(flag: str) -> str:
    """A flag without the item that it names."""
    return "duplicate" if flag.startswith("duplicate of ") else flag


def table(data: Data) -> list[dict[str, Any]]:
    """A row a chapter and one for the book, for the page."""
    rows = []
    chapters: dict[str, list[str]] = {}
    for section in data.sections:
        chapters.setdefault(section.chapter or section.title, []).append(section.id)
    for chapter, ids in chapters.items():
        inside = set(ids)
        items = [item for item in data.items if item.section in inside]
        rows.append({"chapter": chapter, "sections": len(ids), **_counts(items)})
    whole = {"chapter": "all", "sections": len(data.sections)}
    return [*rows, {**whole, **_counts(data.items)}]


def _counts(items: Sequence[Item]) -> dict[str, int]:
    exercises = [item for item in items if item.kind == "exercise"]
    return {
        "examples": len(items) - len(exercises),
        "exercises": len(exercises),
        "answered": sum(bool(item.answer) for item in exercises),
        "gradable": sum(bool(item.final) for item in exercises),
        "flagged": sum(bool(item.flags) for item in items),
    }


def notes(summary: Mapping[str, Any]) -> list[str]:
    """The report in sentences."""
    share = summary["coverage"]
    out = [
        f"{summary['examples']} worked examples, {summary['exercises']} exercises, of which "
        f"{summary['answered']} have an answer and {summary['gradable']} a short one to grade.",
        f"{summary['fields checked']} fields were read again from the files; "
        f"{len(summary['fields left out'])} differed and were left out.",
    ]
    if share is not None:
        out.append(f"{100 * share:.2f} % of the letters of the book's content stand in a field.")
    if not summary["book"]["licence"]:
        out.append("No licence was found: give one with data.licence before anything is published.")
    out += [f"{count} items: {flag}" for flag, count in summary["flags"].items()]
    out += [f"left out: {field}: {why}" for field, why in summary["fields left out"].items()]
    if summary["notes"] > _SHOWN:
        out.append(f"The first {_SHOWN} of {summary['notes']} notes:")
    return [*out, *summary["notes, first"]]
