"""The doubles say what they were given, to one conversation or to many at once."""

import asyncio

import pytest

from jaxdeep.agent.scripted import EchoTool, ScriptedPolicy
from jaxdeep.types import Message


def ask(policy, prompt, max_new=100):
    return asyncio.run(policy(prompt, seed=0, max_new=max_new))


def test_turns_follow_the_conversation_and_not_the_clock(chat):
    policy = ScriptedPolicy(chat, ["one", "two"])
    first, other = ask(policy, [1]), ask(policy, [2])
    assert first.tokens == other.tokens
    second = ask(policy, [2, *other.tokens, 9])
    assert [chat.parse(c.tokens).content for c in (first, second)] == ["one", "two"]
    assert first.logps == [0.0] * len(first.tokens) and first.stop == "stop"
    with pytest.raises(ValueError, match="2 turns"):
        ask(policy, [2, *other.tokens, 9, *second.tokens, 9])


def test_a_small_budget_cuts_a_turn(chat):
    completion = ask(ScriptedPolicy(chat, ["one"]), [1], max_new=2)
    assert completion.stop == "length" and len(completion.tokens) == 2


def test_text_and_message_can_say_the_same(chat):
    text, message = "<think>\nhm\n</think>\n\nyes", Message("assistant", "yes", reasoning="hm")
    policy = ScriptedPolicy(chat, [text, message])
    assert policy.turns[0] == policy.turns[1]


def test_the_echo_remembers():
    tool = EchoTool()
    assert asyncio.run(tool.echo.call({"text": "a"})).text == "a"
    assert tool.heard == ["a"] and EchoTool().heard == []
