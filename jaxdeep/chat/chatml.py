"""ChatML, the format of SmolLM2 and many others: `<|im_start|>ROLE\\n ... <|im_end|>\\n`.

    world    <|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n
    policy   <think>\\n ... \\n</think>\\n\\n ... <tool_call>\\n ... \\n</tool_call><|im_end|>
    world    \\n<|im_start|>user\\n<tool_response>\\n ... \\n</tool_response><|im_end|>\\n
             <|im_start|>assistant\\n

The tags inside turns are control tokens where the tokenizer has them (Qwen), and text elsewhere.
Published templates of this family have no tools, or each their own way; here they are Hermes's.
"""

from __future__ import annotations

from typing import ClassVar

from jaxdeep.chat.base import ThinkMark, TurnChat
from jaxdeep.chat.marks import Mark

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class ChatMlMark(Mark):
    START = "<|im_start|>"
    END = "<|im_end|>"
    EOT = "<|endoftext|>"


class ChatMl(TurnChat):
    """ChatML over any tokenizer with `<|im_start|>` and `<|im_end|>`."""

    family: ClassVar[str] = "chatml"
    control_names = tuple(map(str, ChatMlMark))
    marks = (*ChatMlMark, *ThinkMark)
    needed = (ChatMlMark.START, ChatMlMark.END)
    ways = ("write", "skip", "none")
    after = ("\n",)

    def header(self, role: str) -> list[str]:
        return [ChatMlMark.START, f"{role}\n"]

    def footer(self, role: str) -> list[str]:
        return [ChatMlMark.END, "\n"]

    def ends(self) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        return (ChatMlMark.END,), (ChatMlMark.EOT,)
