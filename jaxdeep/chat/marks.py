"""Marks of a chat format, and how they are found in what a policy wrote.

A mark is a control token where the tokenizer has one of that name, and text where it has none: an
instruct model without a token for `<tool_call>` writes that tag letter by letter. The classes here
turn the texts and control tokens of a turn into its parts (marks, and the texts between them), bit
by bit; what reads the parts is in `turn`, and does not ask where a mark came from.
"""

from __future__ import annotations

import collections
import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol


class Mark(enum.StrEnum):
    """A mark; each format lists its own. The name says what it does, in small letters `kind`."""

    @property
    def kind(self) -> str:
        return self.name.lower()


INSIDE = ("think", "unthink", "call", "uncall")
"""The kinds of marks that structure a policy's turn."""


class Stage(Protocol):
    """One step from the parts of a turn as they come to parts that are decided."""

    def feed(self, part: str) -> list[str]:
        """The parts that are decided after this one."""
        ...

    def flush(self) -> list[str]:
        """What was held back, when the turn ends here."""
        ...


def settled(parts: Iterable[str], stages: Sequence[Stage]) -> Iterator[str]:
    """The parts of a whole turn after all stages."""
    for stage in stages:
        parts = _through(parts, stage)
    yield from parts


def _through(parts: Iterable[str], stage: Stage) -> Iterator[str]:
    for part in parts:
        yield from stage.feed(part)
    yield from stage.flush()


class TextMarks:
    """Finds marks that are text. Held back is the end of a text that may be the begin of a mark, so
    that the parts do not depend on where the text was cut."""

    def __init__(self, marks: Iterable[Mark]) -> None:
        self._marks = {str(mark): mark for mark in marks}
        self._pattern = any_of(self._marks)
        self._begins = {text[:n] for text in self._marks for n in range(1, len(text))}
        self._longest = max(map(len, self._begins))
        self._held = ""

    def feed(self, part: str) -> list[str]:
        if isinstance(part, Mark):
            return [*self.flush(), part]
        text, out = self._held + part, []
        at = 0
        for found in self._pattern.finditer(text):
            out += [text[at : found.start()], self._marks[found[0]]]
            at = found.end()
        most = min(self._longest, len(text) - at)
        held = next((n for n in range(most, 0, -1) if text[-n:] in self._begins), 0)
        self._held = text[len(text) - held :]
        out.append(text[at : len(text) - held])
        return list(filter(None, out))

    def flush(self) -> list[str]:
        text, self._held = self._held, ""
        return [text] if text else []


class Lead:
    """Drops what the format puts before a turn's text, one character."""

    def __init__(self, lead: str) -> None:
        self._lead = lead

    def feed(self, part: str) -> list[str]:
        lead, self._lead = self._lead, ""
        if isinstance(part, Mark) or not lead:
            return [part]
        return list(filter(None, [part.removeprefix(lead)]))

    def flush(self) -> list[str]:
        return []


class BareCall:
    """A turn that is a call from its first letter on, without a mark before it. A turn that begins
    like one is held back to its end; `is_call` then says whether it was, and if so `mark` is put
    before it."""

    def __init__(self, mark: Mark, begin: str, is_call: Callable[[str], bool]) -> None:
        self._mark, self._begin, self._is_call = mark, begin, is_call
        self._waiting: list[str] | None = []  # None: not such a turn
        self._begun = False  # whether the first letter was `begin`

    def feed(self, part: str) -> list[str]:
        if self._waiting is None:
            return [part]
        self._waiting.append(part)
        first = part.lstrip()[:1]
        if isinstance(part, Mark) or (not self._begun and first and first != self._begin):
            return self._release()
        self._begun |= bool(first)
        return []

    def flush(self) -> list[str]:
        if not self._waiting:
            return []
        text = "".join(self._release())
        return [self._mark, text] if self._is_call(text) else [text]

    def _release(self) -> list[str]:
        parts, self._waiting = self._waiting, None
        return parts


class CallMarks:
    """Decides which begins and ends of calls are tags: the parts of a turn as they come, with those
    inside a string of a call made part of that text.

    A mark where a string is open is in doubt: the quote that opened the string may be a mistake.
    It, and what follows, is held back until the string ends and the end of a call comes. If all up
    to there is a whole call, by `is_whole`, the marks in doubt were text; otherwise, and where the
    string can never end (JSON allows no line end in it), the first of them was a tag after all.
    """

    def __init__(self, is_whole: Callable[[str], bool]) -> None:
        self._is_whole = is_whole
        self._json: _OpenString | None = None  # of the call that is open
        self._body: list[str] = []  # of that call
        self._held: list[str] = []  # from the first mark in doubt on

    def feed(self, part: str) -> list[str]:
        out: list[str] = []
        coming = collections.deque([part])
        while coming:
            part = coming.popleft()
            is_mark = isinstance(part, Mark) and part.kind in ("call", "uncall")
            in_doubt = is_mark and self._json is not None and self._json.inside
            if is_mark and not in_doubt:
                if self._held:
                    if part.kind == "uncall" and self._is_whole("".join(self._body)):
                        out.append("".join(self._held))
                        self._held = []
                    else:
                        coming.extendleft(reversed([*self._give_up(out), part]))
                        continue
                self._open(part)
                out.append(part)
                continue
            if self._json is not None:
                self._json.read(part)
                self._body.append(part)
            if self._held or in_doubt:
                self._held.append(part)
                if self._json.broken:
                    coming.extendleft(reversed(self._give_up(out)))
            else:
                out.append(part)
        return out

    def flush(self) -> list[str]:
        out: list[str] = []
        while self._held:
            for part in self._give_up(out):
                out += self.feed(part)
        return out

    def _give_up(self, out: list[str]) -> list[str]:
        """The first mark in doubt is a tag: adds it to `out`; the parts to be read again after
        it."""
        (first, *rest), self._held = self._held, []
        self._open(first)
        out.append(first)
        return rest

    def _open(self, mark: Mark) -> None:
        self._json, self._body = (_OpenString() if mark.kind == "call" else None), []


class _OpenString:
    """Whether JSON text that comes bit by bit ends inside a string; `broken` where it cannot be
    JSON."""

    _SIGN = re.compile(r'["\\\x00-\x1f]')

    def __init__(self) -> None:
        self._open = self._escaped = self.broken = False

    @property
    def inside(self) -> bool:
        return self._open and not self.broken

    def read(self, text: str) -> None:
        """More of the text."""
        at = int(self._escaped and bool(text))
        self._escaped &= not text
        while not self.broken and (sign := self._SIGN.search(text, at)):
            at = sign.end()
            if sign[0] == '"':
                self._open = not self._open
            elif sign[0] == "\\" and self._open:
                self._escaped = at == len(text)
                at += 1
            elif sign[0] == "\\" or self._open:
                self.broken = True


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest one where several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def split(text: str, marks: Mapping[str, Mark]) -> list[str]:
    """The text cut at its marks, which become `Mark`s; `marks` are given by their text."""
    if not marks:
        return [text] if text else []
    parts = re.split(f"({any_of(marks).pattern})", text)
    return [marks.get(part, part) for part in parts if part]
