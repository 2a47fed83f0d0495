"""Rewards for short answers: read the final answer, compare it with the right ones, check its form.

A reward takes a `Task` with its right answers and a `Trajectory` with its messages, and gives a
number from 0 to 1. An answer is right when it equals a right one after SQuAD's normalisation; a
single text in place of several answers is one. Where the answer is wrong every reward is bounded:
`answer_em` and `retry` are 0, `format_ok` is at most 1.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable

from jaxdeep.tools import words
from jaxdeep.types import Message, Task, Trajectory

RETRIES = 3
"""Turns with a new query after which `retry` is 1 even if no result had the answer in it."""

_OPEN, _CLOSE = "<answer>", "</answer>"
# CJK punctuation as well, full width too: SQuAD's rule for the languages that use it (as in CMRC).
_WIDE = (*range(0x3000, 0x3004), *range(0x3008, 0x3020), *range(0xFF01, 0xFF66))
_PUNCTUATION = str.maketrans(
    "", "", string.punctuation + "".join(c for c in map(chr, _WIDE) if not c.isalnum())
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Text in lower case and composed (NFC), without ASCII and CJK punctuation, English articles
    and repeated white space.

    SQuAD's rule (Rajpurkar et al., 2016), in the same order. Punctuation is deleted, not replaced
    by a space: "10.8" becomes "108" and "Nov.7" becomes "nov7".
    """
    return " ".join(_ARTICLES.sub(" ", words.folded(text).translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 where the normalised prediction equals a normalised answer, else 0.

    An empty prediction is never right: an answer that normalises to nothing ("A", "?") is compared
    as it is written, apart from case and outer white space.
    """
    return float(any(_equal(prediction, answer) for answer in _each(answers)))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The best harmonic mean of precision and recall over normalised words, with repetitions; over
    characters where the script has no spaces."""
    return max((_f1(prediction, answer) for answer in _each(answers)), default=0.0)


def extract_answer(text: str) -> str | None:
    """The text in the last closed <answer>, stripped; None without one.

    Search-R1 wants two of them, because its text begins with a prompt that shows one; here the text
    never has the prompt. This gives the recorded prediction for every row of the Search-R1 runs on
    Bamboogle, and `exact_match` and `f1` give their scores.
    """
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, end) if end >= 0 else -1
    return text[start + len(_OPEN) : end].strip() if start >= 0 else None


def final_answer(trajectory: Trajectory) -> str | None:
    """The answer in the last assistant message; None if it has none or calls a tool as well."""
    last = _last(trajectory)
    return extract_answer(last.content) if last is not None and not last.calls else None


def answer_em(task: Task, trajectory: Trajectory) -> float:
    """1 where the final answer is right (`exact_match`), else 0."""
    return exact_match(final_answer(trajectory) or "", task.answers)


def answer_f1(task: Task, trajectory: Trajectory) -> float:
    """`f1` of the final answer, 0 without one. For evaluation and not for RL, since a copied
    question can score here."""
    return f1(final_answer(trajectory) or "", task.answers)


def format_ok(task: Task, trajectory: Trajectory) -> float:
    """1 where the last assistant message has exactly one <answer>, not empty, and no call, and
    every call before it could be read; else 0. Whether the answer is right does not matter."""
    last = _last(trajectory)
    if last is None or last.content.count(_OPEN) != 1 or last.content.count(_CLOSE) != 1:
        return 0.0
    calls = (call for message in trajectory.messages for call in message.calls)
    return float(bool(final_answer(trajectory)) and not any(call.error for call in calls))


def retry(task: Task, trajectory: Trajectory, *, tool: str, argument: str = "query") -> float:
    """Pays for searching again after a miss, in [0, 1], and only where the final answer is right. A
    search is a call of `tool`, and its query is that `argument` of the call.

    1 once a result had an answer in it, so that a first hit needs no second search and more
    searches add nothing. Without a hit, the number of turns with a query not asked before, divided
    by `RETRIES` and at most 1: asking the same again, or several queries in one turn, counts once.
    """
    if not answer_em(task, trajectory):
        return 0.0
    asked: set[str] = set()
    turns = 0
    for message in trajectory.messages:
        if message.role == "tool" and message.name == tool:
            if contains_answer(message.content, task.answers):
                return 1.0
            continue
        queries = {
            normalize(str(call.arguments[argument]))
            for call in message.calls
            if call.name == tool and not call.error and argument in call.arguments
        }
        turns += bool(queries - asked)
        asked |= queries
    return min(turns, RETRIES) / RETRIES


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the normalised text has the words of a normalised answer, in a row and as whole
    words."""
    text = normalize(text)
    return any(words.has_words(text, normalize(answer)) for answer in _each(answers))


def _each(answers: Iterable[str]) -> Iterable[str]:
    return [answers] if isinstance(answers, str) else answers


def _last(trajectory: Trajectory) -> Message | None:
    return next((m for m in reversed(trajectory.messages) if m.role == "assistant"), None)


def _equal(prediction: str, answer: str) -> bool:
    if normalized := normalize(answer):
        return normalize(prediction) == normalized
    return words.folded(prediction).strip() == words.folded(answer).strip() != ""


def _f1(prediction: str, answer: str) -> float:
    predicted, right = words.tokens(normalize(prediction)), words.tokens(normalize(answer))
    if not right:
        return float(_equal(prediction, answer))
    common = (collections.Counter(predicted) & collections.Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))
