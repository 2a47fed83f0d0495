"""The chat formats of OLMo 2 and OLMo 3.

OLMo 2 has role marks that are text:

    world    <|endoftext|><|user|>\\n ... \\n<|assistant|>\\n
    policy   ... <|endoftext|>
    world    \\n<|user|>\\n ...

OLMo 3 is ChatML with functions, and answers of tools in turns of the environment:

    world    <|im_start|>system\\n ... <functions>[...]</functions><|im_end|>\\n
    policy   ... <function_calls>name(key="value")</function_calls><|im_end|>
    world    \\n<|im_start|>environment\\n ... <|im_end|>\\n

The templates of OLMo 3 end the last turn of all with `<|endoftext|>`, which the next turn replaces;
here each ends with `<|im_end|>`, and both stop a policy. OLMo 2 has no tools: here they are
Hermes's.
"""

from __future__ import annotations

from typing import ClassVar

from jaxdeep.chat.base import ThinkMark, TurnChat, unlearned, weight_of
from jaxdeep.chat.calls import CallSyntax, Content, Functions
from jaxdeep.chat.chatml import ChatMl, ChatMlMark
from jaxdeep.chat.format import Tools
from jaxdeep.chat.learn import LearnConfig, WeightedPart
from jaxdeep.chat.marks import Mark, split
from jaxdeep.types import Message

OLMO3_SYSTEM = "You are a helpful function-calling AI assistant. "
OLMO31_SYSTEM = (
    "You are Olmo, a helpful AI assistant built by Ai2. Your date cutoff is December 2024, and "
    "your model weights are available at https://huggingface.co/allenai. "
)
THINK_SYSTEM = (
    "You are OLMo, a helpful function-calling AI assistant built by Ai2. Your date cutoff is "
    "November 2024, and your model weights are available at https://huggingface.co/allenai."
)
# Published tokenizers read the tags in these texts as control tokens, and so they are marks.
_TAGS = {str(mark): mark for mark in Functions.marks}
NO_FUNCTIONS = split(
    "You do not currently have access to any functions. <functions></functions>", _TAGS
)
HOW_TO_CALL = split(
    "You are provided with function signatures within <functions></functions> XML tags. You may "
    "call one or more functions to assist with the user query. Output any function calls within "
    "<function_calls></function_calls> XML tags. Do not make assumptions about what values to plug "
    "into functions.",
    _TAGS,
)


class Olmo2Mark(Mark):
    EOT = "<|endoftext|>"
    SYSTEM = "<|system|>"
    USER = "<|user|>"
    ASSISTANT = "<|assistant|>"


class Olmo2(TurnChat):
    """OLMo 2's `ChatFormat`."""

    family: ClassVar[str] = "olmo2"
    control_names = (str(Olmo2Mark.EOT),)
    marks = tuple(Olmo2Mark)
    needed = (Olmo2Mark.EOT,)
    after = ("\n",)

    def begin(self) -> list[str]:
        return [Olmo2Mark.EOT]

    def header(self, role: str) -> list[str]:
        mark = {"system": Olmo2Mark.SYSTEM, "assistant": Olmo2Mark.ASSISTANT}
        return [mark.get(role, Olmo2Mark.USER), "\n"]

    def footer(self, role: str) -> list[str]:
        return ["", "\n"]

    def ends(self) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        return (Olmo2Mark.EOT,), (Olmo2Mark.EOT,)


class Olmo3(ChatMl):
    """The `ChatFormat` of OLMo 3's instruct models."""

    family = "olmo3"
    control_names = (*map(str, ChatMlMark), *map(str, Functions.marks))
    ways = ("none",)

    def own_calls(self) -> CallSyntax:
        return Functions()

    def system_parts(
        self, message: Message | None, tools: Tools, learn: LearnConfig
    ) -> list[WeightedPart]:
        weight = weight_of(message, learn) if message else 0.0
        declared = self.declared(tools, "system")
        if message:
            parts = [(Content(self.shown(message)), weight), *unlearned(declared)]
        elif declared:
            parts = unlearned([self.default_system, *HOW_TO_CALL, *declared])
        else:
            parts = unlearned([self.default_system, *NO_FUNCTIONS])
        return self.framed("system", parts, weight)


class Olmo3Think(Olmo3):
    """The `ChatFormat` of OLMo 3's thinking models. Their prompt opens the block of reasoning."""

    family = "olmo3-think"
    ways = ("write", "skip", "none")
    marks = (*ChatMlMark, *ThinkMark)
    opens_block = True
    block_begin = ""

    def system_parts(
        self, message: Message | None, tools: Tools, learn: LearnConfig
    ) -> list[WeightedPart]:
        weight = weight_of(message, learn) if message else 0.0
        text = self.shown(message) if message else self.default_system
        declared = self.declared(tools, "system")
        told = [" ", *declared] if declared else [" ", *NO_FUNCTIONS]
        return self.framed("system", [(Content(text), weight), *unlearned(told)], weight)
