"""A piece of tokens as people read it: reasoning, calls and results, and turns by role."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

from jaxdeep.chat.format import Author, Span
from jaxdeep.chat.marks import Mark, any_of
from jaxdeep.chat.tokenizer import TextDecoder, Tokenizer

HEADER_TOKENS = 16
"""Tokens after a mark in which a turn says whose it is."""

SPAN_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "ipython": "result",
    "environment": "result",
    "tool": "result",
}
SPAN_ENDS = {"think": "unthink", "call": "uncall", "result": "unresult"}
HEADERS = ("start", "system", "user", "assistant")
"""The kinds of marks that begin a turn."""


class Spans:
    """Cuts tokens at a format's marks. A record is shown with the marks that its tokenizer has,
    whether its policy uses them or not; the others are found in the text."""

    def __init__(
        self, tokenizer: Tokenizer, marks: Sequence[Mark], stop_ids: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._kinds = {mark.kind for mark in marks}
        self._shown_ids = {tokenizer.id(mark): mark for mark in marks if tokenizer.has(mark)}
        self._shown_text = TextMarkFinder([m for m in marks if not tokenizer.has(m)])

    def of(self, tokens: Sequence[int], author: Author, *, bare_call: bool) -> list[Span]:
        """The spans of a piece. `bare_call`: all of it but its end is a call without marks."""
        if bare_call:
            last = len(tokens) - (tokens[-1] in self.stop_ids)
            ends = [(last, "call"), *([(len(tokens), "")] if last < len(tokens) else [])]
        else:
            ends = self._span_ends(tokens, author)
        spans, begun = [], 0
        for end, block in ends:
            run = list(tokens[begun:end])
            spans.append(Span(run, block or ("text" if author == "policy" else self._role(run))))
            begun = end
        return spans

    def _span_ends(self, tokens: Sequence[int], author: Author) -> Iterator[tuple[int, str]]:
        """Where each span ends, and which block it is, "" for what is outside of blocks."""
        blocks = ("think", "call") if author == "policy" else ("result",)
        begun, block, end_kind = 0, "", ""
        has_header = False  # a second turn begins a span of its own
        has_thought = author == "world"
        for begin, end, kind in self._found_marks(tokens):
            if kind == "unthink" and not has_thought and not end_kind:  # the prompt began it
                yield end, "think"
                begun, has_thought = end, True
                continue
            has_thought |= kind == "think"
            if end_kind and kind != end_kind:
                continue
            if end_kind:
                yield end, block
                begun, block, end_kind, has_header = end, "", "", False
            elif kind in blocks or (kind in HEADERS and has_header):
                if begin > begun:
                    yield begin, block
                begun = begin
                block = kind if kind in blocks else ""
                end_kind = self._end_kind(block)
            has_header |= kind in HEADERS
        if begun < len(tokens):
            yield len(tokens), block

    def _end_kind(self, block: str) -> str:
        """The kind of mark that ends a block; that of a turn's end where the block has none."""
        if not block:
            return ""
        return SPAN_ENDS[block] if SPAN_ENDS[block] in self._kinds else "end"

    def _found_marks(self, tokens: Sequence[int]) -> list[tuple[int, int, str]]:
        """The marks among the tokens: where each begins and ends, and its kind."""
        found = [
            (at, at + 1, self._shown_ids[id].kind)
            for at, id in enumerate(tokens)
            if id in self._shown_ids
        ]
        return sorted(found + self._shown_text.find(tokens, self.tokenizer, self._shown_ids))

    def _role(self, tokens: Sequence[int]) -> str:
        """Who speaks in a run of the world's tokens, "text" where it does not say."""
        for _, end, kind in self._found_marks(tokens):
            if kind in SPAN_ROLES:
                return SPAN_ROLES[kind]
            if kind == "start":
                header = self.tokenizer.decode(tokens[end : end + HEADER_TOKENS])
                return next(
                    (r for role, r in SPAN_ROLES.items() if header.startswith(role)), "text"
                )
        return "text"


class TextMarkFinder:
    """Where marks that are text stand among tokens."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = {str(mark): mark for mark in marks}
        self._pattern = any_of(self._marks) if marks else None

    def find(
        self, tokens: Sequence[int], tokenizer: Tokenizer, skip: Iterable[int]
    ) -> list[tuple[int, int, str]]:
        """The tokens from which to which each mark goes, and its kind. A token that a mark shares
        with other text is the mark's."""
        if self._pattern is None:
            return []
        decoder, text, ends = TextDecoder(tokenizer), [], []
        for id in tokens:
            text.append("\0" if id in skip else decoder.feed([id]))
            ends.append((ends[-1] if ends else 0) + len(text[-1]))
        found, after = [], 0
        for match in self._pattern.finditer("".join(text)):
            begin = max(bisect.bisect_right(ends, match.start()), after)
            after = bisect.bisect_left(ends, match.end()) + 1
            if begin < after:
                found.append((begin, after, self._marks[match[0]].kind))
        return found
