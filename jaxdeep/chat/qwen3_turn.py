"""A policy's turn in the chat format of Qwen3: its control tokens, and how it is read.

`read_turn` reads a whole turn, `Qwen3TurnParser` one that is still being sampled; they agree on
every turn, broken ones included. The rules:

- A turn may begin with a block of reasoning, from `<think>` to `</think>`. A `<think>` after any
  text or call is text that speaks of the tag, and so is a `</think>` after it.
- A `</think>` that nothing opened, in a turn that has had no block yet, means that the prompt
  opened it: all text before it is reasoning, and calls before it were only thought about. Once a
  block was closed (by the turn, or by a prompt that leaves it empty), another `</think>` is text.
- A call inside reasoning is part of the reasoning. A block that nothing closes goes to the end.
- `<tool_call>` to `</tool_call>` is one call in JSON, and either tag inside a string of that JSON
  is part of the string (`CallMarks`). A call that cannot be read, or that is not closed before the
  next begins or the turn ends, keeps its place and says why in `error`.
- Line ends around blocks belong to the format; those at the start of the turn, to the text.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NoReturn

from jaxdeep.chat.format import CallBegin, CallEnd, CallText, ContentText, Event, ReasoningText
from jaxdeep.chat.tokenizer import TextDecoder, Tokenizer
from jaxdeep.types import Message, ToolCall


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
"""The marks that structure a policy's turn, by their text."""

STRAY_TAG = re.compile(r"</?(?:think|tool_call|tool_response|im_start|im_end)\b")
"""A mark, or what a model takes for one, as it may be left over in the text of a message."""

UNCLOSED = ToolCall("", error="the tool call is not closed by </tool_call>")

State = Literal["say", "think", "call"]


def read_turn(parts: Iterable[str], *, think_closed: bool = False) -> Message:
    """The message of a policy's turn, given as its marks and the texts between them.
    `think_closed`: the prompt had a block of reasoning and closed it."""
    content, reasoning, calls = [""], [""], []
    call_body: list[str] = []
    state: State = "say"
    begun = False  # whether there was a call or a text, after which no block of reasoning begins
    for part in settled(parts):
        mark = part if isinstance(part, Mark) else None
        if state == "call" and mark not in (Mark.CALL, Mark.UNCALL):
            call_body.append(part)
        elif state == "think" and mark is not Mark.UNTHINK:
            reasoning[-1] += part
        elif mark is Mark.UNTHINK and (state == "think" or not think_closed):
            if state == "say":
                reasoning += content
                content, calls, begun = [""], [], False
            state, think_closed = "say", True
            content.append("")
            reasoning.append("")
        elif mark is Mark.THINK and not begun:
            state = "think"
        elif mark is Mark.CALL:
            begun = True
            if state == "call":
                calls.append(UNCLOSED)
            else:
                content[-1] = content[-1].removesuffix("\n")
            state, call_body = "call", []
        elif mark is Mark.UNCALL and state == "call":
            calls.append(read_call("".join(call_body)))
            state = "say"
            content.append("")
        else:  # text, a `<think>` in it, and a closing mark of what is not open
            content[-1] += part
            begun |= bool(part.strip())
            think_closed |= mark is Mark.THINK
    if state == "call":
        calls.append(UNCLOSED)
    content = [content[0], *(text.lstrip("\n") for text in content[1:])]
    return Message(
        role="assistant",
        content="\n".join(filter(None, content)),
        reasoning="\n".join(filter(None, (text.strip("\n") for text in reasoning))),
        calls=tuple(calls),
    )


def read_call(text: str) -> ToolCall:
    """The call between two marks, or what is wrong with it, in words for the model."""
    try:
        value = json.loads(text.strip(), parse_constant=_refuse)
        # Half a surrogate pair or 1e999 can be read from JSON but not written again, and a record
        # of the rollout writes it.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return ToolCall("", error=f"the tool call is not valid JSON: {error}")
    if not isinstance(value, dict):
        return ToolCall("", error="the tool call is not a JSON object")
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        return ToolCall("", error='the tool call has no "name"')
    if "arguments" not in value and len(value) > 1:
        others = ", ".join(json.dumps(key) for key in value if key != "name")
        return ToolCall(name, error=f'the tool call has no "arguments", but {others}')
    if arguments in (None, ""):  # how a call without arguments is written, too
        arguments = {}
    if not isinstance(arguments, dict):
        return ToolCall(name, error='the "arguments" of the tool call are not a JSON object')
    return ToolCall(name, arguments)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def settled(parts: Iterable[str]) -> Iterator[str]:
    """The parts of a whole turn as `CallMarks` gives them."""
    marks = CallMarks()
    for part in parts:
        yield from marks.feed(part)
    yield from marks.flush()


class CallMarks:
    """Decides which `<tool_call>` and `</tool_call>` are tags: the parts of a turn as they come,
    with those inside a string of a call's JSON made part of that text.

    A mark where a string is open is in doubt: the quote that opened the string may be a mistake.
    It, and what follows, is held back until the string ends and a `</tool_call>` comes. If all up
    to there is a JSON object, the marks in doubt were text; otherwise, and where the string can
    never end (JSON allows no line end in it), the first of them was a tag after all.
    """

    def __init__(self) -> None:
        self._json: _OpenString | None = None  # of the call that is open
        self._body: list[str] = []  # of that call
        self._held: list[str] = []  # from the first mark in doubt on

    def feed(self, part: str) -> list[str]:
        """The parts that are decided after this one."""
        out: list[str] = []
        coming = collections.deque([part])
        while coming:
            part = coming.popleft()
            is_mark = isinstance(part, Mark) and part in (Mark.CALL, Mark.UNCALL)
            in_doubt = is_mark and self._json is not None and self._json.inside
            if is_mark and not in_doubt:
                if self._held:
                    if part is Mark.UNCALL and _is_object("".join(self._body)):
                        out.append("".join(self._held))
                        self._held = []
                    else:
                        coming.extendleft(reversed([*self._give_up(out), part]))
                        continue
                self._open(part)
                out.append(part)
                continue
            if self._json is not None:
                self._json.read(part)
                self._body.append(part)
            if self._held or in_doubt:
                self._held.append(part)
                if self._json.broken:
                    coming.extendleft(reversed(self._give_up(out)))
            else:
                out.append(part)
        return out

    def flush(self) -> list[str]:
        """What was held back, when the turn ends here."""
        out: list[str] = []
        while self._held:
            for part in self._give_up(out):
                out += self.feed(part)
        return out

    def _give_up(self, out: list[str]) -> list[str]:
        """The first mark in doubt is a tag: adds it to `out`; the parts to be read again after
        it."""
        (first, *rest), self._held = self._held, []
        self._open(first)
        out.append(first)
        return rest

    def _open(self, mark: str) -> None:
        self._json, self._body = (_OpenString() if mark is Mark.CALL else None), []


class _OpenString:
    """Whether JSON text that comes bit by bit ends inside a string; `broken` where it cannot be
    JSON."""

    _SIGN = re.compile(r'["\\\x00-\x1f]')

    def __init__(self) -> None:
        self._open = self._escaped = self.broken = False

    @property
    def inside(self) -> bool:
        return self._open and not self.broken

    def read(self, text: str) -> None:
        """More of the text."""
        at = int(self._escaped and bool(text))
        self._escaped &= not text
        while not self.broken and (sign := self._SIGN.search(text, at)):
            at = sign.end()
            if sign[0] == '"':
                self._open = not self._open
            elif sign[0] == "\\" and self._open:
                self._escaped = at == len(text)
                at += 1
            elif sign[0] == "\\" or self._open:
                self.broken = True


def _is_object(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(text), dict)
    return False


class Qwen3TurnParser:
    """`read_turn` on tokens as they come; see `format.TurnParser`.

    What is buffered, and until when:

    - the bytes of a character that is not whole, until it is or the run of text ends;
    - line ends, until other text follows or the block ends, since those around blocks are dropped;
    - what follows a mark that may be inside a string of a call (`CallMarks`);
    - if the prompt did not write the block of reasoning but the policy may (thinking "write"):
      everything before the turn's first `<think>` or `</think>` outside a call, because a
      `</think>` makes it reasoning. A turn that begins with `<think>` waits for nothing; one that
      has no such block comes whole at its end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: Mapping[int, Mark],
        stop_ids: Sequence[int],
        *,
        undecided: bool,
    ) -> None:
        """`marks`: those that structure the turn, by id. `undecided`: a `</think>` that makes
        reasoning of all before it may come."""
        self._marks = marks
        self._stop_ids = frozenset(stop_ids)
        self._decoder = TextDecoder(tokenizer)
        self._call_marks = CallMarks()
        self._ended = False
        self._state: State = "say"
        self._begun = False  # as in `read_turn`
        self._waiting: list[str] | None = [] if undecided else None  # parts not yet read
        self._waits_in_call = False  # whether the last of them is inside a call
        self._call_body: list[str] = []
        self._segments = {"say": _Segments(strip_first=False), "think": _Segments(strip_first=True)}
        self._texts: dict[str, list[str]] = {"say": [], "think": []}  # of the events so far
        self._calls: list[ToolCall] = []

    def feed(self, tokens: Sequence[int]) -> list[Event]:
        """What the next tokens add."""
        events: list[Event] = []
        for special, run in itertools.groupby(tokens, key=self._is_special):
            if self._ended:
                break
            if not special:
                events += self._take(self._decoder.feed(run))
                continue
            for token in run:
                if token in self._stop_ids:
                    events += self.flush()
                    break
                # A character that a mark cuts in two will never be whole.
                events += self._take(self._decoder.flush())
                events += self._take(self._marks[token])
        return events

    def flush(self) -> list[Event]:
        """What was buffered, when the turn ends here."""
        if self._ended:
            return []
        self._ended = True
        events = self._take(self._decoder.flush())
        events += self._place(self._call_marks.flush())
        if self._waiting is not None:
            events += self._read_waiting()
        if self._state == "call":
            events.append(self._end_call(UNCLOSED))
        elif self._state == "say":
            events += self._emit("say", self._segments["say"].end())
        return events

    def finish(self) -> Message:
        """The whole message."""
        self.flush()
        return Message(
            role="assistant",
            content="".join(self._texts["say"]),
            reasoning="".join(self._texts["think"]),
            calls=tuple(self._calls),
        )

    def _is_special(self, token: int) -> bool:
        return token in self._marks or token in self._stop_ids

    def _take(self, part: str) -> list[Event]:
        """Reads a mark or some text, as far as it is decided what it belongs to."""
        return self._place(self._call_marks.feed(part)) if part else []

    def _place(self, parts: Iterable[str]) -> list[Event]:
        return [event for part in parts for event in self._place_one(part)]

    def _place_one(self, part: str) -> list[Event]:
        """Reads a part, or lets it wait while what comes may make it reasoning."""
        if self._waiting is None:
            return list(self._read(part))
        self._waiting.append(part)
        mark = part if isinstance(part, Mark) else None
        if mark is Mark.CALL:
            self._waits_in_call = True
        elif self._waits_in_call:
            self._waits_in_call = mark is not Mark.UNCALL
        elif mark is Mark.THINK:
            return self._read_waiting()
        elif mark is Mark.UNTHINK:
            return self._reason_waiting()
        return []

    def _read_waiting(self) -> list[Event]:
        """Reads the parts that waited as content and calls."""
        parts, self._waiting = self._waiting, None
        return [event for part in parts for event in self._read(part)]

    def _reason_waiting(self) -> list[Event]:
        """The prompt opened a block of reasoning: the text that waited is in it, its calls are
        gone."""
        (*parts, _), self._waiting = self._waiting, None
        reasoning, events = self._segments["think"], []
        in_call = False
        for part in parts:
            if part is Mark.CALL:
                in_call = True
            elif not in_call:
                events += self._emit("think", reasoning.add(part))
            elif part is Mark.UNCALL:
                in_call = False
                reasoning.begin()
        self._begin("say")
        return events

    def _read(self, part: str) -> Iterator[Event]:
        """Moves on by one part, as `read_turn` does."""
        mark = part if isinstance(part, Mark) else None
        content = self._segments["say"]
        if self._state == "call" and mark not in (Mark.CALL, Mark.UNCALL):
            self._call_body.append(part)
            yield CallText(len(self._calls), str(part))
        elif self._state == "think":
            if mark is Mark.UNTHINK:
                self._begin("say")
            else:
                yield from self._emit("think", self._segments["think"].add(part))
        elif mark is Mark.THINK and not self._begun:
            yield from self._emit("say", content.end())
            self._begin("think")
        elif mark is Mark.CALL:
            self._begun = True
            if self._state == "call":
                yield self._end_call(UNCLOSED)
            else:
                yield from self._emit("say", content.end(drop=1))
            self._state, self._call_body = "call", []
            yield CallBegin(len(self._calls))
        elif mark is Mark.UNCALL and self._state == "call":
            yield self._end_call(read_call("".join(self._call_body)))
            self._begin("say")
        else:
            self._begun |= bool(part.strip())
            yield from self._emit("say", content.add(part))

    def _begin(self, state: Literal["say", "think"]) -> None:
        self._state = state
        self._segments[state].begin()

    def _emit(self, kind: Literal["say", "think"], text: str) -> list[Event]:
        if not text:
            return []
        self._texts[kind].append(text)
        return [ContentText(text) if kind == "say" else ReasoningText(text)]

    def _end_call(self, call: ToolCall) -> CallEnd:
        self._calls.append(call)
        return CallEnd(len(self._calls) - 1, call)


class _Segments:
    """The text between blocks as it comes, one segment after another: those that are not empty are
    joined by a line end, and line ends at the start of a segment are dropped (of the first one with
    `strip_first`). Line ends at its end are buffered until `end` says how many are dropped; those
    of a segment that is followed by another without an `end` all are."""

    def __init__(self, *, strip_first: bool) -> None:
        self._at_start = strip_first  # of a segment whose line ends there are dropped
        self._joint = ""  # what comes before the segment's first text
        self._any = False  # whether any segment had text
        self._line_ends = 0  # buffered

    def begin(self) -> None:
        """The next segment."""
        self._at_start = True
        self._joint = "\n" if self._any else ""
        self._line_ends = 0

    def add(self, text: str) -> str:
        """What is certain of the segment with this text, beyond what was before."""
        if self._at_start:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        line_ends = len(text) - len(body)
        if not body:
            self._line_ends += line_ends
            return ""
        out = self._joint + "\n" * self._line_ends + body
        self._at_start, self._joint, self._any, self._line_ends = False, "", True, line_ends
        return out

    def end(self, drop: int = 0) -> str:
        """The line ends that were buffered, but for `drop` of them."""
        kept = max(self._line_ends - drop, 0)
        self._line_ends = 0
        if not kept:
            return ""
        out = self._joint + "\n" * kept
        self._joint, self._any = "", True
        return out
