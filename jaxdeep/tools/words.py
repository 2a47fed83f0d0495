"""Words of a text in any language: what a search index holds, and what answers are compared by.

Texts are compared in one form of Unicode (NFC: composed, as tokenizers make it). Scripts that are
written without spaces, and Hangul, whose words end in particles, have no words that can be told
without a dictionary: there the characters count, as they do in Lucene's CJK analyzer.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable

import regex

# A letter of these scripts, or a sign between them that lengthens or repeats.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}"
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}ー々〆〻]"
)
_CHARACTER = regex.compile(rf"{_UNSPACED}\p{{M}}*")
# regex, unlike re, takes the marks of a letter for letters.
_RUN = regex.compile(rf"((?:{_UNSPACED}\p{{M}}*)+)|(?:(?!{_UNSPACED})\w)+")
_TOKEN = regex.compile(rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})\S)+")
_LETTER, _MARK = regex.compile(r"\w"), regex.compile(r"\p{M}")


def folded(text: str) -> str:
    """The text in lower case and composed: as texts are compared."""
    return unicodedata.normalize("NFC", text.lower())


def tokens(text: str) -> list[str]:
    """A text cut at its white space; each character of a script without spaces is a token."""
    return _TOKEN.findall(text)


def index_words(text: str, stem: Callable[[str], str] | None = None) -> list[str]:
    """What a search index holds of a text: runs of letters, digits and underscores, folded and
    through `stem`; of scripts without spaces each character and each pair of neighbours."""
    out: list[str] = []
    for word, characters in _runs(text):
        out += [*characters, *_pairs(characters)] if characters else [stem(word) if stem else word]
    return out


def query_words(text: str, stem: Callable[[str], str] | None = None) -> list[str]:
    """What of a query is looked up in `index_words`: of scripts without spaces the pairs, which say
    more than characters do, and a character that stands alone."""
    out: list[str] = []
    for word, characters in _runs(text):
        out += _pairs(characters) or characters or [stem(word) if stem else word]
    return out


def has_words(text: str, part: str) -> bool:
    """Whether a text has a part as whole words: before and after it there is the end of the text, a
    sign that is no letter, or a character of a script without spaces."""
    at = text.find(part) if part else -1
    while at >= 0:
        if _is_border(text, at) and _is_border(text, at + len(part)):
            return True
        at = text.find(part, at + 1)
    return False


def _runs(text: str) -> list[tuple[str, list[str]]]:
    """The words of a text, each with its characters where the script has no spaces."""
    found = _RUN.finditer(folded(text))
    return [(run[0], _CHARACTER.findall(run[0]) if run[1] else []) for run in found]


def _pairs(characters: list[str]) -> list[str]:
    return [a + b for a, b in itertools.pairwise(characters)]


def _is_border(text: str, at: int) -> bool:
    if at in (0, len(text)):
        return True
    if _MARK.match(text, at):  # of the letter before
        return False
    before = at - 1
    while before and _MARK.match(text, before):
        before -= 1
    if not (_LETTER.match(text, before) and _LETTER.match(text, at)):
        return True
    return bool(_CHARACTER.match(text, before) or _CHARACTER.match(text, at))
