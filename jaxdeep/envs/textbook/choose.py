"""A language model that finds items which rules missed. It chooses lines, it never writes a field.

The model sees numbered lines of a section's text and answers with ranges of lines. A field is then
the text of those lines, read from the book again, so that nothing that the model says can get into
it; `verify` checks it like any other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from jaxdeep.agent.base import Policy
from jaxdeep.chat.format import ChatFormat
from jaxdeep.envs.textbook.fields import Field
from jaxdeep.envs.textbook.files import Folder
from jaxdeep.envs.textbook.schema import Data, Item, Section
from jaxdeep.types import Message, Sampling

Ask = Callable[[str], str]
"""A prompt in, the model's answer out."""

WINDOW = 120  # lines shown at once
_BY = "choose.lines"
_FIELDS = ("question", "reasoning", "answer")
_KINDS = ("example", "exercise")
PROMPT = """Below are numbered lines of a textbook. Find worked examples and exercises in them.
Answer with a JSON list only. Each element has "kind" ("example" or "exercise"), "question", and if
they are there "reasoning" and "answer"; each of these is [first line, last line]. Do not copy or
change any text: give line numbers. Answer [] if there is nothing.

"""


def of_policy(policy: Policy, chat: ChatFormat, *, max_new: int = 2000, seed: int = 0) -> Ask:
    """A policy as a function of a prompt: one turn of the assistant, at most `max_new` tokens, the
    most likely ones. A turn that is cut is no JSON, and so refused and counted."""

    def ask(prompt: str) -> str:
        tokens = chat.opening([Message("user", prompt)])
        stop = Sampling(temperature=0.0, stop=tuple(chat.stop_ids))
        turn = policy(tokens, seed=seed, max_new=max_new, sampling=stop)
        return chat.parse(asyncio.run(turn).tokens).content

    return ask


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file inside a section's spans: its characters."""

    file: str
    start: int
    end: int


@dataclasses.dataclass
class Choices:
    """What came of the pass: items added, and answers of the model that could not be used, by
    why."""

    added: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)


def choose(data: Data, folder: Folder, ask: Ask) -> Choices:
    """Ask about each section's text, window by window, and add the items whose lines are all inside
    the window, in order, and in no other item of it. Everything else is refused and counted."""
    out = Choices()
    for section in data.sections:
        rows = section_lines(section, folder)
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            shown = "\n".join(f"{n}: {_text(folder, row)}" for n, row in enumerate(window, 1))
            taken: set[int] = set()
            for choice in _choices(ask(PROMPT + shown), out, section):
                _add(data, folder, section, window, choice, taken, out)
    return out


def section_lines(section: Section, folder: Folder) -> list[Line]:
    """The lines of the section's text in the files, empty ones left out."""
    out = []
    origin = section.spans.get("text")
    for span in origin.spans if origin else ():
        file = folder.file(span.file)
        before = file.data[: span.start].decode(file.encoding, "surrogateescape")
        text = file.data[span.start : span.end].decode(file.encoding, "surrogateescape")
        at = len(before)
        for line in text.splitlines(keepends=True):
            if line.strip():
                start = at + len(line) - len(line.lstrip())
                out.append(Line(span.file, start, at + len(line.rstrip())))
            at += len(line)
    return out


def _text(folder: Folder, line: Line) -> str:
    return folder.file(line.file).text[line.start : line.end]


def _choices(answer: str, out: Choices, section: Section) -> list[dict[str, Any]]:
    found = re.search(r"\[.*\]", answer, re.S)
    try:
        choices = json.loads(found[0]) if found else None
    except ValueError:
        choices = None
    if not isinstance(choices, list):
        out.refused.append(f"{section.id}: no list of JSON: {answer[:60]!r}")
        return []
    return choices


def _add(
    data: Data,
    folder: Folder,
    section: Section,
    window: list[Line],
    choice: Any,
    taken: set[int],
    out: Choices,
) -> None:
    ranges = _ranges(choice, len(window))
    if isinstance(ranges, str):
        out.refused.append(f"{section.id}: {ranges}: {choice!r:.80}")
        return
    lines = {n for first, last in ranges.values() for n in range(first, last + 1)}
    if lines & taken:
        out.refused.append(f"{section.id}: lines of another item: {choice!r:.80}")
        return
    taken |= lines
    number = sum(item.section == section.id for item in data.items) + 1
    item = Item(f"{section.id}-chosen-{number}", choice["kind"], section.id, role="chosen")
    item.flags.append("chosen by a model")
    for name, (first, last) in ranges.items():
        field = Field(_BY, "\n")
        for line in window[first - 1 : last]:
            text = (
                re.sub(r"<[^>]+>", " ", _text(folder, line))
                if _tagged(line)
                else _text(folder, line)
            )
            field.add(text, folder.file(line.file).span(line.start, line.end))
        setattr(item, name, field.text)
        item.spans[name] = field.origin("verbatim")
    data.items.append(item)
    out.added += 1


def _tagged(line: Line) -> bool:
    return line.file.lower().endswith((".html", ".htm", ".xhtml", ".cnxml", ".xml"))


def _ranges(choice: Any, lines: int) -> dict[str, tuple[int, int]] | str:
    """The ranges of a choice by field, or why it is none."""
    if not isinstance(choice, dict) or choice.get("kind") not in _KINDS:
        return "no kind"
    if choice.keys() - {"kind", *_FIELDS}:
        return "other keys than line numbers"
    out = {}
    for name in _FIELDS:
        value = choice.get(name)
        if value is None:
            continue
        numbers = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
        if not numbers or not 1 <= value[0] <= value[1] <= lines:
            return f"{name} is no range of lines"
        out[name] = (value[0], value[1])
    if "question" not in out:
        return "no question"
    ends = list(out.values())
    if any(a[1] >= b[0] for a, b in itertools.pairwise(ends)):
        return "ranges that overlap"
    return out
