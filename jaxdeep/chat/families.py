"""The chat formats by model family. To add a family: write its `ChatFormat`, and name it here."""

from __future__ import annotations

from jaxdeep.chat.format import ChatFormat, Thinking
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.errors import ConfigError, DataError

FAMILIES = {"qwen3": Qwen3Chat}


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
    """The family most of whose control tokens the tokenizer has; DataError where it has none."""
    # The most rather than all: a model without a block of reasoning may lack the tokens for it, and
    # a missing one that is needed is named when the format is made.
    shares = {
        family: sum(map(tokenizer.has, made.control_names)) / len(made.control_names)
        for family, made in FAMILIES.items()
    }
    best = max(shares, key=shares.__getitem__)
    if not shares[best]:
        raise DataError(f"the tokenizer has no control token of any family: there is {_names()}")
    return best


def control_names(family: str) -> tuple[str, ...]:
    """The control tokens of a family, for who builds a tokenizer."""
    return FAMILIES[family].control_names


def stray_tags(text: str) -> set[str]:
    """The control tokens, or imitations of them, of any family that a message's text has."""
    return {tag[0] for made in FAMILIES.values() for tag in made.stray_tag.finditer(text)}


def _names() -> str:
    return ", ".join(FAMILIES)
