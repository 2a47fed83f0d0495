"""Conversations in others' formats to messages: OpenAI's `messages`, ShareGPT's `conversations`,
traces with inline tags, and the layout of DR-Tulu, in which the output of tools is inside the
assistant's text.

A row that cannot be read is a DataError with the row in it: nothing is guessed. A key that has a
meaning in some format is read or refused by name; `unread_keys` names those that are passed over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from jaxdeep.chat.base import ThinkMark
from jaxdeep.chat.calls import Hermes, HermesMark
from jaxdeep.chat.format import WrittenArguments
from jaxdeep.chat.learn import PLAIN, LearnConfig
from jaxdeep.chat.marks import INSIDE, split
from jaxdeep.chat.turn import read_turn
from jaxdeep.errors import DataError
from jaxdeep.types import Message, Role, ToolCall

ROLES = {role: role for role in get_args(Role)} | {"developer": "system", "function": "tool"}
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# The names that one thing has in different formats, the first is ours.
CONVERSATION = ("messages", "conversations")
TOOLS = ("tools", "tool_defs", "functions")
SYSTEM = ("system", "system_prompt")
REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
CALLS = ("tool_calls", "function_call")
WEIGHT = ("weight", "loss_weight", "loss_scale")
LEARNED = ("train", "training", "trainable", "loss")  # false: the turn is not learned

ROW_KEYS = frozenset((*CONVERSATION, *TOOLS, *SYSTEM))
PLAIN_KEYS = ("role", "content", "from", "value", "name", "tool_call_id")
MESSAGE_KEYS = frozenset((*PLAIN_KEYS, *REASONING, *CALLS, *WEIGHT, *LEARNED))
# These change what a row says or how it is learned, and nothing here can follow them.
REFUSED_IN_ROW = ("images", "image", "videos", "video", "audios", "audio", "chat_template_kwargs")
REFUSED_IN_MESSAGE = (
    *("images", "videos", "audios", "audio", "refusal", "channel", "recipient", "tool_plan"),
    *("train_detail", "training_detail", "mask", "prefix", "partial", "thinking_blocks"),
)
INLINE = {str(mark): mark for mark in (*ThinkMark, *HermesMark) if mark.kind in INSIDE}
"""The tags that are read in an assistant's text."""
THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)|^.*?</think>", re.DOTALL)
"""The reasoning in a text, wherever it stands, also where only its end is marked."""
TEXT_PARTS = (None, "text", "input_text", "output_text")


def read(row: Any, learn: LearnConfig = PLAIN) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """The messages and tool schemas of one row of data. Its lists may also come as JSON text, or as
    one object of equally long lists, as tables store them; a key whose value is null is absent, as
    tables fill objects up with the keys of all others. DataError: the row cannot be read."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, found {row!r:.80}")
    row = _clean(row)
    _refuse(row, REFUSED_IN_ROW, "a row")
    tools = _tools(row)
    if isinstance(turns := _as_list(row.get("messages"), "messages"), list):
        messages = messages_from_openai(turns, inline=True, learn=learn)
    elif isinstance(turns := _as_list(row.get("conversations"), "conversations"), list):
        messages = messages_from_sharegpt(turns, inline=True, learn=learn)
    else:
        raise DataError(f"a row needs a list of messages or conversations, found {', '.join(row)}")
    return _with_system(messages, row), tools


def unread_keys(row: Any) -> set[str]:
    """The keys of a row that can be read, and of its messages ("messages.KEY"), whose values are
    passed over."""
    row = _clean(row)
    turns = [turn for key in CONVERSATION for turn in _as_list(row.get(key), key) or ()]
    inner = {key for turn in turns for key in turn if key not in MESSAGE_KEYS}
    return {key for key in row if key not in ROW_KEYS} | {f"messages.{key}" for key in inner}


def _clean(value: Any) -> Any:
    """The value as plain Python: bytes as text, arrays as lists, and without keys whose value is
    None."""
    match value:
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"a text is not UTF-8: {error}") from error
        case np.ndarray() | np.generic():
            return _clean(value.tolist())
        case Mapping():
            return {key: _clean(x) for key, x in value.items() if x is not None}
        case list() | tuple():
            return [_clean(x) for x in value]
    return value


def _as_list(value: Any, name: str) -> Any:
    """JSON text read, and an object of columns as a list of rows; anything else as it is."""
    if isinstance(value, str):
        try:
            value = _clean(json.loads(value)) or []
        except (ValueError, RecursionError) as error:
            raise DataError(f"the text of {name} is not JSON: {error}") from error
    if isinstance(value, Mapping) and value and all(isinstance(x, list) for x in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise DataError(f"the columns of {name} differ in length: {value!r:.200}")
        rows = zip(*value.values(), strict=True)
        return [_clean(dict(zip(value, row, strict=True))) for row in rows]
    return value


def _refuse(holder: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    for name in names:
        if holder.get(name):
            raise DataError(
                f"{name!r} of {what} is not supported: remove it where it does not matter, else "
                f"the row. It is {holder[name]!r:.80}"
            )


def _given(holder: Mapping[str, Any], names: Sequence[str], read: Any) -> list[tuple[str, Any]]:
    """What `read` makes of the values under these names, where there is something: at most one,
    since several must agree."""
    values = [(name, read(holder[name], name)) for name in names if name in holder]
    values = [(name, value) for name, value in values if value]
    for name, value in values[1:]:
        if value != values[0][1]:
            raise DataError(f"{values[0][0]!r} and {name!r} do not agree: {holder!r:.200}")
    return values[:1]


def _tools(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    def read(value: Any, name: str) -> list[Mapping[str, Any]]:
        tools = _as_list(value or [], name)
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise DataError(f"{name} must be a list of objects, found {tools!r:.80}")
        return [t if "function" in t else {"type": "function", "function": t} for t in tools]

    return next((tools for _, tools in _given(row, TOOLS, read)), [])


def _with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The messages after the row's own system prompt."""
    for name, text in _given(row, SYSTEM, lambda value, _: value):
        if not isinstance(text, str):
            raise DataError(f"{name} is not text: {text!r:.200}")
        if not messages or messages[0].role != "system":
            return [Message("system", text), *messages]
        if messages[0].content != text:
            raise DataError(f"{name!r} is not what the first message says: {text!r:.200}")
    return messages


def messages_from_openai(
    rows: Sequence[Mapping[str, Any]], *, inline: bool = False, learn: LearnConfig = PLAIN
) -> list[Message]:
    """The messages of OpenAI dictionaries. DataError with the index of the first that cannot be
    read.

    `inline` also reads `<think>` and `<tool_call>` in an assistant's text, and takes a user or tool
    turn of nothing but `<tool_response>` blocks as tool results; an assistant's text with spans of
    the world, as `learn` names them, stays as it is. A result without a name gets the name of the
    call it answers: by id, or else in order.
    """
    messages: list[Message] = []
    names: dict[str, str] = {}  # of all calls so far, by id
    unanswered: list[str] = []  # the names of the last turn's calls, in order
    for index, row in enumerate(rows):
        try:
            new, ids = _messages(row, inline, learn)
        except DataError as error:
            raise DataError(f"message {index}: {error}") from error
        for message in new:
            if message.role == "assistant":
                unanswered = [call.name for call in message.calls]
                # Calls in the text come first, and only the dictionary's own have ids.
                names |= zip(ids, unanswered[len(unanswered) - len(ids) :], strict=True)
            elif message.role == "tool":
                in_order = unanswered.pop(0) if unanswered else ""
                id = row.get("tool_call_id")
                name = message.name or (id and names.get(id)) or in_order
                message = dataclasses.replace(message, name=name)
            messages.append(message)
    return messages


def messages_from_sharegpt(
    rows: Sequence[Mapping[str, Any]], *, inline: bool = False, learn: LearnConfig = PLAIN
) -> list[Message]:
    """The messages of a ShareGPT "conversations" list, where a function_call is one call in JSON or
    a list of them. DataError as for `messages_from_openai`."""
    converted = []
    for index, row in enumerate(rows):
        speaker = row.get("from") if isinstance(row, Mapping) else None
        if speaker not in SHAREGPT_ROLES or not isinstance(row.get("value"), str):
            known = ", ".join(SHAREGPT_ROLES)
            raise DataError(f"message {index}: expected a text from one of {known}: {row!r:.200}")
        message = {key: value for key, value in row.items() if key not in ("from", "value")}
        message |= {"role": SHAREGPT_ROLES[speaker], "content": row["value"]}
        if speaker == "function_call":
            try:
                calls = json.loads(row["value"])
            except (ValueError, RecursionError) as error:
                raise DataError(f"message {index}: the call is not JSON: {row!r:.200}") from error
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        converted.append(message)
    return messages_from_openai(converted, inline=inline, learn=learn)


def _messages(
    row: Mapping[str, Any], inline: bool, learn: LearnConfig
) -> tuple[list[Message], list[Any]]:
    """One OpenAI dictionary: one message, or several where a turn is several results; and the ids
    of its calls."""
    if not isinstance(row, Mapping) or row.get("role") not in ROLES:
        known = ", ".join(ROLES)
        raise DataError(f"expected a dictionary with a role of {known}: {row!r:.200}")
    _refuse(row, REFUSED_IN_MESSAGE, "a message")
    role = ROLES[row["role"]]
    content, weight = _text(row.get("content")), _weight(row, role, learn)
    text = content.strip()
    if (
        inline
        and role in ("user", "tool")
        and text.startswith(HermesMark.RESULT)
        and text.endswith(HermesMark.UNRESULT)
    ):
        inner = text.removeprefix(HermesMark.RESULT).removesuffix(HermesMark.UNRESULT)
        results = re.split(rf"{HermesMark.UNRESULT}\s*{HermesMark.RESULT}", inner)
        # One line end on each side is the format's, as `pieces` writes it; more belong to the
        # result.
        results = [result.removeprefix("\n").removesuffix("\n") for result in results]
        return [Message("tool", result, weight=weight) for result in results], []
    if role != "assistant":
        if others := [key for key in (*REASONING, *CALLS) if row.get(key)]:
            raise DataError(f"only an assistant's message has {others[0]}: {row!r:.200}")
        name = row.get("name") or "" if role == "tool" else ""
        return [Message(role, content, name=name, weight=weight)], []
    return _turn(row, content, weight, inline, learn)


def _turn(
    row: Mapping[str, Any], content: str, weight: float, inline: bool, learn: LearnConfig
) -> tuple[list[Message], list[Any]]:
    """An assistant's message, and the ids of its calls."""
    reasoning = next((said for _, said in _given(row, REASONING, _reasoning)), "")
    entries = next((calls for _, calls in _given(row, CALLS, _calls)), [])
    message = Message("assistant", content)
    if inline and learn.has_world_span(content):
        if reasoning or entries:
            # Where in the text they belong is not known, and the order is what would be learned.
            raise DataError(
                "a text with the world's words in it cannot have tool_calls or reasoning_content "
                f"too: {row!r:.200}"
            )
    elif inline:
        syntax = Hermes()
        message = read_turn(split(content, INLINE), syntax, syntax.stages())
    if reasoning.strip() and message.reasoning not in ("", reasoning.strip("\n")):
        raise DataError(f"reasoning_content and <think> in the text do not agree: {row!r:.200}")
    calls = (*message.calls, *(_openai_call(call) for call in entries))
    broken = [call.error for call in calls if call.error]
    if broken:
        raise DataError(f"{broken[0]}: {row!r:.200}")
    reasoning = reasoning or message.reasoning
    message = dataclasses.replace(message, reasoning=reasoning, calls=calls, weight=weight)
    return [message], [call.get("id") for call in entries]


def _weight(row: Mapping[str, Any], role: Role, learn: LearnConfig) -> float:
    """The weight of a message, 1 where it has none and 0 where it is marked as not learned."""
    weights = {name: row[name] for name in WEIGHT if row.get(name) is not None}
    flags = {name: row[name] for name in LEARNED if row.get(name) is not None}
    for name, value in weights.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DataError(f"the {name} of a message must be a number of 0 or more: {value!r:.80}")
    for name, value in flags.items():
        if value not in (True, False):
            raise DataError(f"{name!r} of a message must be true or false: {value!r:.80}")
        if value and role not in learn.roles:
            raise DataError(
                f"{name!r} is true in a message of the role {role}, which is not learned: add it "
                "to data.learn.roles, or remove the key"
            )
    if (
        len({bool(value) for value in (weights | flags).values()}) > 1
        or len(set(weights.values())) > 1
    ):
        raise DataError(f"{', '.join(weights | flags)} of a message do not agree: {row!r:.200}")
    return float(next(iter((weights | flags).values()), 1.0))


def _text(content: Any) -> str:
    """The text of a content that is text, absent, or a list of text parts."""
    parts = "" if content is None else content
    parts = [{"text": parts}] if isinstance(parts, str) else _as_list(parts, "content")
    texts = []
    for part in parts if isinstance(parts, list) else [parts]:
        is_text = isinstance(part, Mapping) and part.get("type") in TEXT_PARTS
        texts.append(part.get("text") if is_text else None)
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"content is neither text nor a list of text parts: {content!r:.200}")
    return "".join(texts)


def _reasoning(value: Any, name: str) -> str:
    """The reasoning under a key: text, or in `reasoning_details` a list of objects with text."""
    if name == "reasoning_details":
        parts = _as_list(value, name)
        parts = parts if isinstance(parts, list) else [parts]
        texts = [p.get("text") or p.get("summary") if isinstance(p, Mapping) else p for p in parts]
        value = "".join(texts) if all(isinstance(text, str) for text in texts) else value
    if not isinstance(value, str | None):
        raise DataError(f"{name} is not text: {value!r:.200}")
    return value or ""


def _calls(value: Any, name: str) -> list[Mapping[str, Any]]:
    """The calls of a message as they were written: a list, JSON text or columns; one object in
    OpenAI's old `function_call`."""
    calls = _as_list(value, name) if name == "tool_calls" or isinstance(value, str) else value
    if name == "function_call" and calls:
        calls = [calls]
    if not isinstance(calls or [], list) or not all(isinstance(c, Mapping) for c in calls or []):
        raise DataError(f"{name} must be a list of objects: {value!r:.200}")
    return calls or []


def _openai_call(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function") or call
    if not isinstance(function, Mapping):
        raise DataError(f"the function of a tool call is not an object: {call!r:.200}")
    name, arguments = function.get("name"), function.get("arguments")
    others = [key for key in function if key in ("parameters", "input", "args", "kwargs")]
    if arguments is None and others:
        raise DataError(f"a tool call has no arguments but {', '.join(others)}: {call!r:.200}")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}  # how calls without arguments are written, too
    if isinstance(arguments, str):
        try:
            text, arguments = arguments, WrittenArguments(**json.loads(arguments))
            arguments.text = text
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"arguments are not a JSON object: {call!r:.200}") from error
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise DataError(f"a tool call needs a name and arguments that are an object: {call!r:.200}")
    return ToolCall(name, arguments)
