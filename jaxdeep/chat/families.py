"""The chat formats by model family. To add a family: write its `ChatFormat`, and name it here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from jaxdeep.chat.calls import FunctionsMark, LlamaMark, MistralMark
from jaxdeep.chat.chatml import SMOLLM2_SYSTEM, ChatMl, ChatMlMark
from jaxdeep.chat.deepseek import DeepSeekMark, DeepSeekR1
from jaxdeep.chat.format import ChatFormat, Thinking
from jaxdeep.chat.llama3 import Llama3, Llama3Mark, Llama30
from jaxdeep.chat.marks import any_of
from jaxdeep.chat.mistral import MistralChatMark, MistralTekken, MistralV3
from jaxdeep.chat.olmo import (
    OLMO3_SYSTEM,
    OLMO31_SYSTEM,
    THINK_SYSTEM,
    Olmo2,
    Olmo2Mark,
    Olmo3,
    Olmo3Think,
)
from jaxdeep.chat.qwen3 import QWEN25_SYSTEM, Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.errors import ConfigError, DataError

FAMILIES: dict[str, Callable[..., ChatFormat]] = {
    "qwen3": Qwen3Chat,
    "qwen2.5": functools.partial(Qwen3Chat, default_system=QWEN25_SYSTEM),
    "chatml": ChatMl,
    "chatml-unguarded": functools.partial(ChatMl, guarded=False),
    "smollm2": functools.partial(ChatMl, default_system=SMOLLM2_SYSTEM),
    "llama3": Llama3,
    "llama3.0": Llama30,
    "mistral": MistralV3,
    "mistral-tekken": MistralTekken,
    "deepseek-r1": DeepSeekR1,
    "olmo2": Olmo2,
    "olmo3": functools.partial(Olmo3, default_system=OLMO3_SYSTEM),
    "olmo3.1": functools.partial(Olmo3, default_system=OLMO31_SYSTEM),
    "olmo3-think": functools.partial(Olmo3Think, default_system=THINK_SYSTEM),
}


_LITERAL = (*Llama3Mark, *LlamaMark, *MistralMark, *DeepSeekMark, *Olmo2Mark, "[INST]", "[/INST]")
STRAY_TAG = re.compile(
    r"<[/|]?(?:think|tool_call|tool_response|function_calls|im_start|im_end)\b|"
    + any_of(map(str, _LITERAL)).pattern
)
"""A mark, or what a model takes for one, as it may be left over in the text of a message."""


def chat_format(
    family: str,
    tokenizer: Tokenizer,
    thinking: Thinking = "write",
    *,
    tools_in_prompt: bool = True,
) -> ChatFormat:
    """The format of a family over a tokenizer. `tools_in_prompt=False` leaves the schemas of tools
    out of the prompt, for a policy that was taught its tools.

    ConfigError: no such family or way of thinking. DataError: the tokenizer lacks a control token.
    """
    if family not in FAMILIES:
        raise ConfigError(f"no chat format of the family {family!r}: there is {_names()}")
    return FAMILIES[family](tokenizer, thinking, tools_in_prompt=tools_in_prompt)


def family_of(tokenizer: Tokenizer) -> str:
    """The family that a tokenizer is of: by its control tokens, and by its chat template where they
    leave several. DataError where that leaves none, or several."""
    has, template = tokenizer.has, tokenizer.template
    if has(DeepSeekMark.USER) and has(DeepSeekMark.ASSISTANT):
        return "deepseek-r1"
    if has(Llama3Mark.START):
        return "llama3.0" if template and "Today Date" not in template else "llama3"
    if has(MistralChatMark.USER):
        return "mistral-tekken" if tokenizer.byte_level else "mistral"
    if has(ChatMlMark.START):
        return _chatml_family(tokenizer)
    if has(Olmo2Mark.EOT) and Olmo2Mark.USER in template and Olmo2Mark.ASSISTANT in template:
        return "olmo2"
    raise DataError(
        f"the tokenizer has no control token of any family: there is {_names()}. Set model.chat"
    )


def _chatml_family(tokenizer: Tokenizer) -> str:
    """That of a tokenizer with `<|im_start|>`, which many have."""
    has, template = tokenizer.has, tokenizer.template
    if has(Mark.CALL):
        # A model without a block of reasoning may lack the tokens for it.
        return "qwen2.5" if QWEN25_SYSTEM in template else "qwen3"
    if has(FunctionsMark.CALL):
        if "<think>" in template:
            return "olmo3-think"
        return "olmo3.1" if "You are Olmo," in template else "olmo3"
    if Olmo2Mark.USER in template and ChatMlMark.START not in template:
        return "olmo2"
    if SMOLLM2_SYSTEM in template:
        return "smollm2"
    if not template and has("<|endofprompt|>"):  # OLMo's, from a time before it chatted
        raise DataError(
            "the tokenizer may be one of olmo2 or chatml, and has no chat template beside it that "
            "says which: set model.chat"
        )
    return "chatml"


def control_names(family: str) -> tuple[str, ...]:
    """The control tokens of a family, for who builds a tokenizer."""
    return _made(family).control_names


def stray_tags(text: str) -> set[str]:
    """The control tokens, or imitations of them, of any family that a message's text has."""
    return {tag[0] for tag in STRAY_TAG.finditer(text)}


def _made(family: str) -> type[ChatFormat]:
    made = FAMILIES[family]
    return made.func if isinstance(made, functools.partial) else made


def _names() -> str:
    return ", ".join(FAMILIES)
