"""Signs in a policy's text that it is decaying, which show before its reward falls: for logs and
for the guard."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxdeep.chat.families import has_stray_tag
from jaxdeep.types import Trajectory

GRAM = 4  # tokens in a run that is looked for again
ANSWER_TAG = re.compile(r"</?answer\b")


def health(trajectory: Trajectory) -> dict[str, float]:
    """Three shares of one rollout, each between 0 and 1.

    repetition    of its runs of 4 sampled tokens, those that were there before in the same turn
    malformed     of its turns, those with a call that cannot be read or with a tag left in the text
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
        "malformed": _share(
            any(call.error for call in turn.calls) or _has_tag(turn.content + turn.reasoning)
            for turn in turns
        ),
        "thoughtless": _share(not turn.reasoning.strip() for turn in turns),
    }


def _has_tag(text: str) -> bool:
    return has_stray_tag(text) or bool(ANSWER_TAG.search(text))


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0
