"""A field of an item as it grows piece by piece, with where each piece stands in the files.

A reader writes text that no span has between two marks (`added`); the field takes the marks out and
remembers the places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxdeep.envs.textbook.schema import Made, Origin, Span

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


def added(text: str) -> str:
    """A text that stands in the field and in no span: "Example 2.3" for a link without text."""
    return f"{_OPEN}{text}{_CLOSE}" if text else ""


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


class Field:
    """Pieces of text in order, each with its spans; `by` names the function that made them."""

    def __init__(self, by: str, between: str = "\n\n") -> None:
        self.by, self.between = by, between
        self.texts: list[str] = []
        self.spans: list[Span] = []

    def add(self, text: str, *spans: Span) -> None:
        """One more piece, marked where it says more than its spans."""
        self.texts.append(text)
        for span in spans:
            last = self.spans[-1] if self.spans else None
            if last and last.file == span.file and last.end == span.start:
                self.spans[-1] = Span(span.file, last.start, span.end)
            else:
                self.spans.append(span)

    def marked(self) -> str:
        return self.between.join(text for text in self.texts if text.strip()).strip()

    @property
    def text(self) -> str:
        """The field's text."""
        return unmarked(self.marked())

    def origin(self, made: Made) -> Origin:
        """Where the text came from."""
        places, removed = [], 0
        for match in _MARKED.finditer(self.marked()):
            start = match.start() - removed
            places.append((start, start + len(match[1])))
            removed += 2
        return Origin(made, tuple(self.spans), self.by, tuple(places))


def joined(fields: Sequence[Field]) -> Field:
    """One field of several, in order."""
    whole = Field(fields[0].by, fields[0].between)
    for field in fields:
        whole.texts += field.texts
        for span in field.spans:
            whole.add("", span)
        whole.texts = [text for text in whole.texts if text]
    return whole
