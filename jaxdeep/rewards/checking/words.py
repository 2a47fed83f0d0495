"""Answers in words: yes and no, choices, terms, names of nothing; which are not short answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxdeep.rewards.checking import text as texts

LONGEST = 8  # words of an answer that is compared word by word

_VERDICT = re.compile(
    r"(yes|no|true|false)\b(?!\s+(?:solution|real|correlation|answer))[.,;:]?\s*(.*)", re.I | re.S
)
_SHORT = {"t": "true", "f": "false", "y": "yes", "n": "no"}
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_FILLER = {
    *("a", "an", "the", "place", "it", "is", "its", "they", "are", "this", "that", "be", "would"),
    *("of", "to", "answer", "number", "value"),
}
_GROUPS = (
    (
        "no solution",
        "none",
        "no solutions",
        "no real solution",
        "no real solutions",
        "inconsistent",
        "there is no solution",
        "has no solution",
        r"\emptyset",
        "empty set",
        "⦃⦄",
        "∅",
        "null set",
    ),
    ("undefined", "not defined", "dne", "does not exist", "doesn't exist", "do not exist"),
    ("not a real number", "not real"),
)
_UNGRADABLE = re.compile(
    r"\banswers? (?:may|will|might|can|could)? ?var|\bvary\b|\bsample answer|\bsee (?:the )?(?:figure|graph|"
    r"solution|table|text|below)|\bproof\b|\bfill in\b|\bsketch\b|\bdiscuss|\bexplain",
    re.IGNORECASE,
)
IMAGE = re.compile(r"\[image|!\[|\\includegraphics")


def verdict(text: str) -> tuple[str, str] | None:
    """("no", "30") of "No; 30.": the verdict, and what follows it; None where an answer does not
    begin with yes, no, true or false."""
    if text.strip().lower() in _SHORT:
        return _SHORT[text.strip().lower()], ""
    match = _VERDICT.match(text.strip())
    return (match[1].lower(), texts.stripped(match[2])) if match else None


def contradicts(word: str, rest: str) -> bool:
    """Whether what follows a verdict gives the opposite one as well: "Yes or no"."""
    opposite = _OPPOSITE[word]
    pattern = rf"(?:^|[.,;:]|\bor\b|/)\s*(?:{opposite})\b(?!\s+[a-z])"
    return bool(re.search(pattern, rest, re.IGNORECASE)) or bool(
        re.match(rf"(?:or|/)\s*{opposite}\b", rest, re.IGNORECASE)
    )


def choice(text: str) -> str | None:
    """The letter of a choice ("(B)", "B.", "b) because ..."); None for anything else."""
    match = re.fullmatch(r"\(?([A-Ea-e])\)?(?:[.):]\s*.*)?", text.strip())
    return match[1].upper() if match else None


def nothing(text: str) -> int | None:
    """Which of the ways to say that there is no value: no solution, undefined; None if none."""
    said = re.sub(r"\s+", " ", text.lower()).strip(" .")
    for number, group in enumerate(_GROUPS):
        if said in group:
            return number
    return None


def tokens(text: str) -> list[str]:
    """The words that count, in lower case and singular."""
    text = re.sub(r"\\([a-z]+)", r" \1 ", text.lower()).replace("-", " ")
    text = re.sub(r"\b([ap])\.?\s?m\b\.?", r"\1m", text)
    found = re.findall(r"[^\W_]+(?:'[a-z]+)?|[+%$/<>=-]", text)
    kept = [word for word in found if word not in _FILLER]
    return [_singular(word) for word in kept or found]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def same(gold: str, answer: str, synonyms: Sequence[Sequence[str]]) -> bool:
    """Whether two answers in words are the same, or stand in one group of synonyms."""
    a, b = tokens(gold), tokens(answer)
    if a and (a == b or (len(a) <= 3 and sorted(a) == sorted(b))):
        return True  # "skewed to the right" is "right skewed"
    groups = ([tokens(word) for word in group] for group in synonyms)
    return any(a in group and b in group for group in groups)


def ungradable(text: str) -> str:
    """Why no answer can be compared with this gold: "image", "explanation"; "" if one can."""
    if IMAGE.search(text):
        return "image"
    found = verdict(text)
    if found and found[0] and len(text) <= texts.LONGEST:
        return ""
    if _UNGRADABLE.search(text):
        return "explanation"
    plain_words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return "explanation" if len(plain_words) > LONGEST or len(text) > texts.LONGEST else ""
