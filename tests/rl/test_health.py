"""Signs of decay in a rollout's text."""

import pytest

from jaxdeep.rl.health import health
from jaxdeep.types import Branch, Message, Piece, Task, ToolCall, Trajectory


def of(*turns, tokens=((1, 2, 3, 4, 5, 6),)):
    pieces = [Piece([9] * 50, "world"), *(Piece(list(said), "policy") for said in tokens)]
    return health(
        Trajectory(
            Task("t", "?"), branches=[Branch(pieces)], messages=[Message("user", "?"), *turns]
        )
    )


def test_sound_turns_have_none_of_it():
    call = ToolCall("search", {"query": "x"})
    found = of(
        Message("assistant", reasoning="Let me look.", calls=(call,)),
        Message("tool", "<think> is a tag </tool_call>", name="search"),
        Message("assistant", "It is 3 < 4.", reasoning="So."),
    )
    assert found == dict(repetition=0.0, malformed=0.0, thoughtless=0.0)


def test_repetition_is_counted_within_turns_alone():
    loop = [1, 2, 3, 4] * 5  # 17 runs of four, 4 of them different
    assert of(tokens=(loop,))["repetition"] == pytest.approx(13 / 17)
    assert of(tokens=((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)))["repetition"] == 0
    assert of(tokens=((1, 2),))["repetition"] == 0


def test_broken_calls_stray_tags_and_missing_thoughts_are_shares_of_the_turns():
    turns = (
        Message("assistant", "fine", reasoning="a thought"),
        Message("assistant", calls=(ToolCall("", error="not closed"),), reasoning=" "),
        Message("assistant", "<tool_call>{", reasoning="b"),
        Message("assistant", "x", reasoning="c <think> d"),
    )
    found = of(*turns)
    assert found["malformed"] == 0.75 and found["thoughtless"] == 0.25
    demanded = of(Message("assistant", "So <answer>3</answer>", reasoning="<answer> it is."))
    assert demanded["malformed"] == 0
    spoken_of = (Message("tool", "write <think> first"), Message("assistant", "a <think> b"))
    assert of(*spoken_of)["malformed"] == 0 and of(*reversed(spoken_of))["malformed"] == 1
    assert of()["malformed"] == of()["thoughtless"] == 0
