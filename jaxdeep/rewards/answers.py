"""Rewards for short answers: read the final answer, compare it with the right ones, judge the form.

In: a `Task` with its right answers and a `Trajectory` with its messages. Out: a number from 0 to 1.

An answer is right when it is equal to a right one after SQuAD's normalisation. Every reward here is
bounded for a trajectory whose answer is wrong: `answer_em` and `retry` are 0, `format_ok` is at most 1.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable

from jaxdeep.types import Message, Task, Trajectory

RETRIES = 3
"""Turns with a new search after which `retry` pays in full even if no result held the answer."""

SEARCH = "search"
"""The name of the tool whose calls `retry` counts."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Text in lower case without ASCII punctuation, English articles and repeated white space.

    SQuAD's rule (Rajpurkar et al., 2016), in its order: punctuation is deleted, not replaced by a
    space, so "10.8" is "108" and "Nov.7" is "nov7".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 where the normalised prediction equals a normalised answer, else 0.

    Nothing said is never right: an answer that normalises to nothing ("A", "?") is compared as it
    is written, apart from case and outer white space.
    """
    return float(any(_comparable(prediction, answer) for answer in answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The best harmonic mean of precision and recall over normalised words, with repetitions."""
    return max((_overlap(prediction, answer) for answer in answers), default=0.0)


def extract_answer(text: str) -> str | None:
    """What the last closed <answer> holds, stripped; None without one.

    One tag is enough and a prompt is never part of the text. This gives back every recorded
    prediction of the Search-R1 runs on Bamboogle, and `exact_match` and `f1` their scores.
    """
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, end) if end >= 0 else -1
    return text[start + len(_OPEN) : end].strip() if start >= 0 else None


def final_answer(trajectory: Trajectory) -> str | None:
    """The answer in the last assistant message; None if it has none or asks for a tool as well."""
    last = _last(trajectory)
    return extract_answer(last.content) if last is not None and not last.calls else None


def answer_em(task: Task, trajectory: Trajectory) -> float:
    """1 where the final answer is right (`exact_match`), else 0."""
    return exact_match(final_answer(trajectory) or "", task.answers)


def answer_f1(task: Task, trajectory: Trajectory) -> float:
    """`f1` of the final answer, 0 without one. A copied question may score here: no reward for RL."""
    return f1(final_answer(trajectory) or "", task.answers)


def format_ok(task: Task, trajectory: Trajectory) -> float:
    """1 where the last assistant message has exactly one <answer>, not empty, and calls no tool, and
    every call before it could be read; else 0. It does not ask whether the answer is right."""
    last = _last(trajectory)
    if last is None or last.content.count(_OPEN) != 1 or last.content.count(_CLOSE) != 1:
        return 0.0
    calls = (call for message in trajectory.messages for call in message.calls)
    return float(bool(final_answer(trajectory)) and not any(call.error for call in calls))


def retry(task: Task, trajectory: Trajectory) -> float:
    """Pays for searching again after a miss, in [0, 1], and only where the final answer is right.

    1 once a result held an answer, so a first hit needs no second search and further ones add
    nothing. Without a hit, the number of turns with a query not asked before, divided by `RETRIES`
    and at most 1. Asking the same again, or several things at once, counts once.
    """
    if not answer_em(task, trajectory):
        return 0.0
    asked: set[str] = set()
    turns = 0
    for message in trajectory.messages:
        if message.role == "tool" and message.name == SEARCH:
            if holds(message.content, task.answers):
                return 1.0
            continue
        queries = {
            normalize(str(call.arguments["query"]))
            for call in message.calls
            if call.name == SEARCH and not call.error and "query" in call.arguments
        }
        turns += bool(queries - asked)
        asked |= queries
    return min(turns, RETRIES) / RETRIES


def holds(text: str, answers: Iterable[str]) -> bool:
    """Whether the normalised words of an answer stand in the text, in a row and as whole words."""
    padded = f" {normalize(text)} "
    return any((words := normalize(answer)) and f" {words} " in padded for answer in answers)


def _last(trajectory: Trajectory) -> Message | None:
    return next((m for m in reversed(trajectory.messages) if m.role == "assistant"), None)


def _comparable(prediction: str, answer: str) -> bool:
    if wanted := normalize(answer):
        return normalize(prediction) == wanted
    return prediction.strip().lower() == answer.strip().lower() != ""


def _overlap(prediction: str, answer: str) -> float:
    said, wanted = normalize(prediction).split(), normalize(answer).split()
    if not wanted:
        return float(_comparable(prediction, answer))
    common = (collections.Counter(said) & collections.Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
