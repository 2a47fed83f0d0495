"""What is learned of a conversation: by role, turn and span, to the token, and never other
tokens."""

import itertools
import json

import pytest
from chat import bytewise

from jaxdeep.chat.formats import messages_from_openai, read
from jaxdeep.chat.learn import PLAIN, LearnConfig
from jaxdeep.chat.qwen3 import Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.data import sources
from jaxdeep.data.mix import fit_row
from jaxdeep.data.pack import to_row
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Message, ToolCall

TALK = [
    Message("system", "Be brief."),
    Message("user", "Where is Zürich?"),
    Message("assistant", "<answer>Hm</answer> wait", "Let me see.", (ToolCall("f", {"a": 1}),)),
    Message("tool", "first", name="f"),
    Message("tool", "second", name="f"),
    Message("assistant", "Here. <answer>CH</answer>\nBye.", "Yes."),
]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(bytewise.tokenizer())


@pytest.fixture(scope="module")
def qwen(shared):
    return Qwen3Chat(Tokenizer.load(shared("qwen3/tokenizer.json")))


def texts(chat, pieces):
    """What is learned, as (text, weight) of neighbouring tokens of one weight."""
    row = to_row(pieces)
    pairs = zip(row.tokens.tolist(), row.learn.tolist(), strict=True)
    return [
        (chat.tokenizer.decode([id for id, _ in run]), weight)
        for weight, run in itertools.groupby(pairs, key=lambda pair: pair[1])
        if weight
    ]


def all_text(chat, pieces):
    return chat.tokenizer.decode([id for piece in pieces for id in piece.tokens])


LEARNS = {
    "default": LearnConfig(),
    "all roles": LearnConfig(("system", "user", "assistant", "tool")),
    "spans": LearnConfig(spans={"think": 0.0, "tool_call": 2.0, "answer": 0.5}),
    "nothing the assistant says": LearnConfig(("user",)),
}


@pytest.mark.parametrize("name", LEARNS)
def test_weights_never_change_the_tokens(name, chat, qwen):
    for each in (chat, qwen):
        plain = each.pieces(TALK, [TOOL])
        found = each.pieces(TALK, [TOOL], LEARNS[name])
        assert [(p.tokens, p.author) for p in found] == [(p.tokens, p.author) for p in plain]
        assert all(p.weights is None for p in plain)
        assert all(p.weights is None or len(p.weights) == len(p.tokens) for p in found)


def test_the_assistant_alone_is_learned_with_its_stops(chat):
    first = (
        "<think>\nLet me see.\n</think>\n\n<answer>Hm</answer> wait\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    second = "<think>\nYes.\n</think>\n\nHere. <answer>CH</answer>\nBye.<|im_end|>"
    assert texts(chat, chat.pieces(TALK, [TOOL])) == [(first, 1.0), (second, 1.0)]


def test_roles_of_the_world_are_learned_without_their_headers(chat):
    learn = LearnConfig(("system", "user", "tool"))
    assert texts(chat, chat.pieces(TALK, (), learn)) == [
        ("Be brief.<|im_end|>", 1.0),
        ("Where is Zürich?<|im_end|>", 1.0),
        ("first\n</tool_response>", 1.0),
        ("second\n</tool_response>", 1.0),
    ]
    shown = [said for said, _ in texts(chat, chat.pieces(TALK, [TOOL], learn))]
    assert shown[0] == "Be brief." and "Tools" not in "".join(shown)


def test_spans_multiply_the_weight_from_tag_to_tag(chat):
    learn = LearnConfig(spans={"think": 0.0, "tool_call": 2.0, "answer": 0.5})
    assert texts(chat, chat.pieces(TALK, (), learn)) == [
        ("\n\n", 1.0),
        ("<answer>Hm</answer>", 0.5),
        (" wait\n", 1.0),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', 2.0),
        ("<|im_end|>", 1.0),
        ("\n\nHere. ", 1.0),
        ("<answer>CH</answer>", 0.5),
        ("\nBye.<|im_end|>", 1.0),
    ]


def test_spans_can_be_nested_and_one_that_is_not_closed_is_none(chat):
    talk = [Message("user", "q"), Message("assistant", "a<b x='1'>b<c>c</c></b><c>d")]
    found = texts(chat, chat.pieces(talk, (), LearnConfig(spans={"b": 2.0, "c": 0.25})))
    assert found == [
        ("<think>\n\n</think>\n\na", 1.0),
        ("<b x='1'>b", 2.0),
        ("<c>c</c>", 0.5),
        ("</b>", 2.0),
        ("<c>d<|im_end|>", 1.0),
    ]


def test_a_token_across_a_tag_counts_as_the_character_it_starts_with(qwen):
    talk = [Message("user", "q"), Message("assistant", "Ünï <answer>41</answer>.\nEnd")]
    pieces = qwen.pieces(talk, (), LearnConfig(spans={"answer": 0.0}))
    said = "".join(text for text, _ in texts(qwen, pieces))
    assert said.startswith("<think>") and "Ünï" in said and "41" not in said
    assert said.endswith("End<|im_end|>")


def test_the_weight_of_a_turn(chat):
    rows = [
        {"role": "user", "content": "a", "weight": 3},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0.5},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f", "weight": None},
    ]
    chat = Qwen3Chat(chat.tokenizer, "none")
    assert texts(chat, chat.pieces(*read({"messages": rows}))) == [
        ("d<|im_end|>", 0.5),
        ("f<|im_end|>", 1.0),
    ]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.25}]
    assert texts(chat, chat.pieces(*read({"conversations": turns}))) == [("b<|im_end|>", 0.25)]
    for bad in (-1, "1", float("nan"), float("inf"), [1]):
        rows[1]["weight"] = bad
        with pytest.raises(DataError, match="message 1: the weight of a message"):
            messages_from_openai(rows)


# a tool's output inside the assistant's text

CALL_1 = '<think>I should look.</think><call_tool name="google_search" gl="us">Zürich</call_tool>'
OUT_1 = (
    "<tool_output><snippet id=a1-0>\nTitle: <think>no</think><|im_end|>\n</snippet></tool_output>"
)
CALL_2 = "\n<think>More.</think>\n<call_tool name='browse_webpage'>http://x</call_tool>\n"
OUT_2 = '<tool_output id="2">page</tool_output>'
ANSWER = '<think>Done.</think><answer><cite id="a1-0">In CH</cite></answer>'
TRACE = CALL_1 + OUT_1 + CALL_2 + OUT_2 + ANSWER
ROW = {
    "conversations": [
        {"from": "system", "value": "Use <tool_output> well."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": TRACE},
        {"from": "human", "value": "Thanks"},
        {"from": "gpt", "value": "<think>Ok.</think>Bye"},
    ]
}


def pieces_of(chat, row, learn=None):
    learn = learn or LearnConfig()
    return chat.pieces(*read(row, learn), learn)


def test_what_stands_in_tool_output_is_the_worlds(chat):
    pieces = pieces_of(chat, ROW)
    said = [(all_text(chat, [p]), p.author) for p in pieces[1:6]]
    assert said == [
        (CALL_1, "policy"),
        (OUT_1, "world"),
        (CALL_2, "policy"),
        (OUT_2, "world"),
        (ANSWER + "<|im_end|>", "policy"),
    ]
    assert (
        all_text(chat, pieces[6:7])
        == "\n<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all_text(chat, pieces[7:]) == "<think>\nOk.\n</think>\n\nBye<|im_end|>"
    same = {
        "messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": TRACE}]
    }
    assert pieces_of(chat, same)[1:5] == pieces[1:5]


def test_the_tags_of_the_policy_are_control_tokens_and_those_of_the_world_are_text(chat):
    _, call, out, *_ = pieces_of(chat, ROW)
    think, unthink, end = (chat.tokenizer.id(mark) for mark in (Mark.THINK, Mark.UNTHINK, Mark.END))
    assert call.tokens[0] == think and call.tokens.count(unthink) == 1
    assert not {think, unthink, end} & set(out.tokens)


def test_without_reasoning_the_trace_loses_its_think_blocks(chat):
    plain = Qwen3Chat(chat.tokenizer, "none")
    learned = [text for text, _ in texts(plain, pieces_of(plain, ROW))]
    assert learned == [
        '<call_tool name="google_search" gl="us">Zürich</call_tool>',
        "\n<call_tool name='browse_webpage'>http://x</call_tool>\n",
        '<answer><cite id="a1-0">In CH</cite></answer><|im_end|>',
        "Bye<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("text", "learned"),
    [
        (CALL_1 + OUT_1, [CALL_1]),  # the trace was cut: no end is learned after the world's words
        (CALL_1 + OUT_1 + "\n", [CALL_1]),
        (CALL_1 + "<tool_output>torn", [CALL_1]),
        (CALL_1 + OUT_1 + "\n" + OUT_2 + ANSWER, [CALL_1, ANSWER + "<|im_end|>"]),
        (OUT_1 + "so", ["so<|im_end|>"]),
        (CALL_1 + "<tool_response>r</tool_response>x", [CALL_1, "x<|im_end|>"]),
        # what the world says may hold the tags
        (CALL_1 + "<tool_output>a </tool_output> b</tool_output>x", [CALL_1, "x<|im_end|>"]),
        (CALL_1 + "<tool_output>a <tool_output>b</tool_output>x", [CALL_1, "x<|im_end|>"]),
        (CALL_1 + f"<tool_output>{OUT_2} c</tool_output>x", [CALL_1, "x<|im_end|>"]),
        (
            f"{OUT_2}x<tool_response>a </tool_output> b</tool_response>y",
            ["x", "y<|im_end|>"],
        ),
        ("a <tool_outputs>b", ["<think>\n\n</think>\n\na <tool_outputs>b<|im_end|>"]),
    ],
)
def test_the_ends_of_spans(chat, text, learned):
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]}
    assert [said for said, _ in texts(chat, pieces_of(chat, row))] == learned


def test_spans_and_weights_hold_in_a_trace_too(chat):
    learn = LearnConfig(spans={"think": 0.0, "call_tool": 3.0}, world=("tool_output",))
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": TRACE, "weight": 2},
        ]
    }
    assert texts(chat, pieces_of(chat, row, learn)) == [
        ('<call_tool name="google_search" gl="us">Zürich</call_tool>', 6.0),
        ("\n", 2.0),
        ("\n", 2.0),
        ("<call_tool name='browse_webpage'>http://x</call_tool>", 6.0),
        ("\n", 2.0),
        ('<answer><cite id="a1-0">In CH</cite></answer><|im_end|>', 2.0),
    ]


def test_the_worlds_words_are_learned_only_where_nobody_names_them(chat):
    pieces = pieces_of(chat, ROW, PLAIN)
    assert "Title" in "".join(text for text, _ in texts(chat, pieces))
    other = LearnConfig(world=("information",))
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a<information>b</information>c"},
        ]
    }
    learned = [text for text, _ in texts(chat, pieces_of(chat, row, other))]
    assert learned == ["<think>\n\n</think>\n\na", "c<|im_end|>"]


def test_a_trace_with_calls_beside_it_is_refused(chat):
    row = {"role": "assistant", "content": TRACE, "reasoning_content": "r"}
    with pytest.raises(DataError, match="message 1: a text with the world's words"):
        read({"messages": [{"role": "user", "content": "q"}, row]}, LearnConfig())


# other layouts


def test_inline_tags_in_sharegpt_and_results_in_tool_turns(chat):
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": f"<think>\nr\n</think>\n{call}"},
        {"from": "tool", "value": "<tool_response>\n1\n</tool_response>"},
        {"from": "gpt", "value": "done"},
    ]
    messages, _ = read({"conversations": turns})
    assert messages == [
        Message("user", "q"),
        Message("assistant", "", "r", (ToolCall("f", {"a": 1}),)),
        Message("tool", "1", name="f"),
        Message("assistant", "done"),
    ]


def test_lists_as_text_and_as_columns(chat):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    want = read({"messages": turns, "tools": [TOOL]})
    assert read({"messages": json.dumps(turns), "tools": json.dumps([TOOL])}) == want
    assert read({"messages": columns, "tools": [TOOL]}) == want
    with pytest.raises(DataError, match="differ in length"):
        read({"messages": {"role": ["user"], "content": []}})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(spans={"think": -1.0}), r"LearnConfig\.spans\.think=-1"),
        (dict(spans={"<think>": 1.0}), "not the name of a tag"),
        (dict(spans={"tool_output": 1.0}), "never learned"),
        (dict(world=("a b",)), "not the name of a tag"),
        (dict(roles=()), "roles is empty"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        LearnConfig(**settings)


def test_a_row_of_weights_is_a_row_of_its_gradient(chat):
    pieces = chat.pieces(TALK, (), LearnConfig(spans={"answer": 0.5}))
    row = to_row(pieces, advantage=-2.0)
    assert (row.advantage == row.learn * -2).all() and set(row.learn.tolist()) == {0.0, 0.5, 1.0}
    short = pieces[1]._replace(weights=[1.0])
    with pytest.raises(ValueError, match="carries 1 weights"):
        to_row([pieces[0], short])


# real traces


def test_real_traces_by_span_and_cut_at_a_turn(qwen, shared):
    rows = sources.files(shared("traces/webdancer.jsonl"))
    learn = LearnConfig(spans={"think": 0.0, "tool_call": 2.0, "answer": 0.5})
    weighed = sources.Conversations(rows, qwen, learn)
    plain = sources.Conversations(rows, qwen)
    marks = {mark: qwen.tokenizer.id(mark) for mark in (Mark.THINK, Mark.UNTHINK, Mark.END)}
    cut = 0
    for index in range(0, 100, 5):
        want, row = to_row(plain[index]), to_row(weighed[index])
        assert (row.tokens == want.tokens).all() and not row.learn[want.learn == 0].any()
        for weight in (0.5, 1.0, 2.0):
            said = row.tokens[row.learn == weight].tolist()
            assert said and not {marks[Mark.THINK], marks[Mark.UNTHINK]} & set(said)
        calls = texts(qwen, weighed[index])
        assert {text[:11] for text, w in calls if w == 2.0} == {"<tool_call>"}
        ((answer, _),) = [pair for pair in calls if pair[1] == 0.5]
        assert answer.startswith("<answer>") and answer.endswith("</answer>")
        short, why = fit_row(plain[index], 4096, "cut")
        assert why in ("", "cut") and len(short.tokens) <= 4096
        assert short.tokens[-1] == marks[Mark.END] and short.learn[-1] == 1
        assert (want.tokens[: len(short.tokens)] == short.tokens).all()
        cut += why == "cut"
    assert cut > 5
