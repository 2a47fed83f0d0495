"""Signs in a policy's text that it is decaying, which show before its reward falls: for logs and
for the guard."""

from __future__ import annotations

from collections.abc import Iterable

from jaxdeep.chat.families import stray_tags
from jaxdeep.types import Message, Trajectory

GRAM = 4  # tokens in a run that is looked for again


def health(trajectory: Trajectory) -> dict[str, float]:
    """Three shares of one rollout, each between 0 and 1.

    repetition    of its runs of 4 sampled tokens, those that were there before in the same turn
    malformed     of its turns, those that the chat format could not read whole: a call that cannot
                  be read, or one of the format's own control tokens left in the text. What the
                  world spoke of before, in a question or a result, the policy may speak of too
    thoughtless   of its turns, those without reasoning
    """
    turns = [m for m in trajectory.messages if m.role == "assistant"]
    sampled = [piece.tokens for piece in trajectory.pieces if piece.author == "policy"]
    grams = [
        [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)] for tokens in sampled
    ]
    distinct, total = sum(len(set(turn)) for turn in grams), sum(map(len, grams))
    return {
        "repetition": 1 - distinct / total if total else 0.0,
        "malformed": _share(_malformed(trajectory.messages)),
        "thoughtless": _share(not turn.reasoning.strip() for turn in turns),
    }


def _malformed(messages: Iterable[Message]) -> Iterable[bool]:
    """For each turn of the policy whether it is malformed."""
    known: set[str] = set()  # tags that the world has used
    for message in messages:
        if message.role != "assistant":
            known |= stray_tags(message.content)
        else:
            left = stray_tags(message.content) | stray_tags(message.reasoning)
            yield any(call.error for call in message.calls) or not left <= known


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0
