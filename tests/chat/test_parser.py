"""A turn read while it is sampled says what the same turn says when it is read whole, and no event
is taken back."""

import itertools
import json
import random

import pytest
from chat import bytewise
from chat.streams import check, chunks, joined, stream

from jaxdeep.chat.calls import Hermes
from jaxdeep.chat.format import CallBegin, CallEnd, CallText, ContentText, ReasoningText
from jaxdeep.chat.formats import messages_from_openai
from jaxdeep.chat.qwen3 import Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.types import Message, ToolCall

MODES = ("write", "skip", "none")
GOOD = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
OPEN = '<tool_call>\n{"name": "f", "arguments": {"a": "x'
(UNCLOSED,) = Hermes().cut("")
F = ToolCall("f", {"a": 1})


@pytest.fixture(scope="module")
def small():
    return bytewise.tokenizer()


@pytest.fixture(scope="module")
def qwen(shared):
    return Tokenizer.load(shared("qwen3/tokenizer.json"))


@pytest.fixture(scope="module", params=MODES)
def chat(request, small):
    return Qwen3Chat(small, request.param)


def pools(chat):
    """Kinds of random turns: each a list of runs of ids to draw from."""
    encode = chat.tokenizer.encode_control
    marks = [[id] for id in sorted(chat.tokenizer.control)]
    inside = [encode(mark) for mark in (Mark.THINK, Mark.UNTHINK, Mark.CALL, Mark.UNCALL)]
    texts = [encode(text) for text in ("a", "\n", "\n\n", " b\n", "\nc", "é", "漢🚀", "\n \n")]
    calls = [encode(GOOD), encode(f"\n{GOOD}\n"), encode(GOOD.removesuffix(Mark.UNCALL))]
    odd = [encode(text) for text in ('"', "\\", OPEN, f'{OPEN}{Mark.UNCALL}"}}}}{Mark.UNCALL}')]
    torn = [encode("🚀")[:2], encode("漢")[1:], encode("é")[1:], [10_000], []]
    return [
        [*inside, *texts],
        [*inside, *texts, *calls],
        [*inside, *texts, *calls, *odd],
        [*inside, *texts, *torn],
        [*marks, *texts, *calls, *torn],
        [[id] for id in range(256)],
    ]


def test_any_turn_in_any_chunks_says_what_parse_says(chat):
    rng, kinds = random.Random(chat.thinking), pools(chat)
    for _ in range(3000):
        tokens = list(itertools.chain(*rng.choices(rng.choice(kinds), k=rng.randint(0, 14))))
        if rng.random() < 0.5:
            tokens += [rng.choice(chat.stop_ids), *rng.choices(range(256), k=rng.randint(0, 2))]
        check(chat, tokens, chunks(tokens, rng, rng.choice((1, 3, 40))))


def test_recorded_turns_token_by_token(qwen, shared):
    chat = Qwen3Chat(qwen)
    with shared("traces/webdancer.jsonl").open() as file:
        rows = [json.loads(line)["messages"] for line in itertools.islice(file, 20)]
    turns = 0
    for row in rows:
        for piece in chat.pieces(messages_from_openai(row, inline=True)):
            if piece.author == "policy":
                events = check(chat, piece.tokens, ([token] for token in piece.tokens))
                for call in chat.parse(piece.tokens).calls:
                    assert json.loads(joined(events, CallText))["name"] == call.name
                assert len(events) > len(piece.tokens) / 2  # as it comes, and not at the end
                turns += 1
    assert turns > 30


def test_text_comes_in_whole_characters(small):
    chat, text = Qwen3Chat(small, "none"), "aé漢🚀\u0301\n\nz"
    tokens = small.encode(text)
    assert len(tokens) > len(text)  # a token is a byte
    events, _ = stream(chat, ([token] for token in tokens))
    assert [event.text for event in events] == ["a", "é", "漢", "🚀", "\u0301", "\n\nz"]


def test_what_is_cut_inside_a_character_says_so_at_the_end(small):
    chat = Qwen3Chat(small, "none")
    parser = chat.parser()
    assert parser.feed(small.encode("a🚀")[:3]) == [ContentText("a")]
    assert parser.flush() == [ContentText("\ufffd")]
    assert parser.flush() == parser.feed(small.encode("b")) == []
    assert parser.finish() == Message("assistant", "a\ufffd")


def fed(chat, *texts):
    """The events of each text in turn, then those at the end."""
    parser = chat.parser()
    events = [parser.feed(chat.tokenizer.encode_control(text)) for text in texts]
    return [*events, parser.flush()]


def test_a_turn_that_begins_with_its_reasoning_waits_for_nothing(small):
    assert fed(Qwen3Chat(small), "<think>\nhm", " so\n", "\n</think>\n\n", "yes", f"\n{GOOD}") == [
        [ReasoningText("hm")],
        [ReasoningText(" so")],
        [],
        [ContentText("yes")],
        [CallBegin(0), CallText(0, '\n{"name": "f", "arguments": {"a": 1}}\n'), CallEnd(0, F)],
        [],
    ]


def test_a_turn_waits_while_its_text_may_still_be_reasoning(small):
    chat = Qwen3Chat(small)
    assert fed(chat, f"hm\n{GOOD}", "so", "</think>\n", "yes") == [
        [],
        [],
        [ReasoningText("hm"), ReasoningText("\nso")],
        [ContentText("yes")],
        [],
    ]
    assert fed(chat, "so ", "<think>", "hm") == [
        [],
        [ContentText("so "), ContentText("<think>")],
        [ContentText("hm")],
        [],
    ]
    inside = f"a{GOOD.replace('1', '</think>')}"  # a mark inside a call decides nothing
    *waiting, end = fed(chat, inside, "b")
    assert waiting == [[], []] and joined(end, ContentText) == "a\nb"
    assert chat.parser().feed([*small.encode("yes"), chat.turn_end]) == [ContentText("yes")]


@pytest.mark.parametrize("mode", ["skip", "none"])
def test_without_a_block_to_wait_for_text_comes_at_once(small, mode):
    assert fed(Qwen3Chat(small, mode), "a", "b\n", "c") == [
        [ContentText("a")],
        [ContentText("b")],
        [ContentText("\nc")],
        [],
    ]


def test_once_a_block_was_closed_another_end_of_one_is_text(small):
    write, skip = Qwen3Chat(small), Qwen3Chat(small, "skip")
    for chat, text, want in (
        (write, "<think>a</think>b</think>c", Message("assistant", "b</think>c", "a")),
        (write, "a</think>b</think>c", Message("assistant", "b</think>c", "a")),
        (skip, "b</think>c", Message("assistant", "b</think>c")),
        (skip, "<think>a</think>b", Message("assistant", "b", "a")),
    ):
        tokens = small.encode_control(text)
        assert chat.parse(tokens) == want
        check(chat, tokens, [tokens])


def test_a_call_that_is_never_closed_ends_with_the_turn(small):
    chat = Qwen3Chat(small, "none")
    assert fed(chat, "<tool_call>{", f"{GOOD}<tool_call>")[1:] == [
        [
            CallEnd(0, UNCLOSED),
            CallBegin(1),
            CallText(1, '\n{"name": "f", "arguments": {"a": 1}}\n'),
            CallEnd(1, F),
            CallBegin(2),
        ],
        [CallEnd(2, UNCLOSED)],
    ]


def test_a_tag_in_a_string_of_a_call_comes_when_the_call_ends(small):
    chat = Qwen3Chat(small, "none")
    begin, rest = '{"name": "f", "arguments": {"a": "', 'b"}}'
    call = ToolCall("f", {"a": "</tool_call>b"})
    assert fed(chat, "<tool_call>", begin, "</tool_call>b", '"}}', "</tool_call>", "c")[1:] == [
        [CallText(0, begin)],
        [],
        [],
        [CallText(0, f"</tool_call>{rest}"), CallEnd(0, call)],
        [ContentText("c")],
        [],
    ]
    # a line end shows that the quote was never ended: the tag was one
    _, _, held, shown, *_ = fed(chat, "<tool_call>", begin, "</tool_call>b", "\n", "c")
    assert held == [] and isinstance(shown[0], CallEnd) and shown[0].call.error
    assert shown[1:] == [ContentText("b")]


def test_each_token_is_looked_at_once(small, monkeypatch):
    chat, looked = Qwen3Chat(small), []
    read = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda *args: looked.append(1) or read(*args))
    monkeypatch.delattr(Tokenizer, "decode")
    tokens = small.encode("so it goes\n" * 500)
    _, message = stream(chat, ([token] for token in tokens))
    assert len(looked) == len(tokens) and message.content == "so it goes\n" * 500
