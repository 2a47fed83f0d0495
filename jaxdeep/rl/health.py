"""What goes wrong in the text of a policy before its reward falls: numbers for logs and for the guard."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxdeep.chat.families import has_stray_tag
from jaxdeep.types import Trajectory

GRAM = 4
ANSWER_TAG = re.compile(r"</?answer\b")


def health(trajectory: Trajectory) -> dict[str, float]:
    """Shares between 0 and 1 of one rollout: `repetition`, of the runs of 4 sampled tokens that were
    there before in the same turn; of its turns, `malformed`, with a call that cannot be read or with
    a tag left over in the text, and `thoughtless`, without a word of reasoning."""
    turns = [m for m in trajectory.messages if m.role == "assistant"]
    said = [piece.tokens for piece in trajectory.pieces if piece.author == "policy"]
    grams = [
        [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)] for tokens in said
    ]
    distinct, every = sum(len(set(turn)) for turn in grams), sum(map(len, grams))
    return {
        "repetition": 1 - distinct / every if every else 0.0,
        "malformed": _share(
            any(call.error for call in turn.calls) or _has_tag(turn.content + turn.reasoning)
            for turn in turns
        ),
        "thoughtless": _share(not turn.reasoning.strip() for turn in turns),
    }


def _has_tag(text: str) -> bool:
    return has_stray_tag(text) or bool(ANSWER_TAG.search(text))


def _share(found: Iterable[bool]) -> float:
    found = list(found)
    return sum(found) / len(found) if found else 0.0
