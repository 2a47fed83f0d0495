"""What is done with a book's items once they are read: golds, twins, flags, splits.

Flags are findings for a person: nothing is dropped here. Every rule looks at the items only, so
that it holds for every format."""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
from collections.abc import Iterable

from jaxdeep.envs.textbook import golds
from jaxdeep.envs.textbook.schema import Data, Item
from jaxdeep.rewards import checker
from jaxdeep.rewards.checking import text as texts
from jaxdeep.rewards.checking.formula import FormulaError, parse, symbols

_PREVIOUS = re.compile(
    r"\b(?:repeat|redo)\b.{0,40}\b(?:previous|preceding|last|problem|exercise)\b|\b(?:previous|preceding)\s+(?:problem|exercise|question)\b"
    r"|\b(?:problem|exercise)\s+above\b",
    re.I,
)
_MATH = re.compile(
    r"\$([^$]+)\$|(?<![\w.])(\d[\d\s.,+\-*/×·÷−()^]*[+\-*/×·÷−][\d\s.,+\-*/×·÷−()^]*\d\)?)"
)
_SHIFT = 3  # more exercises must fit a shifted key than the key as it is
OVERLAP = 0.6  # of trigrams: near duplicates


def finish(data: Data, *, test: float, seed: int) -> None:
    """Complete the items in place: parts and golds, `depends_on`, groups, flags, and a split, of
    which `test` is about the share of items for testing; twins are always in one split."""
    _unique_ids(data.items)
    for item in data.items:
        golds.grade(item)
    _depend(data.items)
    _flag_golds(data.items)
    _flag_numbers(data)
    _flag_editions(data)
    _flag_shifted(data)
    _group(data.items)
    _duplicates(data.items)
    for item in data.items:
        draw = hashlib.sha256(f"{seed}:{data.book.id}:{item.group}".encode()).digest()
        item.split = "test" if int.from_bytes(draw[:8]) < test * 2**64 else "train"


def _unique_ids(items: Iterable[Item]) -> None:
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        seen[item.id] += 1
        if seen[item.id] > 1:
            item.flags.append("id occurs twice")
            item.id = f"{item.id}-{seen[item.id]}"


def _depend(items: list[Item]) -> None:
    """Exercises that lean on the one before them."""
    for before, item in itertools.pairwise(items):
        if (
            item.kind == "exercise"
            and _PREVIOUS.search(_own(item))
            and before.section == item.section
        ):
            item.flags.append("depends on the previous one")
            if before.id not in item.depends_on:
                item.depends_on.append(before.id)


def _own(item: Item) -> str:
    """The question without what it shares with others."""
    return (
        item.question[len(item.instruction) :]
        if item.question.startswith(item.instruction)
        else item.question
    )


# Golds that look wrong


def _flag_golds(items: list[Item]) -> None:
    for item in items:
        for why in suspicions(item):
            item.flags.append(f"suspicious gold: {why}")


def suspicions(item: Item) -> list[str]:
    """Why the item's answer may not be what the book says."""
    answer, out = item.final or item.answer, []
    if not answer:
        return out
    if re.search(r"(?<![\d,])\d{1,3},\d{4,}(?![\d,])", answer):
        out.append("digits after a comma are not three")
    if "\ufffd" in answer or re.search("[\ue000-\uf8ff]", answer):
        out.append("characters that could not be read")
    if (
        any(answer.count(a) != answer.count(b) for a, b in ("()", "{}", "[]"))
        and item.answer_kind != "explanation"
        and not re.search(r"[\[(].*,.*[\])]", answer)
    ):
        out.append("brackets that do not match")
    for base, power in re.findall(r"(\d+)\s*\^\s*\{?(\d+)\}?", item.question):
        if answer.strip(" $.") == base + power:
            out.append(f"{base}^{power} without its power")
    digits = re.fullmatch(r"\$?(\d{2,})\.?", answer.strip())
    if (
        digits
        and item.reasoning
        and not _says(item.reasoning, digits[1])
        and _says(item.reasoning, digits[1][:-1])
    ):
        out.append("a digit more than in the reasoning: a mark of a footnote?")
    if digits and item.kind == "exercise":
        value = computed(_own(item))
        if value is not None and checker.check(digits[1][:-1], value).equal:
            out.append("a digit more than the value of the question: a mark of a footnote?")
    return out


def _says(text: str, number: str) -> bool:
    return bool(re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", text))


def computed(question: str) -> str | None:
    """The only calculation without symbols in a question, as its formula; None where there is none,
    or several."""
    found = []
    for match in _MATH.finditer(question):
        text = texts.plain(match[1] or match[2])
        try:
            node = parse(texts.without_thousands(text))
        except FormulaError:
            continue
        if not symbols(node) and node.kind not in ("number", "mixed", "neg"):
            found.append(text)
    return found[0] if len(found) == 1 else None


# Numbers and keys


def _flag_numbers(data: Data) -> None:
    """Numbers that occur twice or leave a gap within one section and role."""
    sets: dict[tuple[str, str], list[Item]] = {}
    for item in data.items:
        if item.number:
            sets.setdefault((item.section, item.role), []).append(item)
    for (section, role), items in sets.items():
        counts = collections.Counter(item.number for item in items)
        twice = [number for number, count in counts.items() if count > 1]
        if twice:
            data.notes.append(
                f"{section}, {role}: numbers that occur twice: {', '.join(twice[:10])}"
            )
            for item in items:
                if item.number in twice and "number occurs twice" not in item.flags:
                    item.flags.append("number occurs twice")
        last = [
            int(re.split(r"[.\-–]", number)[-1])
            for number in counts
            if re.fullmatch(r"[\d.\-–]*\d", number)
        ]
        gaps = sorted(set(range(min(last), max(last))) - set(last)) if last else []
        if gaps and len(gaps) < len(last):
            data.notes.append(
                f"{section}, {role}: numbers that are missing: {', '.join(map(str, gaps[:10]))}"
            )


def _flag_editions(data: Data) -> None:
    """Sections of one title in one chapter with items of the same numbers: two editions in one
    folder."""
    numbers: dict[str, set[str]] = {}
    for item in data.items:
        if item.number:
            numbers.setdefault(item.section, set()).add(f"{item.role} {item.number}")
    seen: dict[str, str] = {}
    for section in data.sections:
        key = re.sub(r"\W+", "", section.title).lower()
        other = seen.setdefault(key, section.id)
        if key and other != section.id:
            shared = numbers.get(section.id, set()) & numbers.get(other, set())
            if len(shared) >= 3:
                data.notes.append(
                    f"{other} and {section.id} have the title {section.title!r} and {len(shared)} numbers "
                    "in common: two editions of one book?"
                )


def _flag_shifted(data: Data) -> None:
    """Whether the answers of a section fit its exercises better one place away."""
    sets: dict[str, list[Item]] = {}
    for item in data.items:
        if item.kind == "exercise":
            sets.setdefault(item.section, []).append(item)
    for section, items in sets.items():
        scores = {shift: _fits(items, shift) for shift in (-1, 0, 1)}
        best = max((-1, 1), key=lambda shift: scores[shift])
        if scores[best] >= scores[0] + _SHIFT and scores[best] >= 2 * scores[0]:
            data.notes.append(
                f"{section}: {scores[best]} answers fit the exercise {'before' if best > 0 else 'after'} theirs, {scores[0]} their own: a shifted key?"
            )
            for item in items:
                if item.answer:
                    item.flags.append("suspicious gold: the key looks shifted by one")


def _fits(items: list[Item], shift: int) -> int:
    """How many exercises fit the answer this many places further: the value of their calculation,
    or the labels of their parts."""
    fits = 0
    for at, item in enumerate(items):
        if not 0 <= at + shift < len(items):
            continue
        answer = items[at + shift]
        value = computed(_own(item)) if answer.final and len(answer.final) < 40 else None
        if value is not None:
            fits += checker.check(answer.final, value).equal is True
        labels = [part.label for part in item.parts if part.question]
        given = [part.label for part in answer.parts if part.answer]
        fits += len(labels) > 1 and labels == given
    return fits


# Twins


def masked(text: str) -> str:
    """The text with its numbers taken out, the same for twins."""
    text = re.sub(r"\[image:[^\]]*\]", "[image]", text.lower())
    text = re.sub(r"\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}", "#", text)
    text = re.sub(r"\d[\d,]*(?:\.\d+)?", "#", text)
    return re.sub(r"\s+", " ", text).strip()


def _group(items: list[Item]) -> None:
    """Items equal but for numbers, and the exercises to try after an example with it, in one
    group."""
    parent = list(range(len(items)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    first: dict[str, int] = {}
    example = None
    for at, item in enumerate(items):
        key = masked(item.question)
        if key:
            parent[root(at)] = root(first.setdefault(key, at))
        if item.kind == "example":
            example = at
        elif item.role == "try" and example is not None and items[example].section == item.section:
            parent[root(at)] = root(example)
    names = {at: items[at].id for at in range(len(items))}
    for at, item in enumerate(items):
        item.group = names[root(at)]


def _duplicates(items: list[Item]) -> None:
    """Items with the same question, and those of them whose answers differ."""
    by_question: dict[str, list[Item]] = {}
    for item in items:
        key = re.sub(r"\s+", " ", item.question).strip().lower()
        if key:
            by_question.setdefault(key, []).append(item)
    for same in by_question.values():
        for item in same[1:]:
            item.flags.append(f"duplicate of {same[0].id}")
        given = {
            re.sub(r"\W+", "", item.final or item.answer).lower() for item in same if item.answer
        }
        if len(given) > 1:
            for item in same:
                item.flags.append("duplicate with another answer")


def overlaps(items: list[Item]) -> list[tuple[str, str, float]]:
    """(exercise, example, share) of near duplicates within a section: the share of three words in a
    row that both have of those that either has, shared instructions left out."""
    out = []
    sections: dict[str, list[tuple[Item, frozenset]]] = {}
    for item in items:
        words = re.findall(r"\w+", _own(item).lower())
        grams = frozenset(zip(words, words[1:], words[2:], strict=False))
        sections.setdefault(item.section, []).append((item, grams))
    for rows in sections.values():
        examples = [row for row in rows if row[0].kind == "example" and row[1]]
        for item, grams in rows:
            if item.kind == "example" or len(grams) < 3:
                continue
            for example, others in examples:
                share = len(grams & others) / len(grams | others)
                if share > OVERLAP:
                    out.append((item.id, example.id, round(share, 3)))
    return out
