"""From the answer that a book prints to the short answer that can be graded, and the parts of
items."""

from __future__ import annotations

import re

from jaxdeep.envs.textbook.schema import Item, Part
from jaxdeep.rewards import checker

LONGEST = 80  # characters of an answer that is graded whole

KINDS = {
    **dict.fromkeys(("number", "ratio", "remainder"), "number"),
    **dict.fromkeys(("expression", "equation", "interval", "formula"), "expression"),
    **dict.fromkeys(("list", "tuple", "parts"), "list"),
    **dict.fromkeys(("verdict", "words", "nothing"), "words"),
    **{"choice": "choice", "explanation": "explanation", "image": "none", "none": "none"},
}
_LABEL = re.compile(
    r"(?:^|(?<=[\s~,;.]))(?:([ⓐ-ⓩ])|\(([a-z]|[ivx]{1,4})\)(?=[\s~$\\\d]|$)|([a-z])\)(?=\s))[\s~]*"
)
_LIST = re.compile(r"\\begin\{(parts|enumerate)\}(?:\[[^\]]*\])?(.*?)\\end\{\1\}", re.S)
_NUMBER = re.compile(
    r"=\s*\$?\s*(-?\\?\$?-?\d(?:[\d,]*\d)?(?:\.\d+)?(?:\\?%)?)\s*\$?(?=[\s.,;)]|$)"
)
_OPEN = re.compile(r"\bvar(?:y|ies)\b|\bsample\b|\bfor example\b", re.I)  # more than one is right
_VERDICT = re.compile(r"\s*(yes|no|true|false)\b(?=[\s.,;:]|$)", re.I)


def labelled(text: str) -> dict[str, str]:
    """The parts of a text by label, from the first label on: ⓐ, (a), a), (i), or the entries of a
    list of LaTeX that is lettered. Labels follow each other; empty with fewer than two."""
    listed = _LIST.search(text)
    if listed:
        entries = re.split(r"\\item(?![A-Za-z])\s*(?:\[[^\]]*\])?", _flat(listed[2]))[1:]
        if listed[1] == "parts" and len(entries) > 1:
            return {chr(97 + n): entry.strip() for n, entry in enumerate(entries[:26])}
    found: list[tuple[str, int, int]] = []
    for match in _LABEL.finditer(text):
        label = chr(ord(match[1]) - ord("ⓐ") + 97) if match[1] else match[2] or match[3]
        expected = _next(found[-1][0], found) if found else ("a", "i")
        if label in expected:
            found.append((label, match.start(), match.end()))
    if len(found) < 2:
        return {}
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    return {
        label: text[start:end].strip() for (label, _, start), end in zip(found, ends, strict=True)
    }


def _flat(text: str) -> str:
    """A list without the lists inside it."""
    return re.sub(
        r"\\begin\{(subparts|itemize|enumerate|romanparts)\}.*?\\end\{\1\}", " ", text, flags=re.S
    )


_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii")


def _next(label: str, found: list) -> tuple[str, ...]:
    if found[0][0] == "i":
        at = _ROMAN.index(label) + 1
        return _ROMAN[at : at + 1]
    return (chr(ord(label) + 1),)


def grade(item: Item) -> None:
    """Set the item's parts, its `answer_kind` and the short answer `final`.

    A short answer is graded whole. Of a longer one each part is tried, then a verdict that begins
    it, then the number after its last sign of equality; else it is an explanation, and not graded.
    An item whose text the reader does not trust has no short answer."""
    questions, answers = labelled(item.question), labelled(item.answer)
    labels = list(dict.fromkeys([*questions, *answers]))
    item.parts = [Part(label, questions.get(label, ""), answers.get(label, "")) for label in labels]
    if (
        questions
        and answers
        and set(questions) != set(answers)
        and "parts disagree" not in item.flags
    ):
        item.flags.append("parts disagree")
    item.final, kind = final_of(item.answer)
    item.answer_kind = KINDS[kind]
    if {"layout", "no question"} & {*item.flags}:
        item.final = ""


def final_of(answer: str) -> tuple[str, str]:
    """(short answer, its kind) of an answer as it is printed; ("", kind) where none can be
    graded."""
    text = re.sub(r"\s+", " ", answer).strip()
    if not text:
        return "", "none"
    kind = checker.kind_of(text)
    if len(text) <= LONGEST and checker.gradable(text):
        return text, kind
    if kind == "image" or _OPEN.search(text):
        return "", kind if kind == "image" else "explanation"
    parts = labelled(answer)
    if parts:
        finals = {label: final_of(part)[0] for label, part in parts.items()}
        if all(finals.values()):
            return " ".join(f"({label}) {final}" for label, final in finals.items()), "parts"
        return "", "explanation"
    verdict = _VERDICT.match(text)
    if verdict:
        return verdict[1], "verdict"
    numbers = _NUMBER.findall(text)
    if numbers and text.count("=") <= 12 and "[image" not in text:
        return numbers[-1].strip("$ "), "number"
    return "", "explanation"
