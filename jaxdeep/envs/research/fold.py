"""Texts as quotations are compared: what typing and typesetting change is levelled, words, digits
and signs are not, and each character keeps its place in the original.

    fold("The “ﬁrst”\\u00a0 *flight*").text == 'the "first" flight'

Levelled: compatibility forms of letters (NFKC: ligatures, full-width letters), white space, quote
and dash shapes, zero-width characters and soft hyphens, a hyphen at the end of a line, Markdown
emphasis, case. Never levelled: digits in any form (a superscript 2 is not a 2), signs, words.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata
from typing import NamedTuple

_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff\u200e\u200f"
_SHAPES = {
    **dict.fromkeys("‘’‚‛′`´ʼʻʹ", "'"),
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‐‑‒–—―−﹣－", "-"),
    "…": "...",
}
# An asterisk or a low line is emphasis where a word is on one of its sides only. Every alternative
# begins with a character of a set, which `re` looks for quickly, and none looks further than a
# bounded way or a run that no other match begins in: sources are hostile, and the time must stay
# linear.
_EMPHASIS = "|".join(
    (
        r"[*_](?<!\w[*_])[*_]{0,2}(?=[^\W_]|[(\"'“])",
        r"[*_](?<=[^\W_][*_])[*_]{0,2}(?!\w)",
        r"[*_](?<=[.,;:!?%)\"'”][*_])[*_]{0,2}(?!\w)",
    )
)
_LINE_END = "[-‐\u00ad](?<=[a-z][-‐\u00ad])\n[ \t]*(?=[a-z])"


class Folded(NamedTuple):
    """`text` is the folded text; `at` and `origin` are equally long: from `text[at[n]]` on, up to
    the next, character k stands for the original's `origin[n] + k - at[n]`, or for `origin[n]`
    itself where the original's character became several (`steps[n]` is 0)."""

    text: str
    at: list[int]
    origin: list[int]
    steps: list[int]
    length: int

    def place(self, position: int) -> int:
        """Where the folded character at `position` is in the original; its length at the end."""
        if position >= len(self.text):
            return self.length
        n = bisect.bisect_right(self.at, position) - 1
        return self.origin[n] + self.steps[n] * (position - self.at[n])

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The original's span of `text[start:end]`, which is not empty."""
        return self.place(start), self.place(end - 1) + 1

    def position(self, place: int) -> int:
        """The first folded character that stands for the original's `place` or a later one."""
        n = bisect.bisect_right(self.origin, place) - 1
        if n < 0:
            return 0
        end = self.at[n + 1] if n + 1 < len(self.at) else len(self.text)
        ahead = place - self.origin[n]
        if not self.steps[n]:
            return self.at[n] if ahead == 0 else end
        return min(self.at[n] + ahead, end)


def fold(text: str) -> Folded:
    """The folded text, in time linear in its length."""
    pattern, changes = _pattern(frozenset(text))
    out, at, origin, steps = [], [], [], []
    size = last = 0

    def keep(piece: str, place: int, step: int) -> None:
        nonlocal size
        if piece:
            out.append(piece)
            at.append(size)
            origin.append(place)
            steps.append(step)
            size += len(piece)

    for match in pattern.finditer(text):
        start, end = match.span()
        keep(text[last:start].lower(), last, 1)
        found = match.group()
        if found in changes:
            new = changes[found]
            keep(new, start, int(len(new) == 1))
        elif found[0].isspace():
            keep(" ", start, 1)
        last = end  # whatever else was found, emphasis and hyphens of line ends, is left out
    keep(text[last:].lower(), last, 1)
    return Folded("".join(out), at, origin, steps, len(text))


def _pattern(characters: frozenset[str]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What is changed in a text of these characters, and into what."""
    # The lower case of a capital sigma depends on what follows it, which `str.lower` looks at.
    changes = {
        c: new
        for c in characters
        if (new := _levelled(c)) != c.lower() or len(c.lower()) > 1 or c == "Σ"
    }
    single = "".join(re.escape(c) for c in sorted(changes))
    parts = [_LINE_END, rf"\s[\s{_INVISIBLE}]+|[^\S ]"]
    if characters & {"*", "_"}:
        parts.append(_EMPHASIS)
    if single:
        parts.append(f"[{single}]")
    return _compiled("|".join(parts)), changes


@functools.lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@functools.lru_cache(maxsize=4096)
def _levelled(character: str) -> str:
    """What one character becomes, by itself."""
    if character in _INVISIBLE:
        return ""
    if character in _SHAPES:
        return _SHAPES[character]
    if character.isspace():
        return character
    if unicodedata.category(character)[0] == "N":
        return character
    return unicodedata.normalize("NFKC", character).casefold()
