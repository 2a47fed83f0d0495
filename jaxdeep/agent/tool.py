"""Tools: typed Python functions that a model may call.

A function with type hints becomes a `Tool`: a schema for the model to read, and a call that takes
the arguments the model wrote and gives a `ToolResult`.

    @tool                                   # or @tool(timeout=5.0), or @tool(inline=True)
    async def search(query: Annotated[str, "words to look for"], k: int = 5) -> str:
        \"\"\"Search the corpus.\"\"\"

Arguments are checked against the schema that the model is shown. Every argument in it has an
effect; any other is refused, with a text that says what was expected. Who failed decides what
happens:

    the model   wrong arguments, or the tool raises `ToolError`   -> a result with `failed` set
    the world   the tool raises `WorldError`, or hangs            -> `WorldError`, `ToolTimeout`
    the tool    it raises anything else                           -> raised as it is
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import dataclasses
import inspect
import json
import math
import threading
import time
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, overload

from jaxdeep.errors import ToolTimeout
from jaxdeep.types import plain

TIMEOUT = 30.0
"""Seconds a tool may take unless it says otherwise."""

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


class ToolError(Exception):
    """The model's mistake, found by a tool (no such file, an empty query): it reads the message."""


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call returns. `done` ends the episode; `failed`: the call was a mistake of the
    model's; `seconds` the tool took; `cached`: the answer came from a cache."""

    text: str
    done: bool = False
    failed: bool = False
    seconds: float = 0.0
    cached: bool = False


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function that a model may call, made by the decorator `tool`. Of a method, `self.NAME` is
    the tool bound to that instance, as with any method."""

    name: str
    description: str
    schema: Mapping[str, Any]  # the function object of OpenAI's chat API
    timeout: float  # seconds
    inline: bool  # called directly, without a thread or a timeout
    function: Callable[..., Any]
    unbound: bool  # a method that has no `self` yet

    def __get__(self, instance: object, owner: type | None = None) -> Tool:
        if instance is None or not self.unbound:
            return self
        method = types.MethodType(self.function, instance)
        return dataclasses.replace(self, function=method, unbound=False)

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """The result of one call; the module's table says what is raised and what is a result."""
        values, problems = self._bind(arguments)
        if problems:
            return ToolResult("\n".join(problems), failed=True)
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout) as clock:
                value = await self._run(values)
        except ToolError as error:
            value = ToolResult(str(error), failed=True)
        except TimeoutError as error:
            if not clock.expired():  # the tool's own error, from a socket say, not our timeout
                raise
            raise ToolTimeout(f"{self.name} did not answer within {self.timeout:g} s") from error
        seconds = time.monotonic() - start
        if isinstance(value, ToolResult):
            return dataclasses.replace(value, seconds=seconds)
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, default=plain)
        return ToolResult(value, seconds=seconds)

    async def _run(self, values: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**values)
        if self.inline:
            return self.function(**values)
        return await in_thread(f"tool-{self.function.__name__}", self.function, **values)

    def _bind(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The values to call with, and what is wrong with the arguments, in words for the model."""
        parameters = self.schema["function"]["parameters"]
        properties = parameters["properties"]
        problems = [
            f'{self.name} needs the argument "{name}" ({_expected(properties[name])}).'
            for name in parameters["required"]
            if name not in arguments
        ]
        values = {}
        for name, value in arguments.items():
            if name not in properties:
                takes = ", ".join(f'"{k}" ({_expected(v)})' for k, v in properties.items())
                problems.append(
                    f'{self.name} has no argument "{name}". Its arguments: {takes or "none"}.'
                )
                continue
            try:
                values[name] = _read(value, properties[name])
            except (ValueError, OverflowError):
                got = json.dumps(value, ensure_ascii=False, default=str)
                # The model has its own call in the context: a long value is not repeated whole.
                got = got if len(got) <= 80 else f"{got[:80]}..."
                wanted = _expected(properties[name])
                problems.append(
                    f'The argument "{name}" of {self.name} must be {wanted}, not {got}.'
                )
        return values, problems


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(*, timeout: float = ..., inline: bool = ...) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, timeout: float = TIMEOUT, inline: bool = False
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """A function or method as a `Tool`: its name, its docstring, and a schema of its parameters.

    Parameters are str, int, float, bool, list, dict, Literal of strings or integers, any of them
    with `| None`, and `Annotated` with a description. Other types raise TypeError here. Values are
    converted where a model wrote them loosely: "5" and 5.0 to 5, 7 to "7", "true" to true.

    The function returns a str, a `ToolResult`, or anything JSON can hold. A plain function runs in
    a thread of its own, so that it may block and still be timed out; the thread is then left
    behind, and does not keep the process alive. `inline=True` calls it directly and without a
    timeout: for pure functions that take microseconds, where a thread would cost more than the
    call.
    """
    if function is None:
        return lambda function: _make(function, timeout, inline)
    return _make(function, timeout, inline)


def _make(function: Callable[..., Any], timeout: float, inline: bool) -> Tool:
    name = function.__name__
    if inline and inspect.iscoroutinefunction(function):
        raise TypeError(f"tool {name}: inline is for plain functions, an async one never blocks")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"tool {name}: a type hint cannot be read: {error}") from error
    parameters = list(inspect.signature(function).parameters.values())
    unbound = bool(parameters) and parameters[0].name == "self"
    properties: dict[str, Any] = {}
    for parameter in parameters[unbound:]:
        label = f"parameter {parameter.name!r} of tool {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{label} cannot be given by name")
        if parameter.name not in hints:
            raise TypeError(f"{label} has no type hint")
        try:
            schema = _schema(hints[parameter.name])
        except TypeError as error:
            raise TypeError(f"{label}: {error}") from None
        if parameter.default not in (parameter.empty, None):  # "or null" already says None
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    required = [p.name for p in parameters[unbound:] if p.default is p.empty]
    description = inspect.getdoc(function) or ""
    contents = {"type": "object", "properties": properties, "required": required}
    about = {"name": name, "description": description, "parameters": contents}
    schema = {"type": "function", "function": about}
    return Tool(name, description, schema, timeout, inline, function, unbound)


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint; TypeError for a type that tools do not take."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is Annotated:
        notes = " ".join(note for note in inner[1:] if isinstance(note, str))
        return _schema(inner[0]) | ({"description": notes} if notes else {})
    if origin in (Union, types.UnionType) and len(inner) == 2 and types.NoneType in inner:
        one = _schema(inner[0] if inner[1] is types.NoneType else inner[1])
        choices = {"enum": [*one["enum"], None]} if "enum" in one else {}
        return one | {"type": [one["type"], "null"]} | choices
    if origin is Literal and {type(value) for value in inner} in ({str}, {int}):
        return {"type": _SCALARS[type(inner[0])], "enum": list(inner)}
    if list in (hint, origin):
        items = {"items": _schema(inner[0])} if inner not in ((), (Any,)) else {}
        return {"type": "array"} | items
    if hint is dict or (origin is dict and inner[0] is str):
        items = {"additionalProperties": _schema(inner[1])} if inner[1:] not in ((), (Any,)) else {}
        return {"type": "object"} | items
    raise TypeError(f"{hint!r} is not among the types a tool can have")


def _expected(schema: Mapping[str, Any]) -> str:
    """A schema in words, for the messages a model reads."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(choice) for choice in schema["enum"])
    inner = schema.get("items") or schema.get("additionalProperties")
    return " or ".join([f"{kinds[0]} of {_expected(inner)}" if inner else kinds[0], *kinds[1:]])


def _read(value: Any, schema: Mapping[str, Any]) -> Any:
    """The value converted to the type of the schema; ValueError where that cannot be done."""
    kind = schema["type"]
    if isinstance(kind, list):
        if value is None:
            return None
        kind = kind[0]
    if isinstance(value, bool) and kind != "boolean":  # a bool is an int in Python
        raise ValueError
    match kind, value:
        case ("string", str()) | ("boolean", bool()):
            read = value
        case "string", int() | float():
            read = str(value)
        case "boolean", str() if value.lower() in ("true", "false"):
            read = value.lower() == "true"
        case "integer", int() | str():
            read = int(value)
        case "integer", float() if value.is_integer():
            read = int(value)
        case "number", int() | float() | str() if math.isfinite(float(value)):
            read = float(value)
        case "array", list():
            read = [_read(v, schema["items"]) for v in value] if "items" in schema else value
        case "object", dict():
            inner = schema.get("additionalProperties")
            read = {k: _read(v, inner) for k, v in value.items()} if inner else value
        case _:
            raise ValueError
    if "enum" not in schema:
        return read
    # In one form of Unicode: tokenizers compose, so a model cannot write the other.
    for choice in schema["enum"]:
        if read == choice or _composed(read) == _composed(choice):
            return choice
    raise ValueError


def _composed(value: Any) -> Any:
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


async def in_thread(name: str, function: Callable[..., Any], /, *args: Any, **values: Any) -> Any:
    """Call the function in a daemon thread of its own; return or raise what it does.

    Not asyncio.to_thread: its pool is small, so calls that queue for a thread would time out, and
    Python joins the pool's threads at exit, so one hung tool would keep the process from ending.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    # Marked as running: a cancelled waiter must not make `set_result` raise in the thread.
    future.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(function, *args, **values))
        except BaseException as error:  # raised again where the future is awaited
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)
