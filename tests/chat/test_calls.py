"""Calls as each syntax reads them, broken ones included; what cannot be read again is not
written."""

import pytest
from chat.tokenizers_of import tokenizer_of

from jaxdeep.chat.calls import Functions, Hermes, LlamaJson, MistralList
from jaxdeep.chat.families import chat_format
from jaxdeep.chat.llama3 import Llama3
from jaxdeep.errors import DataError
from jaxdeep.types import Message, ToolCall

F, G = ToolCall("f", {"a": 1}), ToolCall("g")
SYNTAXES = (Hermes(), LlamaJson(), MistralList(" "), Functions())


@pytest.mark.parametrize(
    "body, calls",
    [
        ("f(a=1)\ng()", [F, G]),
        ("\n f( a = 1 ) ; g()\n", [F, G]),
        ('f(a="x\\n\\u00e9", b=[true, null, {"c": -1.5}])', [("f", {"a": "x\né", "b": [True, None, {"c": -1.5}]})]),
        ("f(a='it\\'s', b=True)", [("f", {"a": "it's", "b": True})]),
        ('f(a="\\ud83d\\ude80")', [("f", {"a": "🚀"})]),
        ("web.search(q='x')", [("web.search", {"q": "x"})]),
        ("f(1)", "KEY=VALUE"),
        ("f(**{})", "KEY=VALUE"),
        ("f(a=b)", "no values of JSON"),
        ("f(a=1e999)", "no values of JSON"),
        ('f(a="\\ud83d")', "no values of JSON"),
        ("f(a={1})", "no values of JSON"),
        ("f(a=", "cannot be read"),
        ("x = f()", "not a call"),
        ("f", "not a call"),
        ("", "no tool call"),
        ("f(" * 5000, "cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_functions(body, calls):
    check(Functions(), body, calls)


@pytest.mark.parametrize(
    "body, calls",
    [
        ('{"name": "f", "parameters": {"a": 1}}', [F]),
        ('{"type": "function", "name": "f", "arguments": {"a": 1}}; {"name": "g"}', [F, G]),
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": null}]', [F, G]),
        ('f.call(a=1)', [F]),
        ('{"name": "f", "parameters": {"a": 1}', "not valid JSON"),
        ('{"name": "f", "parameters": {"a": 1}} and', "not valid JSON"),
        ('{"name": "f", "parameters": {"a": NaN}}', "NaN"),
        ('{"name": "f", "parameters": "x"}', "not a JSON object"),
        ('{"name": "f", "input": {}}', 'no "parameters", but "input"'),
        ("print(1)", "not valid JSON"),
        ("[]", "no tool call"),
        ("", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_llama(body, calls):
    check(LlamaJson(), body, calls)


@pytest.mark.parametrize(
    "body, calls",
    [
        (' [{"name": "f", "arguments": {"a": 1}, "id": "000000000"}]', [F]),
        (' [{"name": "f", "arguments": {"a": 1}, "id": 7}, {"name": "g"}]', [F, G]),
        ('{"name": "f", "arguments": {"a": 1}}', [F]),
        ('[{"name": "f", "arguments": {"a": 1}', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("[]", "no tool call"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_mistral(body, calls):
    check(MistralList(""), body, calls)


def check(syntax, body, calls):
    read = syntax.read(body)
    assert read  # a block always counts as a call
    if isinstance(calls, str):
        assert calls in read[-1].error and not read[-1].arguments
    else:
        assert read == [call if isinstance(call, ToolCall) else ToolCall(*call) for call in calls]


def test_ids_of_mistrals_calls_come_back_with_their_results():
    chat = chat_format("mistral", tokenizer_of("mistral"), "none")
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcDEF123"}]'
    (call,) = chat.parse(chat.encode_turn(text)).calls
    assert call == ToolCall("f", {"a": 1}, id="abcDEF123")
    told = chat.reply([Message("tool", "x", name="f", call_id=call.id), Message("tool", "y")])
    said = chat.tokenizer.decode(told)
    assert said == (
        '[TOOL_RESULTS] {"content": x, "call_id": "abcDEF123"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": y, "call_id": "000000001"}[/TOOL_RESULTS]'
    )
    again = chat.pieces([Message("assistant", calls=(call,))])[-1]
    assert chat.tokenizer.decode(again.tokens) == f"{text}</s>"


@pytest.mark.parametrize(
    "text, calls, content",
    [
        ('{"answer": 4}', 0, '{"answer": 4}'),
        ('{"name": "Ann", "age": 3}', 0, '{"name": "Ann", "age": 3}'),
        ('{"name": "Ann" and so on', 0, '{"name": "Ann" and so on'),
        (' {"name": "f", "parameters": {"a": 1}}', 1, ""),
        ('{"name": "f", "parameters": {"a": 1}', 1, ""),
        ('so {"name": "f", "parameters": {"a": 1}}', 0, 'so {"name": "f", "parameters": {"a": 1}}'),
        ('so<|python_tag|>{"name": "f", "parameters": {"a": 1}}', 1, "so"),
        ("<|python_tag|>x<|python_tag|>f.call(a=1)", 2, ""),
    ],
)
def test_an_answer_in_json_is_no_call_of_llamas(text, calls, content):
    chat = chat_format("llama3", tokenizer_of("llama3"), "none")
    said = chat.parse(chat.encode_turn(text))
    assert (len(said.calls), said.content) == (calls, content)


def test_a_format_can_use_the_calls_of_another():
    chat = Llama3(tokenizer_of("llama3"), "none", calls=Hermes())
    tool = {"type": "function", "function": {"name": "f"}}
    talk = [Message("user", "q"), Message("assistant", "a", calls=(F,)), Message("tool", "r")]
    text = chat.tokenizer.decode([id for p in chat.pieces(talk, [tool]) for id in p.tokens])
    assert "ipython" not in text and "</tools>" in text.partition("<|eot_id|>")[0]
    assert text.endswith("<tool_response>\nr\n</tool_response><|eot_id|>")
    assert chat.parse(chat.pieces(talk[1:2])[-1].tokens) == talk[1]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: type(syntax).__name__)
@pytest.mark.parametrize(
    "call",
    [
        ToolCall("", error="not valid"),
        ToolCall('a"b'),
        ToolCall("f", {"x": float("nan")}),
        ToolCall("f", {"x": object()}),
    ],
    ids=lambda call: call.name or "broken",
)
def test_what_cannot_be_read_again_is_not_written(syntax, call):
    with pytest.raises(DataError):
        syntax.write([call], "")


@pytest.mark.parametrize("key", ["a b", "class", "f(", ""])
def test_names_that_python_does_not_take_are_not_written_as_functions(key):
    with pytest.raises(DataError):
        Functions().write([ToolCall("f", {key: 1})], "")
    with pytest.raises(DataError):
        Functions().write([ToolCall("get-weather")], "")
