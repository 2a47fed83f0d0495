"""Doubles for the two sides of the tool loop: a policy that reads from a script, a tool that echoes.

With them the whole host half runs without a model: in tests, in examples, in a dry run of a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from jaxdeep.agent.rollout import SAMPLING
from jaxdeep.agent.tool import tool
from jaxdeep.chat.qwen3 import Chat, Mark
from jaxdeep.types import Completion, Message, Sampling


class ScriptedPolicy:
    """Says the turns of a script, one a call, each with log-probability 0 for all its tokens.

    A turn is a message, or the text of one with its control tokens (`<think>`, `<tool_call>`), which
    may then be as broken as a test needs; `<|im_end|>` is added to it. Which turn comes next is told
    by the prompt, so one policy serves many conversations at once. `prompts` keeps what it was asked.
    """

    def __init__(self, chat: Chat, turns: Sequence[str | Message]) -> None:
        self.turns = [_tokens(chat, turn) for turn in turns]
        self.prompts: list[list[int]] = []
        self._next: dict[tuple[int, ...], int] = {}  # the conversations so far

    async def __call__(
        self, prompt: Sequence[int], *, seed: int, max_new: int, sampling: Sampling = SAMPLING
    ) -> Completion:
        self.prompts.append(list(prompt))
        held = (n for said, n in self._next.items() if tuple(prompt[: len(said)]) == said)
        turn = max(held, default=0)
        if turn >= len(self.turns):
            raise ValueError(f"the script has {len(self.turns)} turns, and one more was asked for")
        tokens = self.turns[turn][:max_new]
        self._next[(*prompt, *tokens)] = turn + 1
        stop = "stop" if len(tokens) == len(self.turns[turn]) else "length"
        return Completion(tokens, [0.0] * len(tokens), stop)


class EchoTool:
    """Holds the tool `echo`, which says a text back, and everything it `heard`."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @tool(inline=True)
    def echo(self, text: Annotated[str, "what to say back"]) -> str:
        """Say a text back."""
        self.heard.append(text)
        return text


def _tokens(chat: Chat, turn: str | Message) -> list[int]:
    if isinstance(turn, str):
        return chat.tokenizer.encode_control(f"{turn}{Mark.END}")
    return chat.pieces([turn])[-1].tokens
