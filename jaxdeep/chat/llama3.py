"""The chat format of Llama 3: `<|start_header_id|>ROLE<|end_header_id|>\\n\\n ... <|eot_id|>`.

    world    <|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n
             Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n ... <|eot_id|>
             <|start_header_id|>user<|end_header_id|>\\n\\n ... <|eot_id|>
             <|start_header_id|>assistant<|end_header_id|>\\n\\n
    policy   {"name": ..., "parameters": {...}}<|eot_id|>
    world    <|start_header_id|>ipython<|end_header_id|>\\n\\n"..."<|eot_id|>
             <|start_header_id|>assistant<|end_header_id|>\\n\\n

As in the templates of 3.1, 3.2 and 3.3, contents lose the white space around them, and tools stand
in the first turn of the user. Their date is a constant of the format here: a prompt must not change
from day to day. Llama 3.0 (`Llama30`) has neither dates nor tools; here it calls them like the
others. The templates drop a text before a call, and refuse several calls: see `LlamaJson`.
"""

from __future__ import annotations

from typing import ClassVar

from jaxdeep.chat.base import TurnChat, unlearned, weight_of
from jaxdeep.chat.calls import CallSyntax, Content, LlamaJson
from jaxdeep.chat.format import Tools
from jaxdeep.chat.learn import PLAIN, LearnConfig, WeightedPart
from jaxdeep.chat.marks import Mark
from jaxdeep.types import Message

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
ENVIRONMENT = "Environment: ipython\n"


class Llama3Mark(Mark):
    BEGIN = "<|begin_of_text|>"
    START = "<|start_header_id|>"
    HEADER_END = "<|end_header_id|>"
    END = "<|eot_id|>"
    MESSAGE_END = "<|eom_id|>"
    EOT = "<|end_of_text|>"


class Llama30(TurnChat):
    """The `ChatFormat` of Llama 3.0, which has none published for tools: calls are as in 3.1."""

    family: ClassVar[str] = "llama3.0"
    control_names = tuple(map(str, Llama3Mark))
    marks = tuple(Llama3Mark)
    needed = (Llama3Mark.BEGIN, Llama3Mark.START, Llama3Mark.HEADER_END, Llama3Mark.END)

    def own_calls(self) -> CallSyntax:
        return LlamaJson()

    def begin(self) -> list[str]:
        return [Llama3Mark.BEGIN]

    def header(self, role: str) -> list[str]:
        return [Llama3Mark.START, role, Llama3Mark.HEADER_END, "\n\n"]

    def footer(self, role: str) -> list[str]:
        return [Llama3Mark.END]

    def ends(self) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        # <|eom_id|> ends a turn that waits for a result.
        return (Llama3Mark.END, Llama3Mark.MESSAGE_END), (Llama3Mark.EOT,)

    def shown(self, message: Message) -> str:
        return message.content.strip()


class Llama3(Llama30):
    """The `ChatFormat` of Llama 3.1, 3.2 and 3.3."""

    family = "llama3"

    def system_parts(
        self, message: Message | None, tools: Tools, learn: LearnConfig = PLAIN
    ) -> list[WeightedPart]:
        weight = weight_of(message, learn) if message else 0.0
        said = Content(self.shown(message) if message else self.default_system)
        ipython = tools and isinstance(self.calls, LlamaJson)
        dates = f"{ENVIRONMENT if ipython else ''}{DATES}"
        declared = self.declared(tools, "system")
        gap = ["\n\n"] if declared and said else []
        parts = [*unlearned([dates]), (said, weight), *unlearned([*gap, *declared])]
        return self.framed("system", parts, weight)
