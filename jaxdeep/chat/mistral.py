"""The chat formats of Mistral's third tokenizer: `[INST] ... [/INST]`, and marks for tools.

    world    <s>[AVAILABLE_TOOLS] [...][/AVAILABLE_TOOLS][INST] SYSTEM\\n\\n ... [/INST]
    policy   [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": "..."}]</s>
    world    [TOOL_RESULTS] {"content": ..., "call_id": "..."}[/TOOL_RESULTS]
    policy    ...</s>

`MistralV3` is that of SentencePiece (7B v0.3), with a space after marks; `MistralTekken` (Nemo) has
none. The templates put the tools and the system message into the last question, so that a prompt
changes with every turn; here they are in the first, and a prompt only grows. They drop a text
before calls, which stays here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxdeep.chat.base import TurnChat, unlearned, weight_of
from jaxdeep.chat.calls import CallSyntax, Content, MistralList
from jaxdeep.chat.format import Tools
from jaxdeep.chat.learn import LearnConfig, WeightedPart
from jaxdeep.chat.marks import Mark
from jaxdeep.types import Message


class MistralChatMark(Mark):
    BEGIN = "<s>"
    END = "</s>"
    USER = "[INST]"
    UNUSER = "[/INST]"


class MistralV3(TurnChat):
    """The `ChatFormat` of Mistral's v3 SentencePiece tokenizer."""

    family: ClassVar[str] = "mistral"
    control_names = (*map(str, MistralChatMark), *map(str, MistralList.marks))
    marks = needed = tuple(MistralChatMark)
    space: ClassVar[str] = " "
    lead = " "

    def own_calls(self) -> CallSyntax:
        return MistralList(self.space)

    def begin(self) -> list[str]:
        return [MistralChatMark.BEGIN]

    def header(self, role: str) -> list[str]:
        return [] if role == "assistant" else [MistralChatMark.USER, self.space]

    def footer(self, role: str) -> list[str]:
        return [MistralChatMark.UNUSER]

    def ends(self) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        return (MistralChatMark.END,), (MistralChatMark.END,)

    def shown(self, message: Message) -> str:
        return message.content.strip() if message.role == "assistant" else message.content

    def head(
        self, messages: Sequence[Message], tools: Tools, learn: LearnConfig
    ) -> tuple[list[WeightedPart], Sequence[Message]]:
        """The system message and the tools go into the first question, or into a turn of their own
        where there is none."""
        system = None
        if messages and messages[0].role == "system":
            system, *messages = messages
        parts = unlearned(self.begin())
        if not messages:
            return parts, messages
        said, _ = self.system_content(system, tools, learn)
        parts += unlearned(self.declared(tools, "user"))
        if messages[0].role == "user":
            user, *messages = messages
            weight = weight_of(user, learn)
            said += [*unlearned(["\n\n"] if said else []), (Content(user.content), weight)]
        return [*parts, *(self.framed("user", said, weight) if said else [])], messages


class MistralTekken(MistralV3):
    """The `ChatFormat` of Mistral's v3 Tekken tokenizer, as in Nemo."""

    family = "mistral-tekken"
    space = ""
    lead = ""

    def shown(self, message: Message) -> str:
        return message.content
