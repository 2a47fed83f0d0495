"""The chat format of the DeepSeek-R1 distillates of Qwen and Llama.

    world    <｜begin▁of▁sentence｜>SYSTEM<｜User｜> ... <｜Assistant｜><think>\\n
    policy   ... \\n</think>\\n\\n ... <｜end▁of▁sentence｜>
    world    <｜User｜> ...

With thinking "write" the prompt opens the block of reasoning, as the published template does; with
"none" it does not, as earlier ones did. The template drops reasoning from history, which stays
here. It declares no tools, and these tokenizers lack the tokens of its calls: here calls are those
of Hermes. A later system message is a turn of the user.
"""

from __future__ import annotations

from typing import ClassVar

from jaxdeep.chat.base import ThinkMark, TurnChat
from jaxdeep.chat.format import Tools
from jaxdeep.chat.learn import LearnConfig, WeightedPart
from jaxdeep.chat.marks import Mark
from jaxdeep.types import Message


class DeepSeekMark(Mark):
    BEGIN = "<｜begin▁of▁sentence｜>"
    END = "<｜end▁of▁sentence｜>"
    USER = "<｜User｜>"
    ASSISTANT = "<｜Assistant｜>"


class DeepSeekR1(TurnChat):
    """The `ChatFormat` of R1's distillates."""

    family: ClassVar[str] = "deepseek-r1"
    control_names = tuple(map(str, DeepSeekMark))
    marks = (*DeepSeekMark, *ThinkMark)
    needed = tuple(DeepSeekMark)
    ways = ("write", "skip", "none")
    opens_block = True

    def begin(self) -> list[str]:
        return [DeepSeekMark.BEGIN]

    def header(self, role: str) -> list[str]:
        if role == "assistant":
            return [DeepSeekMark.ASSISTANT]
        return [DeepSeekMark.USER]

    def footer(self, role: str) -> list[str]:
        return []

    def ends(self) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        return (DeepSeekMark.END,), (DeepSeekMark.END,)

    def system_parts(
        self, message: Message | None, tools: Tools, learn: LearnConfig
    ) -> list[WeightedPart]:
        """What the system says, which stands alone before the first turn."""
        return self.system_content(message, tools, learn)[0]
