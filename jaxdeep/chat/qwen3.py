"""Conversations to token ids and sampled ids back to messages, in the chat format of Qwen3.

Two renderings are made of the same parts, of which only a `Mark` can become a control token:

- published (`render`, `encode_published`): byte for byte the template shipped with the models; it
  drops reasoning from history. For comparing with others, not for training.
- append-only (`opening`, `reply`, `pieces`): reasoning stays, so that every turn is a prefix of the
  next, each token has one author, and contents are encoded plain: a web page that says `<|im_end|>`
  stays text. Rollouts and the data of SFT use this one.

    world    <|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n
    policy   <think>\\n ... \\n</think>\\n\\n ... <tool_call>\\n ... \\n</tool_call><|im_end|>
    world    \\n<|im_start|>user\\n<tool_response>\\n ... \\n</tool_response><|im_end|>\\n
             <|im_start|>assistant\\n

`parse` reads a policy turn by its control token ids. Others' traces are read in `formats`.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

from jaxdeep.chat.learn import PLAIN, LearnConfig, Weighed
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Message, Piece, Role, ToolCall

Thinking = Literal["write", "skip", "none"]
Tools = Sequence[Mapping[str, Any]]


class Mark(enum.StrEnum):
    """The control tokens of the format."""

    START = "<|im_start|>"
    END = "<|im_end|>"
    EOT = "<|endoftext|>"
    THINK = "<think>"
    UNTHINK = "</think>"
    CALL = "<tool_call>"
    UNCALL = "</tool_call>"
    RESULT = "<tool_response>"
    UNRESULT = "</tool_response>"


INSIDE = {str(mark): mark for mark in (Mark.THINK, Mark.UNTHINK, Mark.CALL, Mark.UNCALL)}
"""The marks that structure an assistant's turn."""

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within ",
    *(Mark.CALL, Mark.UNCALL, " XML tags:\n", Mark.CALL),
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
    Mark.UNCALL,
)


class Chat:
    """The format over a tokenizer. `thinking` says who writes the think block of a turn: the policy
    ("write"), the generation prompt, empty ("skip"), or nobody ("none": the 2507 instruct models).

    `tools_in_prompt=False` leaves the schemas of tools out, for a policy that was taught them.
    """

    def __init__(
        self, tokenizer: Tokenizer, thinking: Thinking = "write", *, tools_in_prompt: bool = True
    ) -> None:
        if thinking not in get_args(Thinking):
            raise ConfigError(f"{thinking=}: choose one of {', '.join(get_args(Thinking))}")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.tools_in_prompt = tools_in_prompt
        without = (Mark.THINK, Mark.UNTHINK) if thinking == "none" else ()
        self._ids = {mark: tokenizer.id(mark) for mark in Mark if mark not in without}
        self._inside = {id: mark for mark, id in self._ids.items() if mark in INSIDE}
        self._prompt = [Mark.START, "assistant\n", *(_think("") if thinking == "skip" else ())]
        self.stop_ids = (self._ids[Mark.END], self._ids[Mark.EOT])

    def render(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False
    ) -> str:
        """The text of the published template; `generate` adds its generation prompt."""
        start, turns = _start(messages, tools)
        parts = _plain(start)
        query = _last_query(turns)
        seen = 0
        for role, run in _runs(turns):
            if role != "assistant":
                parts += _plain(_world(role, run))
            else:
                for index, turn in enumerate(run, seen):
                    body = self._published(turn, index > query, index == len(turns) - 1)
                    parts += [Mark.START, "assistant\n", *body, Mark.END, "\n"]
            seen += len(run)
        return "".join(parts + self._prompt if generate else parts)

    def encode_published(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False
    ) -> list[int]:
        """The ids of `render` as others compute them: contents can forge control tokens here."""
        return self.tokenizer.encode_control(self.render(messages, tools, generate=generate))

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt of the next policy turn: the conversation so far and the generation prompt."""
        pieces, rest = self._split(messages, tools)
        ids = [id for piece in pieces for id in piece.tokens]
        return ids + self._encode(_plain(rest) + self._prompt)

    def reply(self, messages: Sequence[Message], *, closed: bool = True) -> list[int]:
        """What the world appends to a policy turn: the rest of that turn, its own messages, and the
        next generation prompt. `closed=False`: the turn was cut before its `<|im_end|>`.
        """
        parts: list[str] = ["\n"] if closed else [Mark.END, "\n"]
        for role, run in _runs(messages):
            if role == "assistant":
                raise DataError(f"an assistant's message is no reply of the world: {run[0]!r:.200}")
            parts += _plain(_world(role, run))
        return self._encode(parts + self._prompt)

    def pieces(
        self, messages: Sequence[Message], tools: Tools = (), learn: LearnConfig = PLAIN
    ) -> list[Piece]:
        """A whole conversation by author: an assistant's text and its end are the policy's, but for
        spans in it that `learn` knows as the world's. Tokens whose weight is not the usual one (1 for
        the policy, 0 for the world) have `weights`.

        With thinking "write" every such turn has a think block, empty where the message has no
        reasoning; with "skip" and "none" reasoning is left out.
        """
        pieces, rest = self._split(messages, tools, learn)
        if len(rest) > 1:  # more than the line end after a policy turn
            pieces.append(self._piece(rest, "world"))
        return pieces

    def parse(self, tokens: Sequence[int]) -> Message:
        """The message a policy turn says, read up to its first stop token. Never raises.

        Reasoning is what stands before `</think>`, or after a `<think>` that nothing closes: no
        call is read from it. A call that cannot be read keeps its place and says why in `error`.
        """
        segments: list[str] = []
        turn = itertools.takewhile(lambda id: id not in self.stop_ids, tokens)
        for marked, run in itertools.groupby(turn, key=self._inside.__contains__):
            if marked:
                segments += [self._inside[id] for id in run]
            else:
                segments.append(self.tokenizer.decode(list(run)))
        return read_turn(segments)

    def _split(
        self, messages: Sequence[Message], tools: Tools, learn: LearnConfig = PLAIN
    ) -> tuple[list[Piece], list[Weighed]]:
        """The pieces up to the last policy turn, and the parts of the world after it."""
        pieces: list[Piece] = []
        world, turns = _start(messages, tools if self.tools_in_prompt else (), learn)
        for role, run in _runs(turns):
            if role != "assistant":
                world += _world(role, run, learn)
                continue
            for turn in run:
                pieces.append(self._piece([*world, *_free(self._prompt)], "world"))
                pieces += self._turn(turn, learn)
                world = _free(["\n"])
        return pieces, world

    def _turn(self, turn: Message, learn: LearnConfig) -> list[Piece]:
        """An assistant's turn: one piece of the policy, or its text between spans of the world."""
        base = _weight(turn, learn)
        if not learn.of_world(turn.content):
            return [self._piece(learn.weigh(self._written(turn), base), "policy")]
        pieces, parts = [], learn.authored(turn.content)
        for index, (text, world) in enumerate(parts):
            end = [Mark.END] if index == len(parts) - 1 else []
            if world:  # after it the policy would have gone on: an end is not its choice
                pieces.append(self._piece(_free([text, *end]), "world"))
            else:
                said = [*self._verbatim(text, index == 0), *end]
                pieces.append(self._piece(learn.weigh(said, base), "policy"))
        return pieces

    def _verbatim(self, text: str, first: bool) -> list[str]:
        """The parts of an assistant's text as it stands, its tags as control tokens."""
        if self.thinking != "write":
            text = re.sub(rf"{Mark.THINK}.*?{Mark.UNTHINK}\s*", "", text, flags=re.DOTALL)
        inside = {str(mark): mark for mark in self._inside.values()}
        said = [inside.get(part, part) for part in re.split(f"({'|'.join(inside)})", text) if part]
        if first and self.thinking == "write" and not text.lstrip().startswith(Mark.THINK):
            return [*_think(""), *said]
        return said

    def _written(self, turn: Message) -> list[str]:
        """The parts of an assistant's turn as the policy writes it."""
        think = _think(turn.reasoning) if self.thinking == "write" else []
        content = turn.content if self.thinking == "none" else turn.content.lstrip("\n")
        return [*think, content, *_calls(turn.calls, content), Mark.END]

    def _published(self, turn: Message, current: bool, last: bool) -> list[str]:
        """The parts of an assistant's turn as the template writes it, without its `<|im_end|>`.

        `current`: it comes after the user's last question.
        """
        content, reasoning = turn.content, turn.reasoning
        if self.thinking == "none":
            return [content, *_calls(turn.calls, content)]
        if not reasoning and Mark.UNTHINK in content:
            head = content.split(Mark.UNTHINK)[0].rstrip("\n")
            reasoning = head.split(Mark.THINK)[-1].lstrip("\n")
            content = content.split(Mark.UNTHINK)[-1].lstrip("\n")
        calls = _calls(turn.calls, content)
        if current and (last or reasoning):
            return [*_think(reasoning), content.lstrip("\n"), *calls]
        return [content, *calls]

    def _encode(self, parts: Iterable[str]) -> list[int]:
        """Marks by id; everything between two of them joined and encoded as plain text."""
        return self._piece(_free(parts), "world").tokens

    def _piece(self, parts: Iterable[Weighed], author: Literal["policy", "world"]) -> Piece:
        """The parts encoded: marks by id, everything between two of them joined, as plain text."""
        ids: list[int] = []
        weights: list[float] = []
        for kind, run in itertools.groupby(parts, key=lambda part: type(part[0])):
            texts, given = zip(*run, strict=True)
            if kind is Mark:
                ids += [self._ids[mark] for mark in texts]
                weights += given
            elif len(set(given)) == 1:
                found = self.tokenizer.encode("".join(texts))
                ids += found
                weights += [given[0]] * len(found)
            else:
                found, starts = self.tokenizer.encode_starts("".join(texts))
                ends = list(itertools.accumulate(map(len, texts)))
                ids += found
                weights += [given[bisect.bisect_right(ends, start)] for start in starts]
        usual = float(author == "policy")
        return Piece(ids, author, None, None if set(weights) <= {usual} else weights)


def _runs(turns: Sequence[Message]) -> Iterator[tuple[Role, list[Message]]]:
    """Neighbours of one role together: consecutive tool results share one turn."""
    for role, run in itertools.groupby(turns, key=lambda turn: turn.role):
        yield role, list(run)


def _plain(parts: Iterable[Weighed]) -> list[str]:
    return [part for part, _ in parts]


def _free(parts: Iterable[str]) -> list[Weighed]:
    """Parts of which nothing is learned."""
    return [(part, 0.0) for part in parts]


def _start(
    messages: Sequence[Message], tools: Tools, learn: LearnConfig = PLAIN
) -> tuple[list[Weighed], Sequence[Message]]:
    """The parts of the system turn (a first system message, the tools), and the turns after it."""
    parts: list[Weighed] = []
    weight = 0.0
    if messages and messages[0].role == "system":
        weight = _weight(messages[0], learn)
        parts = [(messages[0].content, weight), *_free(["\n\n"] if tools else [])]
        messages = messages[1:]
    if tools:
        parts += _free([TOOLS_HEAD, *(f"\n{_dump(tool)}" for tool in tools), *TOOLS_TAIL])
    if not parts:
        return [], messages
    return [*_free([Mark.START, "system\n"]), *parts, (Mark.END, weight), ("\n", 0.0)], messages


def _world(role: Role, run: list[Message], learn: LearnConfig = PLAIN) -> list[Weighed]:
    """The parts of neighbouring turns of one role that is not the assistant's."""
    parts: list[Weighed] = []
    if role == "tool":
        for turn in run:
            said = [f"{turn.content}\n", Mark.UNRESULT]
            parts += _free(["\n", Mark.RESULT, "\n"])
            parts += [(part, _weight(turn, learn)) for part in said]
        return [*_free([Mark.START, "user"]), *parts, *_free([Mark.END, "\n"])]
    for turn in run:
        parts += _free([Mark.START, f"{role}\n"])
        parts += [(part, _weight(turn, learn)) for part in (turn.content, Mark.END)]
        parts += _free(["\n"])
    return parts


def _weight(turn: Message, learn: LearnConfig) -> float:
    return turn.weight if turn.role in learn.roles else 0.0


def _think(reasoning: str) -> list[str]:
    text = reasoning.strip("\n")
    return [Mark.THINK, f"\n{text}\n", Mark.UNTHINK, "\n\n"]


def _calls(calls: Sequence[ToolCall], content: str) -> list[str]:
    """The parts of a turn's calls after its content, one line end between what there is."""
    parts: list[str] = []
    for call in calls:
        if call.error:
            raise DataError(f"a tool call that could not be read cannot be written: {call}")
        if content or parts:
            parts.append("\n")
        text = f'\n{{"name": "{call.name}", "arguments": {_dump(call.arguments)}}}\n'
        parts += [Mark.CALL, text, Mark.UNCALL]
    return parts


def _last_query(turns: Sequence[Message]) -> int:
    """Where the last user turn is that is no tool result: the template keeps reasoning after it."""
    for index in reversed(range(len(turns))):
        text = turns[index].content
        result = text.startswith(Mark.RESULT) and text.endswith(Mark.UNRESULT)
        if turns[index].role == "user" and not result:
            return index
    return len(turns)


class Written(dict):
    """Arguments that came as JSON text and are rendered letter by letter, as the template does."""

    text = ""


def _dump(value: Mapping[str, Any]) -> str:
    return getattr(value, "text", "") or json.dumps(dict(value), ensure_ascii=False)


UNCLOSED = ToolCall("", error="the tool call is not closed by </tool_call>")


def read_turn(segments: Iterable[str]) -> Message:
    """An assistant's message from its marks and the texts between them."""
    said, thought, calls = [""], [""], []
    body: list[str] = []  # of the call being read
    state: Literal["say", "think", "call"] = "say"
    for part in segments:
        mark = part if isinstance(part, Mark) else None
        if state == "call" and mark not in (Mark.CALL, Mark.UNCALL):
            body.append(part)
        elif state == "think" and mark is not Mark.UNTHINK:
            thought[-1] += part  # a call in here is thought about, not made
        elif mark is Mark.UNTHINK:
            if state == "say":  # the prompt opened it, so all before it was reasoning
                thought += said
                said, calls = [""], []
            state = "say"
            said.append("")
            thought.append("")
        elif mark is Mark.THINK:
            state = "think"
        elif mark is Mark.CALL:
            if state == "call":
                calls.append(UNCLOSED)
            else:
                said[-1] = said[-1].removesuffix("\n")
            state, body = "call", []
        elif mark is Mark.UNCALL and state == "call":
            calls.append(_call("".join(body)))
            state = "say"
            said.append("")
        else:
            said[-1] += part
    if state == "call":
        calls.append(UNCLOSED)
    # The line ends after a block belong to the format, those at the start of the turn to the text.
    texts = [said[0], *(text.lstrip("\n") for text in said[1:])]
    return Message(
        role="assistant",
        content="\n".join(filter(None, texts)),
        reasoning="\n".join(filter(None, (text.strip("\n") for text in thought))),
        calls=tuple(calls),
    )


def _call(text: str) -> ToolCall:
    """The call a `<tool_call>` block says, or what is wrong with it, in words for the model."""
    try:
        value = json.loads(text.strip(), parse_constant=_refuse)
        # half a surrogate pair, or 1e999, breaks who writes it
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return ToolCall("", error=f"the tool call is not valid JSON: {error}")
    if not isinstance(value, dict):
        return ToolCall("", error="the tool call is not a JSON object")
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        return ToolCall("", error='the tool call has no "name"')
    if not isinstance(arguments, dict):
        return ToolCall(name, error='the "arguments" of the tool call are not a JSON object')
    return ToolCall(name, arguments)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
