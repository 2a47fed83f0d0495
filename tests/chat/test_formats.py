"""Rows of data as different projects write them: the same thing under any name says the same, and
what cannot be followed is refused by name."""

import json
import re

import numpy as np
import pytest

from jaxdeep.chat.formats import read, unread_keys
from jaxdeep.chat.learn import LearnConfig
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import DataError
from jaxdeep.types import Message, ToolCall

Q = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "content": "4"}
THOUGHT = "Two and two."
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
OSLO = (ToolCall("weather", {"city": "Oslo"}),)
TOOL = {"name": "find", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(ASSETS / "tiny")


def last(*messages, **row):
    """The last message of a row."""
    return read({"messages": list(messages), **row})[0][-1]


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    "reasoning",
    [
        {"reasoning_content": THOUGHT},
        {"reasoning": THOUGHT},
        {"thinking": THOUGHT},
        {"reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]},
        {"reasoning_details": json.dumps([{"type": "reasoning.summary", "summary": THOUGHT}])},
        {"reasoning": THOUGHT, "reasoning_content": THOUGHT, "thinking": None},
        {"content": f"<think>\n{THOUGHT}\n</think>\n\n4", "reasoning": THOUGHT},
    ],
    ids=str,
)
def test_reasoning_has_one_meaning_under_any_name(reasoning):
    assert last(Q, FOUR | reasoning) == Message("assistant", "4", THOUGHT)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("talk", ["messages", "conversations"])
def test_a_column_with_the_system_prompt_opens_the_conversation(key, talk):
    turns = {
        "messages": [Q, FOUR],
        "conversations": [
            {"from": "human", "value": "What is 2+2?"},
            {"from": "gpt", "value": "4"},
        ],
    }[talk]
    want = [Message("system", "Hm."), Message("user", "What is 2+2?"), Message("assistant", "4")]
    assert read({talk: turns, key: "Hm."})[0] == want
    if talk == "messages":  # said twice alike, and under its new name
        twice = [{"role": "developer", "content": "Hm."}, *turns]
        assert read({talk: twice, key: "Hm."})[0] == want


@pytest.mark.parametrize("key", ["tools", "tool_defs", "functions"])
def test_tools_have_one_meaning_under_any_name(key):
    want = [{"type": "function", "function": TOOL}]
    for value in ([TOOL], want, json.dumps([TOOL])):
        assert read({"messages": [Q, FOUR], key: value})[1] == want


@pytest.mark.parametrize(
    "calls",
    [
        {"function_call": CALL},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([{"type": "function", "function": CALL}])},
        {"tool_calls": {"id": ["1"], "type": ["function"], "function": [CALL]}},
        {"tool_calls": [{"function": CALL | {"arguments": {"city": "Oslo", "unit": None}}}]},
        {"tool_calls": [{"function": CALL}], "function_call": None, "content": None},
    ],
    ids=str,
)
def test_calls_have_one_meaning_in_any_form(calls):
    turns = [Q, {**assistant(), **calls}, {"role": "function", "content": "3 C"}]
    messages, _ = read({"messages": turns})
    assert messages[1].calls == OSLO and messages[2] == Message("tool", "3 C", name="weather")


@pytest.mark.parametrize(
    "none", [{"arguments": ""}, {"arguments": None}, {}, {"arguments": "null"}]
)
@pytest.mark.parametrize("calls", ["[]", [], None])
def test_no_arguments_and_no_calls(none, calls):
    call = {"type": "function", "function": {"name": "now"} | none}
    assert last(Q, assistant(tool_calls=[call])).calls == (ToolCall("now"),)
    assert last(Q, assistant("4", tool_calls=calls)) == Message("assistant", "4")


@pytest.mark.parametrize(
    "mark, weight",
    [
        *(({key: flag}, float(flag)) for key in ("train", "loss") for flag in (True, False)),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 0, "trainable": False}, 0.0),
        ({"loss_scale": 2}, 2.0),
        ({"train": None}, 1.0),
    ],
    ids=str,
)
def test_turns_that_are_not_to_be_learned(mark, weight):
    assert last(Q, FOUR | mark).weight == weight
    gpt = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "4", **mark}]
    assert read({"conversations": gpt})[0][-1].weight == weight


@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("Qwen3 opens with <think> first.", "", None),
        ("Put it between <think> and </think> tags.", "", None),
        ("<think>\nEasy.\n</think>\n\nIt is spelled <think>.", "Easy.", "It is spelled <think>."),
        ("<think>\nEasy.\n</think>\n\nThen </think>.", "Easy.", "Then </think>."),
        ("Easy.\n</think>\n\nYes", "Easy.", "Yes"),
    ],
)
def test_a_think_block_is_what_a_turn_begins_with(tokenizer, text, reasoning, content):
    message = last(Q, assistant(text))
    assert message == Message("assistant", text if content is None else content, reasoning)
    for thinking in ("write", "none"):
        chat = Qwen3Chat(tokenizer, thinking)
        assert message.content in tokenizer.decode(chat.pieces([message])[-1].tokens)
        # as in a text that holds the output of a tool
        said = f"{text}<tool_output>x</tool_output>{text}"
        row = {"messages": [Q, assistant(said)]}
        pieces = chat.pieces(read(row, LearnConfig())[0], (), LearnConfig())
        first, _, second, *_ = [tokenizer.decode(piece.tokens) for piece in pieces[1:]]
        for part in (first, second):
            assert part.removesuffix("<|im_end|>").endswith(message.content)
        ids = [id for piece in pieces for id in piece.tokens]
        thoughts = ids.count(tokenizer.id("<think>"))
        if reasoning and text.startswith("<think>"):
            assert thoughts == (2 if thinking == "write" else 0)
        elif not reasoning:
            assert thoughts == (thinking == "write")  # the empty block that opens the turn


@pytest.mark.parametrize(
    "row, says",
    [
        ({"messages": [Q, FOUR], "images": ["a.png"]}, "'images' of a row"),
        ({"messages": [Q, FOUR | {"refusal": "No."}]}, "message 1: 'refusal'"),
        ({"messages": [Q, FOUR | {"channel": "analysis"}]}, "'channel'"),
        ({"messages": [Q | {"tool_calls": [CALL]}, FOUR]}, "only an assistant's message"),
        ({"messages": [Q | {"reasoning": "hm"}, FOUR]}, "only an assistant's message"),
        ({"messages": [Q | {"train": True}, FOUR]}, "data.learn.roles"),
        ({"messages": [Q, FOUR | {"train": False, "weight": 1}]}, "do not agree"),
        ({"messages": [Q, FOUR | {"train": "no"}]}, "true or false"),
        ({"messages": [Q, FOUR | {"reasoning": "a", "thinking": "b"}]}, "do not agree"),
        ({"messages": [Q, assistant("<think>b</think>4", reasoning="a")]}, "do not agree"),
        ({"messages": [Q, FOUR], "tools": [TOOL], "functions": [{"name": "g"}]}, "do not agree"),
        ({"messages": [{"role": "system", "content": "a"}, Q, FOUR], "system": "b"}, "'system'"),
        ({"messages": [Q, FOUR], "system": ["a"]}, "system is not text"),
        ({"messages": [Q, assistant(tool_calls="[")]}, "tool_calls is not JSON"),
        ({"messages": [Q, assistant(tool_calls=[{"name": "f", "parameters": {}}])]}, "parameters"),
        ({"messages": [Q, assistant([{"type": "reasoning", "text": "hm"}])]}, "text parts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_followed_is_refused_by_name(row, says):
    with pytest.raises(DataError, match=re.escape(says)):
        read(row)


@pytest.mark.parametrize("arguments", ['{"x": NaN}', {"x": float("nan")}, {"x": np.float32("inf")}])
def test_a_call_that_no_rollout_could_make_is_not_taught(tokenizer, arguments):
    call = {"function": {"name": "plot", "arguments": arguments}}
    messages, _ = read({"messages": [Q, assistant(tool_calls=[call])]})
    with pytest.raises(DataError, match=r"NaN|nan|inf|Infinity"):
        Qwen3Chat(tokenizer, "none").pieces(messages)


def test_numpy_values_are_numbers(tokenizer):
    chat = Qwen3Chat(tokenizer, "none")
    turns = [
        chat.pieces([Message("assistant", calls=(ToolCall("f", {"k": k, "l": l}),))])
        for k, l in ((np.int64(3), np.arange(2)), (3, [0, 1]))
    ]
    assert turns[0] == turns[1]


def test_a_name_that_breaks_the_json_is_refused(tokenizer):
    with pytest.raises(DataError, match="not valid JSON"):
        Qwen3Chat(tokenizer, "none").pieces([Message("assistant", calls=(ToolCall('a"b'),))])


def test_keys_that_are_passed_over_are_known():
    row = {"messages": [Q | {"id": 1}, FOUR | {"id": 2, "train": True}], "source": "x", "url": None}
    assert unread_keys(row) == {"source", "messages.id"}
    assert unread_keys({"conversations": json.dumps([{"from": "human", "value": "?"}])}) == set()
