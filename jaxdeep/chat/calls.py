"""How tools are declared, called and answered: one object a syntax, that any chat format can use.

    Hermes       <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>      Qwen, Hermes
    LlamaJson    {"name": ..., "parameters": {...}}                                  Llama 3.x
    MistralList  [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": "..."}]       Mistral v3
    Functions    <function_calls>name(key="value")</function_calls>                  OLMo 3

A chat format says whose turn a part is in; what stands there for a tool comes from its
`CallSyntax`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Protocol

from jaxdeep.chat.format import Tools
from jaxdeep.chat.marks import BareCall, CallMarks, Mark, Stage
from jaxdeep.errors import DataError
from jaxdeep.types import Message, ToolCall, plain


class Content(str):
    """What somebody says, rather than the format: nothing in it can become a mark."""


class CallSyntax(Protocol):
    """The words in which a policy asks for tools and reads their results."""

    marks: tuple[Mark, ...]
    """Its marks; each is a control token where the tokenizer has one of that name, else text."""
    needed: tuple[Mark, ...]
    """Those of them that must be control tokens."""
    place: Literal["system", "user"]
    """Whose turn `declare` goes into: the system's, or the first of the user's."""
    gap: str
    """What stands between a turn's content and a call. Of a policy's content it is no part."""
    result_role: str
    """Whose turn results are; "" where their marks alone say so."""
    together: bool
    """Whether neighbouring results share one turn."""

    def declare(self, tools: Tools) -> list[str]:
        """The parts that tell the policy of its tools."""
        ...

    def write(self, calls: Sequence[ToolCall], content: str) -> list[str]:
        """The parts of a turn's calls after its content. DataError for calls it cannot write."""
        ...

    def result(self, message: Message, index: int) -> tuple[list[str], list[str]]:
        """The parts of one result, the `index`-th of a turn: those of the format that come first,
        and those that tell the result itself."""
        ...

    def read(self, body: str) -> list[ToolCall]:
        """The calls between two marks, at least one; what is wrong with one is in its `error`."""
        ...

    def cut(self, body: str) -> list[ToolCall]:
        """The calls after a mark that nothing closes."""
        ...

    def stages(self) -> list[Stage]:
        """How its marks are told from text that looks like them."""
        ...


class HermesMark(Mark):
    CALL = "<tool_call>"
    UNCALL = "</tool_call>"
    RESULT = "<tool_response>"
    UNRESULT = "</tool_response>"


class Hermes:
    """JSON between tags, a call each, as in the templates of Qwen and Hermes."""

    HEAD = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
    )
    # The template names the marks of calls in the system turn, and published tokenizers read them
    # there as control tokens: they are marks here too, so that the prompt is the one the models
    # were trained with.
    TAIL = (
        "\n</tools>\n\nFor each function call, return a json object with function name and "
        "arguments within ",
        *(HermesMark.CALL, HermesMark.UNCALL, " XML tags:\n", HermesMark.CALL),
        '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
        HermesMark.UNCALL,
    )

    marks = tuple(HermesMark)
    needed = ()
    place = "system"
    gap = "\n"
    result_role = "user"
    together = True

    def declare(self, tools: Tools) -> list[str]:
        return [self.HEAD, *(Content(f"\n{dump(tool)}") for tool in tools), *self.TAIL]

    def write(self, calls: Sequence[ToolCall], content: str) -> list[str]:
        parts: list[str] = []
        for call in calls:
            if content or parts:
                parts.append(self.gap)
            text = f'\n{{"name": "{call.name}", "arguments": {dump(call.arguments)}}}\n'
            parts += [HermesMark.CALL, *written(text, [call], self), HermesMark.UNCALL]
        return parts

    def result(self, message: Message, index: int) -> tuple[list[str], list[str]]:
        gap = "\n" if index else ""
        told = [Content(message.content), "\n", HermesMark.UNRESULT]
        return [gap, HermesMark.RESULT, "\n"], told

    def read(self, body: str) -> list[ToolCall]:
        return [json_call(body)]

    def cut(self, body: str) -> list[ToolCall]:
        return [ToolCall("", error="the tool call is not closed by </tool_call>")]

    def stages(self) -> list[Stage]:
        return [CallMarks(_is_object)]


class LlamaMark(Mark):
    CALL = "<|python_tag|>"


class LlamaJson:
    """JSON in the place of an answer, as in the templates of Llama 3.1 to 3.3, and after
    `<|python_tag|>`. Several calls are separated by "; ", and one after a text has the mark before
    it; the templates have neither."""

    ASK = (
        "Given the following functions, please respond with a JSON for a function call with its "
        "proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.'
        "Do not use variables.\n\n"
    )
    _BEGIN = re.compile(r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:')
    _ARGUMENTS = re.compile(r'"(?:parameters|arguments)"\s*:')

    marks = tuple(LlamaMark)
    needed = ()
    place = "user"
    gap = ""
    result_role = "ipython"
    together = False

    def declare(self, tools: Tools) -> list[str]:
        return [self.ASK, *(Content(f"{dump(tool, indent=4)}\n\n") for tool in tools)]

    def write(self, calls: Sequence[ToolCall], content: str) -> list[str]:
        if not calls:
            return []
        texts = [f'{{"name": "{c.name}", "parameters": {dump(c.arguments)}}}' for c in calls]
        mark = [LlamaMark.CALL] if content else []
        return [*mark, *written("; ".join(texts), calls, self)]

    def result(self, message: Message, index: int) -> tuple[list[str], list[str]]:
        # The templates write a text as JSON, in quotes.
        return [], [Content(json.dumps(message.content, ensure_ascii=False))]

    def read(self, body: str) -> list[ToolCall]:
        text = body.strip()
        if text[:1] not in ("{", "[", "") and ".call(" in text:  # its built-in tools
            return [
                ToolCall(call.name.removesuffix(".call"), call.arguments, call.error)
                for call in python_calls(text)
            ]
        values, error = _json_values(text)
        calls = [call_of(value, ("parameters", "arguments")) for value in values]
        return [*calls, ToolCall("", error=error)] if error else calls

    def cut(self, body: str) -> list[ToolCall]:
        return self.read(body)  # a call goes to the end of its turn

    def stages(self) -> list[Stage]:
        return [BareCall(LlamaMark.CALL, "{", self.is_call)]

    def is_call(self, text: str) -> bool:
        """Whether a text that begins with a brace is a call, possibly a broken one, rather than an
        answer in JSON."""
        values, error = _json_values(text.strip())
        if error:
            return bool(self._BEGIN.match(text) and self._ARGUMENTS.search(text))
        return all(
            isinstance(value, dict)
            and isinstance(value.get("name"), str)
            and bool({"parameters", "arguments"} & value.keys())
            for value in values
        )


class MistralMark(Mark):
    CALL = "[TOOL_CALLS]"
    RESULT = "[TOOL_RESULTS]"
    UNRESULT = "[/TOOL_RESULTS]"
    TOOLS = "[AVAILABLE_TOOLS]"
    UNTOOLS = "[/AVAILABLE_TOOLS]"


class MistralList:
    """A JSON list of calls with ids, which their results repeat, as in the templates of Mistral's
    third tokenizer. `space` follows a mark: one in SentencePiece, none in Tekken.

    A call of a conversation that has no id gets its number within the turn, from 000000000.
    """

    _ID = re.compile(r"[A-Za-z0-9]{9}")

    marks = needed = tuple(MistralMark)
    place = "user"
    gap = ""
    result_role = ""
    together = False

    def __init__(self, space: str) -> None:
        self.space = space

    def declare(self, tools: Tools) -> list[str]:
        schemas = ", ".join(dump(tool) for tool in tools)
        return [MistralMark.TOOLS, self.space, Content(f"[{schemas}]"), MistralMark.UNTOOLS]

    def write(self, calls: Sequence[ToolCall], content: str) -> list[str]:
        if not calls:
            return []
        texts = [
            f'{{"name": "{call.name}", "arguments": {dump(call.arguments)}, '
            f'"id": "{self._id(call.id, index)}"}}'
            for index, call in enumerate(calls)
        ]
        text = f"{self.space}[{', '.join(texts)}]"
        return [MistralMark.CALL, *written(text, calls, self)]

    def result(self, message: Message, index: int) -> tuple[list[str], list[str]]:
        head = [MistralMark.RESULT, f'{self.space}{{"content": ']
        tail = f', "call_id": "{self._id(message.call_id, index)}"}}'
        return head, [Content(message.content), tail, MistralMark.UNRESULT]

    def read(self, body: str) -> list[ToolCall]:
        values, error = _json_values(body.strip())
        calls = []
        for index, value in enumerate(values):
            id = value.pop("id", "") if isinstance(value, dict) else ""
            call = call_of(value, ("arguments",))
            id = id if isinstance(id, str) and id != self._id("", index) else ""
            calls.append(ToolCall(call.name, call.arguments, call.error, id))
        return [*calls, ToolCall("", error=error)] if error else calls

    def cut(self, body: str) -> list[ToolCall]:
        return self.read(body)  # calls go to the end of their turn

    def stages(self) -> list[Stage]:
        return []

    def _id(self, id: str, index: int) -> str:
        return id if self._ID.fullmatch(id) else f"{index:09d}"


class FunctionsMark(Mark):
    CALL = "<function_calls>"
    UNCALL = "</function_calls>"
    FUNCTIONS = "<functions>"
    UNFUNCTIONS = "</functions>"


class Functions:
    """Calls as in Python with values in JSON, one a line, as in the templates of OLMo 3."""

    marks = tuple(FunctionsMark)
    needed = ()
    place = "system"
    gap = ""
    result_role = "environment"
    together = False

    def declare(self, tools: Tools) -> list[str]:
        schemas = ", ".join(dump(tool) for tool in tools)
        return [FunctionsMark.FUNCTIONS, Content(f"[{schemas}]"), FunctionsMark.UNFUNCTIONS]

    def write(self, calls: Sequence[ToolCall], content: str) -> list[str]:
        if not calls:
            return []
        text = "\n".join(
            f"{c.name}({', '.join(f'{key}={dump(value)}' for key, value in c.arguments.items())})"
            for c in calls
        )
        return [FunctionsMark.CALL, *written(text, calls, self), FunctionsMark.UNCALL]

    def result(self, message: Message, index: int) -> tuple[list[str], list[str]]:
        return [], [Content(message.content)]

    def read(self, body: str) -> list[ToolCall]:
        return python_calls(body)

    def cut(self, body: str) -> list[ToolCall]:
        return [ToolCall("", error="the tool calls are not closed by </function_calls>")]

    def stages(self) -> list[Stage]:
        return [CallMarks(lambda body: not any(call.error for call in python_calls(body)))]


def written(text: str, calls: Sequence[ToolCall], syntax: CallSyntax) -> list[str]:
    """The text of calls, as parts. DataError where it would not be read as these calls again: that
    would be learned, and then never run."""
    for call in calls:
        if call.error:
            raise DataError(f"a tool call that could not be read cannot be written: {call}")
    read = syntax.read(text)
    for call, again in zip(calls, read, strict=False):
        if again.error:
            raise DataError(f"{again.error}: {call!r:.200}")
    if len(read) != len(calls) or any(a.name != b.name for a, b in zip(calls, read, strict=True)):
        raise DataError(f"these tool calls would be read as others: {list(calls)!r:.200}")
    return [text]


def dump(value: Any, indent: int | None = None) -> str:
    """A value as JSON; arguments that came as JSON text as they were written."""
    if text := getattr(value, "text", ""):
        return text
    value = dict(value) if isinstance(value, Mapping) else value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=plain, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{value!r:.200} cannot be written as JSON: {error}") from error


def json_call(text: str) -> ToolCall:
    """The call in a JSON object, or what is wrong with it, in words for the model."""
    values, error = _json_values(text.strip(), one=True)
    return ToolCall("", error=error) if error else call_of(values[0], ("arguments",))


def call_of(value: Any, keys: Sequence[str]) -> ToolCall:
    """The call that a JSON value says; its arguments are under the first of `keys`, or another of
    them."""
    if not isinstance(value, dict):
        return ToolCall("", error="the tool call is not a JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return ToolCall("", error='the tool call has no "name"')
    key = next((key for key in keys if key in value), None)
    others = [json.dumps(k) for k in value if k not in ("name", "type")]
    if key is None and others:
        error = f'the tool call has no "{keys[0]}", but {", ".join(others)}'
        return ToolCall(name, error=error)
    arguments = value[key] if key else {}
    if arguments in (None, ""):  # how a call without arguments is written, too
        arguments = {}
    if not isinstance(arguments, dict):
        return ToolCall(name, error=f'the "{key}" of the tool call are not a JSON object')
    return ToolCall(name, arguments)


def python_calls(text: str) -> list[ToolCall]:
    """The calls of a text of Python calls with keywords, at least one; values are literals of JSON
    or of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            lines = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [ToolCall("", error=f"the tool calls cannot be read as NAME(KEY=VALUE): {error}")]
    return [_python_call(line) for line in lines] or [ToolCall("", error="there is no tool call")]


def _python_call(line: ast.stmt) -> ToolCall:
    call = line.value if isinstance(line, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        return ToolCall("", error=f"{ast.unparse(line)[:80]!r} is not a call NAME(KEY=VALUE)")
    name = ast.unparse(call.func)
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        return ToolCall(name, error=f"the arguments of {name} must be written as KEY=VALUE")
    try:
        arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        return ToolCall(name, error=f"the arguments of {name} are no values of JSON: {error}")
    return ToolCall(name, arguments)


class _JsonNames(ast.NodeTransformer):
    """JSON's names for constants, where Python has others; halves of surrogate pairs joined."""

    NAMES: ClassVar = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.NAMES[node.id]) if node.id in self.NAMES else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, str):
            return node
        return ast.Constant(node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le"))


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_JsonNames().visit(node))


def _json_values(text: str, *, one: bool = False) -> tuple[list[Any], str]:
    """The JSON values of a text, and what is wrong with the rest of it, in words for the model;
    there is a value or an error. Values are separated by ";", and one list is as good as its
    elements, except with `one`."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    values: list[Any] = []
    try:
        if one:
            values = [decoder.decode(text)]
        else:
            at = 0
            while at < len(text) or not values:
                value, at = decoder.raw_decode(text, at)
                values.append(value)
                rest = re.compile(r"\s*(?:;\s*)?").match(text, at)
                at = rest.end()
        # Half a surrogate pair or 1e999 can be read from JSON but not written again, and a record
        # of the rollout writes it.
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return values[:-1] if one else [], f"the tool call is not valid JSON: {error}"
    if not one and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return (values, "") if values else ([], "there is no tool call in the list")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _is_object(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(text), dict)
    return False
