"""From the messages of a conversation to the report in it: what was shown is read from the results
as the model read them, after they were cut, and from nothing else."""

from __future__ import annotations

from collections.abc import Container, Sequence

from jaxdeep.envs.research.report import Report
from jaxdeep.envs.research.sources import Shelf, read_shown
from jaxdeep.types import Message

OPEN, CLOSE = "<answer>", "</answer>"


def shown(messages: Sequence[Message], tools: Container[str]) -> Shelf:
    """The sources in the results of `tools`, those that return sources. A sentence's order is the
    index of its message. What the model wrote is no source, nor are results of other tools: notes
    read back, the output of code."""
    shelf = Shelf()
    for index, message in enumerate(messages):
        if message.role == "tool" and message.name in tools:
            read_shown(message.content, index, shelf)
    return shelf


def report(
    question: str, messages: Sequence[Message], tools: Container[str], id: str = ""
) -> Report:
    """The report of a conversation: the last answer in the last turn of the assistant, where that
    calls no tool. Without a closing tag it is as much of the answer as there is, and incomplete;
    without an answer it is empty."""
    turns = [n for n, message in enumerate(messages) if message.role == "assistant"]
    index = turns[-1] if turns else len(messages)
    said = messages[index].content if turns and not messages[index].calls else ""
    start = said.rfind(OPEN)
    rest = said[start + len(OPEN) :] if start >= 0 else ""
    answer, closed, _ = rest.partition(CLOSE)
    notes = () if closed else ("the answer is not closed" if rest else "there is no <answer>",)
    return Report(question, answer, shown(messages, tools), index, not closed, id, notes)
