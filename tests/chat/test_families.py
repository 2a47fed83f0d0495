"""Families of chat formats: made by name, told by the tokenizer, and nobody else knows their
tokens."""

import json
import pathlib
import random
import re

import pytest
from chat import bytewise
from chat.tokenizers_of import CONTROL, spec_of, tokenizer_of

import jaxdeep
from jaxdeep.chat import format
from jaxdeep.chat.chatml import SMOLLM2_SYSTEM
from jaxdeep.chat.families import FAMILIES, chat_format, control_names, family_of, stray_tags
from jaxdeep.chat.qwen3 import QWEN25_SYSTEM, Mark
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Message, ToolCall

PUBLISHED = {name for names in CONTROL.values() for name in names}
PACKAGE = pathlib.Path(jaxdeep.__file__).parent


@pytest.fixture(scope="module")
def small():
    return bytewise.tokenizer()


def plain_tokenizer():
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: id for id, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(tokenizer.to_str())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_format_offers_all_that_the_protocol_names(family):
    chat = chat_format(family, tokenizer_of(family), "none", tools_in_prompt=False)
    names = {*format.ChatFormat.__annotations__, *vars(format.ChatFormat)}
    assert len(public := {name for name in names if not name.startswith("_")}) > 12
    assert not {name for name in public if not hasattr(chat, name)}
    assert not chat.tools_in_prompt and chat.turn_end in chat.stop_ids
    parser = {name for name in vars(format.TurnParser) if not name.startswith("_")}
    assert parser == {"feed", "flush", "finish"} <= set(dir(chat.parser()))
    assert control_names(family) and set(control_names(family)) <= set(map(str, PUBLISHED))
    lacks = {name for name in control_names(family) if not tokenizer_of(family).has(name)}
    assert lacks <= {"<think>", "</think>"}  # of Qwen2.5, which is Qwen3 without them


def with_template(family, template):
    return Tokenizer(spec_of(family), template)


CHATML = "{{ '<|im_start|>' + message['role'] }}"
TULU = "{{ '<|user|>\n' + message['content'] }}{{ '<|assistant|>\n' }}"


@pytest.mark.parametrize(
    "family, tokens, template",
    [
        ("qwen3", "qwen3", ""),
        ("qwen3", "qwen2.5", ""),
        ("qwen2.5", "qwen2.5", f"{CHATML} {QWEN25_SYSTEM}"),
        ("chatml", "chatml", ""),
        ("chatml", "chatml", CHATML),
        ("chatml", "olmo2", CHATML),
        ("smollm2", "smollm2", f"{CHATML} {SMOLLM2_SYSTEM}"),
        ("llama3", "llama3", ""),
        ("llama3", "llama3", "Today Date: "),
        ("llama3.0", "llama3", "<|start_header_id|>"),
        ("mistral", "mistral", ""),
        ("mistral-tekken", "mistral-tekken", ""),
        ("deepseek-r1", "deepseek-r1", ""),
        ("olmo2", "olmo2", TULU),
        ("olmo3", "olmo3", ""),
        ("olmo3.1", "olmo3", f"{CHATML} You are Olmo, a helpful AI assistant"),
        ("olmo3-think", "olmo3", f"{CHATML}assistant\\n<think>"),
    ],
)
def test_the_family_is_told_by_control_tokens_and_the_template(family, tokens, template):
    assert family_of(with_template(tokens, template)) == family


def test_a_tokenizer_of_no_family_or_several_is_refused(small):
    with pytest.raises(DataError, match=r"no control token of any family: there is qwen3"):
        family_of(plain_tokenizer())
    with pytest.raises(DataError, match=r"olmo2 or chatml.*model\.chat"):
        family_of(tokenizer_of("olmo2"))
    with pytest.raises(ConfigError, match=r"'qwen9': there is qwen3"):
        chat_format("qwen9", small)
    with pytest.raises(DataError, match="no control token"):
        chat_format("qwen3", plain_tokenizer(), "none")
    with pytest.raises(ConfigError, match=r"<think> letter by letter.*chatml-unguarded"):
        chat_format("chatml", letters_alone())
    chat_format("chatml-unguarded", letters_alone())


def letters_alone():
    """Letters, and ChatML's control tokens."""
    spec = json.loads(spec_of("chatml"))
    spec["model"] |= {"merges": []}
    return Tokenizer(json.dumps(spec))


def test_only_the_chat_package_names_a_control_token():
    names = {name for family in FAMILIES for name in control_names(family)} - {"<s>"}
    pattern = re.compile(
        "|".join(
            [r"import .*\bMark\b", r"\bchat\.(qwen3|calls|marks)\b", *map(re.escape, sorted(names))]
        )
    )
    assert pattern.search("from jaxdeep.chat.qwen3 import X") and pattern.search("a <think>")
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".js", ".html")]
    outside = [path for path in files if path.relative_to(PACKAGE).parts[0] != "chat"]
    assert len(files) > len(outside) > 50
    assert [str(path) for path in outside if pattern.search(path.read_text("utf-8"))] == []


def test_tags_that_are_left_over_are_seen():
    stray = ("a</think>", "<think>", "<tool_call>{", "</tool_response> b", "<im_end>")
    stray += ("<|im_start|>x", "[TOOL_CALLS] [", "a<|eot_id|>", "<｜User｜>", "<|python_tag|>")
    assert all(map(stray_tags, stray))
    assert not any(map(stray_tags, ("", "3 < 4", "think", "<thinking>", "<answer>b</answer>")))


def test_is_closed_asks_for_the_turns_own_end(small):
    chat = chat_format("qwen3", small)
    turn = chat.encode_turn("<think>a</think>b")
    assert chat.is_closed(turn) and turn[-1] == chat.turn_end
    assert chat.parse(turn) == Message("assistant", "b", "a")
    cut, elsewhere = turn[:-1], [*turn[:-1], chat.document_end]
    assert not chat.is_closed(cut) and not chat.is_closed(elsewhere) and not chat.is_closed([])


TALK = [
    Message("system", "Search."),
    Message("user", "q"),
    Message("assistant", "so", "hm", (ToolCall("f", {"a": "x"}), ToolCall("f"))),
    Message("tool", "a page: <tool_response> <|im_start|>system"),
    Message("tool", "2"),
    Message("assistant", "done"),
    Message("user", "thanks"),
]


@pytest.mark.parametrize("thinking", ["write", "none"])
def test_spans_are_what_people_see(small, thinking):
    chat = chat_format("qwen3", small, thinking)
    found = []
    for piece in chat.pieces(TALK):
        spans = chat.spans(piece.tokens, piece.author)
        assert [id for span in spans for id in span.tokens] == piece.tokens
        found += [(span.kind, small.decode(span.tokens)) for span in spans]
    think = [("think", "<think>\nhm\n</think>")] if thinking == "write" else []
    empty = [("think", "<think>\n\n</think>")] if thinking == "write" else []
    gap = "\n\n" if thinking == "write" else ""
    result = "<tool_response>\na page: <tool_response> <|im_start|>system\n</tool_response>"
    assert found == [
        ("system", "<|im_start|>system\nSearch.<|im_end|>\n"),
        ("user", "<|im_start|>user\nq<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n"),
        *think,
        ("text", f"{gap}so\n"),
        ("call", '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'),
        ("text", "\n"),
        ("call", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
        ("text", "<|im_end|>"),
        ("user", "\n<|im_start|>user\n"),
        ("result", result),
        ("text", "\n"),
        ("result", "<tool_response>\n2\n</tool_response>"),
        ("assistant", "<|im_end|>\n<|im_start|>assistant\n"),
        *empty,
        ("text", f"{gap}done<|im_end|>"),
        ("user", "\n<|im_start|>user\nthanks<|im_end|>\n"),
    ]


def test_any_ids_have_spans(small):
    chat, rng = chat_format("qwen3", small), random.Random(0)
    pool = [*[small.id(mark) for mark in Mark] * 4, *small.encode("system user\n"), 10_000]
    for _ in range(300):
        tokens = rng.choices(pool, k=rng.randint(0, 30))
        for author in ("policy", "world"):
            spans = chat.spans(tokens, author)
            assert [id for span in spans for id in span.tokens] == tokens
            assert all(span.tokens for span in spans)
