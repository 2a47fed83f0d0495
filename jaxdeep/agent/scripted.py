"""Test doubles for the two sides of the tool loop: a policy that follows a script, a tool that
echoes.

With them the whole host half runs without a model: in tests, in examples, in a dry run of a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from jaxdeep.agent.rollout import SAMPLING
from jaxdeep.agent.tool import tool
from jaxdeep.chat.format import ChatFormat
from jaxdeep.types import Completion, Message, Sampling


class ScriptedPolicy:
    """A policy that says the turns of a script, one per call, every token with log-probability 0.

    A turn is a message, or its text with control tokens and without the one that ends it, which may
    be as broken as a test needs. The prompt tells which turn comes next, so one policy serves many
    conversations at once. `prompts` has the prompts of all calls. ValueError: the script is over.
    """

    def __init__(self, chat: ChatFormat, turns: Sequence[str | Message]) -> None:
        self.turns = [_tokens(chat, turn) for turn in turns]
        self.prompts: list[list[int]] = []
        self._next_turn: dict[tuple[int, ...], int] = {}  # by all tokens of a conversation so far

    async def __call__(
        self, prompt: Sequence[int], *, seed: int, max_new: int, sampling: Sampling = SAMPLING
    ) -> Completion:
        self.prompts.append(list(prompt))
        turn = max(
            (n for told, n in self._next_turn.items() if tuple(prompt[: len(told)]) == told),
            default=0,
        )
        if turn >= len(self.turns):
            raise ValueError(f"the script has {len(self.turns)} turns, and one more was asked for")
        tokens = self.turns[turn][:max_new]
        self._next_turn[(*prompt, *tokens)] = turn + 1
        stop = "stop" if len(tokens) == len(self.turns[turn]) else "length"
        return Completion(tokens, [0.0] * len(tokens), stop)


class EchoTool:
    """Has the tool `echo`, which says a text back; `heard` are all texts it was given, in order."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @tool(inline=True)
    def echo(self, text: Annotated[str, "what to say back"]) -> str:
        """Say a text back."""
        self.heard.append(text)
        return text


def _tokens(chat: ChatFormat, turn: str | Message) -> list[int]:
    if isinstance(turn, str):
        return chat.encode_turn(turn)
    return chat.pieces([turn])[-1].tokens
