"""Conversations in others' formats to messages: OpenAI's `messages`, ShareGPT's `conversations`,
traces with inline tags, and the layout of DR-Tulu, in which the output of tools is inside the
assistant's text.

A row that cannot be read is a DataError with the row in it: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from jaxdeep.chat.format import WrittenArguments
from jaxdeep.chat.learn import PLAIN, LearnConfig
from jaxdeep.chat.qwen3_turn import INSIDE, Mark, read_turn
from jaxdeep.errors import DataError
from jaxdeep.types import Message, Role, ToolCall

SHAREGPT_ROLES = dict(
    system="system",
    human="user",
    gpt="assistant",
    function_call="assistant",
    observation="tool",
    tool="tool",
)


def read(row: Any, learn: LearnConfig = PLAIN) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """The messages and tool schemas of one row of data. Its lists may also come as JSON text, or as
    one object of equally long lists, as tables store them. DataError: the row cannot be read."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, found {row!r:.80}")
    tools = _as_list(row.get("tools") or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools must be a list of objects, found {tools!r:.80}")
    tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    if isinstance(turns := _as_list(row.get("messages"), "messages"), list):
        return messages_from_openai(turns, inline=True, learn=learn), tools
    if isinstance(turns := _as_list(row.get("conversations"), "conversations"), list):
        return messages_from_sharegpt(turns, inline=True, learn=learn), tools
    raise DataError(f"a row needs a list of messages or conversations, found {', '.join(row)}")


def _as_list(value: Any, name: str) -> Any:
    """JSON text read, and an object of columns as a list of rows; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value) or []
        except (ValueError, RecursionError) as error:
            raise DataError(f"the text of {name} is not JSON: {error}") from error
    if isinstance(value, Mapping) and value and all(isinstance(x, list) for x in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise DataError(f"the columns of {name} differ in length: {value!r:.200}")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


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
            new = _messages(row, inline, learn)
        except DataError as error:
            raise DataError(f"message {index}: {error}") from error
        for message in new:
            if message.role == "assistant":
                unanswered = [call.name for call in message.calls]
                # Calls in the text come first, and only the dictionary's own have ids.
                ids = [call.get("id") for call in row.get("tool_calls") or ()]
                names |= zip(ids, unanswered[-len(ids) :], strict=False)
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
        message: dict[str, Any] = {"role": SHAREGPT_ROLES[speaker], "content": row["value"]}
        message["weight"] = row.get("weight")
        if speaker == "function_call":
            try:
                calls = json.loads(row["value"])
            except ValueError as error:
                raise DataError(f"message {index}: the call is not JSON: {row!r:.200}") from error
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        converted.append(message)
    return messages_from_openai(converted, inline=inline, learn=learn)


def _messages(row: Mapping[str, Any], inline: bool, learn: LearnConfig) -> list[Message]:
    """One OpenAI dictionary: one message, or several where a turn is several results."""
    if not isinstance(row, Mapping) or row.get("role") not in get_args(Role):
        known = ", ".join(get_args(Role))
        raise DataError(f"expected a dictionary with a role of {known}: {row!r:.200}")
    role, content, weight = row["role"], _text(row.get("content")), _weight(row.get("weight"))
    reasoning = row.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise DataError(f"reasoning_content is not text: {reasoning!r:.200}")
    text = content.strip()
    if (
        inline
        and role in ("user", "tool")
        and text.startswith(Mark.RESULT)
        and text.endswith(Mark.UNRESULT)
    ):
        inner = text.removeprefix(Mark.RESULT).removesuffix(Mark.UNRESULT)
        results = re.split(rf"{Mark.UNRESULT}\s*{Mark.RESULT}", inner)
        # One line end on each side is the format's, as `pieces` writes it; more belong to the
        # result.
        results = [result.removeprefix("\n").removesuffix("\n") for result in results]
        return [Message("tool", result, weight=weight) for result in results]
    if role != "assistant":
        name = row.get("name") or "" if role == "tool" else ""
        return [Message(role, content, name=name, weight=weight)]
    message = Message("assistant", content)
    if inline and learn.has_world_span(content):
        if reasoning or row.get("tool_calls"):
            # Where in the text they belong is not known, and the order is what would be learned.
            raise DataError(
                "a text with the world's words in it cannot have tool_calls or reasoning_content "
                f"too: {row!r:.200}"
            )
    elif inline:
        message = read_turn(INSIDE.get(p, p) for p in re.split(f"({'|'.join(INSIDE)})", content))
    calls = (*message.calls, *(_openai_call(call) for call in row.get("tool_calls") or ()))
    broken = [call.error for call in calls if call.error]
    if broken:
        raise DataError(f"{broken[0]}: {row!r:.200}")
    reasoning = reasoning or message.reasoning
    return [dataclasses.replace(message, reasoning=reasoning, calls=calls, weight=weight)]


def _weight(value: Any) -> float:
    """The weight of a message, 1 where it has none."""
    if value is None:
        return 1.0
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise DataError(f"the weight of a message must be a number of 0 or more: {value!r:.80}")
    return float(value)


def _text(content: Any) -> str:
    """The text of a content that is text, absent, or a list of text parts."""
    parts = content if isinstance(content, list) else [{"text": "" if content is None else content}]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"content is neither text nor a list of text parts: {content!r:.200}")
    return "".join(texts)


def _openai_call(call: Any) -> ToolCall:
    function = (call.get("function") or call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        try:
            text, arguments = arguments, WrittenArguments(**json.loads(arguments))
            arguments.text = text
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"arguments are not a JSON object: {call!r:.200}") from error
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        raise DataError(f"a tool call needs a name and arguments that are an object: {call!r:.200}")
    return ToolCall(name, arguments)
