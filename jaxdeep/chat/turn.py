"""How a policy's turn is read, in every chat format.

`read_turn` reads a whole turn, `StreamedTurn` one that is still being sampled; they agree on every
turn, broken ones included. Both read parts: marks, and the texts between them (`marks`). The rules:

- A turn may begin with a block of reasoning, from `<think>` to `</think>`. A `<think>` after any
  text or call is text that speaks of the tag, and so is a `</think>` after it.
- Where the prompt opened the block, the turn begins inside it.
- A `</think>` that nothing opened, in a turn that has had no block yet, means that the prompt
  opened it: all text before it is reasoning, and calls before it were only thought about. Once a
  block was closed (by the turn, or by a prompt that leaves it empty), another `</think>` is text.
- A call inside reasoning is part of the reasoning. A block that nothing closes goes to the end.
- What is between the marks of a call is read by the format's `CallSyntax`, as are calls that the
  turn's end or the next mark cuts. One that cannot be read keeps its place and says why in `error`.
- Line ends around blocks belong to the format; those at the start of the turn, to the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from jaxdeep.chat.calls import CallSyntax
from jaxdeep.chat.format import CallBegin, CallEnd, CallText, ContentText, Event, ReasoningText
from jaxdeep.chat.marks import Mark, Stage, settled
from jaxdeep.chat.tokenizer import TextDecoder, Tokenizer
from jaxdeep.types import Message, ToolCall

State = Literal["say", "think", "call"]

Block = Literal["may come", "open", "closed"]
"""What the prompt did with the block of reasoning: nothing, so that one may come; began it; or left
it empty."""


def kind_of(part: str) -> str:
    """The kind of a mark; "" for a text."""
    return part.kind if isinstance(part, Mark) else ""


def read_turn(
    parts: Iterable[str], syntax: CallSyntax, stages: Sequence[Stage], block: Block = "may come"
) -> Message:
    """The message of a policy's turn, given as its marks and the texts between them."""
    content, reasoning, calls = [""], [""], []
    call_body: list[str] = []
    state: State = "think" if block == "open" else "say"
    closed = block == "closed"  # whether another `</think>` is text
    begun = False  # whether there was a call or a text, after which no block of reasoning begins
    for part in settled(parts, stages):
        kind = kind_of(part)
        if state == "call" and kind not in ("call", "uncall"):
            call_body.append(part)
        elif state == "think" and kind != "unthink":
            reasoning[-1] += part
        elif kind == "unthink" and (state == "think" or not closed):
            if state == "say":
                reasoning += content
                content, calls, begun = [""], [], False
            state, closed = "say", True
            content.append("")
            reasoning.append("")
        elif kind == "think" and not begun:
            state = "think"
        elif kind == "call":
            begun = True
            if state == "call":
                calls += syntax.cut("".join(call_body))
            else:
                content[-1] = content[-1].removesuffix(syntax.gap)
            state, call_body = "call", []
        elif kind == "uncall" and state == "call":
            calls += syntax.read("".join(call_body))
            state = "say"
            content.append("")
        else:  # text, a `<think>` in it, and a closing mark of what is not open
            content[-1] += part
            begun |= bool(part.strip())
            closed |= kind == "think"
    if state == "call":
        calls += syntax.cut("".join(call_body))
    content = [content[0], *(text.lstrip("\n") for text in content[1:])]
    return Message(
        role="assistant",
        content="\n".join(filter(None, content)),
        reasoning="\n".join(filter(None, (text.strip("\n") for text in reasoning))),
        calls=tuple(calls),
    )


class StreamedTurn:
    """`read_turn` on tokens as they come; see `format.TurnParser`.

    What is buffered, and until when:

    - the bytes of a character that is not whole, until it is or the run of text ends;
    - line ends, until other text follows or the block ends, since those around blocks are dropped;
    - what the stages of the format hold back (`marks`): what may be the begin of a mark that is
      text, what follows a mark that may be inside a string of a call, a turn that may be a call
      without a mark;
    - if the prompt did not write the block of reasoning but the policy may:
      everything before the turn's first `<think>` or `</think>` outside a call, because a
      `</think>` makes it reasoning. A turn that begins with `<think>` waits for nothing; one that
      has no such block comes whole at its end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: Mapping[int, Mark],
        stop_ids: Sequence[int],
        syntax: CallSyntax,
        stages: Sequence[Stage],
        block: Block,
        *,
        may_think: bool = True,
    ) -> None:
        """`marks`: those that structure the turn and are control tokens, by id. `may_think`: there
        are marks of reasoning, so that a `</think>` may come which makes it of all before it."""
        self._marks = marks
        self._stop_ids = frozenset(stop_ids)
        self._decoder = TextDecoder(tokenizer)
        self._syntax = syntax
        self._stages = stages
        self._ended = False
        self._state: State = "think" if block == "open" else "say"
        self._begun = False  # as in `read_turn`
        undecided = may_think and block == "may come"
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
        for at, stage in enumerate(self._stages):
            events += self._place(self._staged(stage.flush(), at + 1))
        if self._waiting is not None:
            events += self._read_waiting()
        if self._state == "call":
            events += self._end_calls(self._syntax.cut)
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
        return self._place(self._staged([part], 0)) if part else []

    def _staged(self, parts: Iterable[str], first: int) -> Iterable[str]:
        """The parts after the stages from `first` on."""
        for stage in self._stages[first:]:
            parts = [later for part in parts for later in stage.feed(part)]
        return parts

    def _place(self, parts: Iterable[str]) -> list[Event]:
        return [event for part in parts for event in self._place_one(part)]

    def _place_one(self, part: str) -> list[Event]:
        """Reads a part, or lets it wait while what comes may make it reasoning."""
        if self._waiting is None:
            return list(self._read(part))
        self._waiting.append(part)
        kind = kind_of(part)
        if kind == "call":
            self._waits_in_call = True
        elif self._waits_in_call:
            self._waits_in_call = kind != "uncall"
        elif kind == "think":
            return self._read_waiting()
        elif kind == "unthink":
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
            if kind_of(part) == "call":
                in_call = True
            elif not in_call:
                events += self._emit("think", reasoning.add(part))
            elif kind_of(part) == "uncall":
                in_call = False
                reasoning.begin()
        self._begin("say")
        return events

    def _read(self, part: str) -> Iterator[Event]:
        """Moves on by one part, as `read_turn` does."""
        kind = kind_of(part)
        content = self._segments["say"]
        if self._state == "call" and kind not in ("call", "uncall"):
            self._call_body.append(part)
            yield CallText(len(self._calls), str(part))
        elif self._state == "think":
            if kind == "unthink":
                self._begin("say")
            else:
                yield from self._emit("think", self._segments["think"].add(part))
        elif kind == "think" and not self._begun:
            yield from self._emit("say", content.end())
            self._begin("think")
        elif kind == "call":
            self._begun = True
            if self._state == "call":
                yield from self._end_calls(self._syntax.cut)
            else:
                yield from self._emit("say", content.end(drop=len(self._syntax.gap)))
            self._state, self._call_body = "call", []
            yield CallBegin(len(self._calls))
        elif kind == "uncall" and self._state == "call":
            yield from self._end_calls(self._syntax.read)
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

    def _end_calls(self, read: Callable[[str], list[ToolCall]]) -> list[Event]:
        """The calls of the block that ends here; the first of them has begun."""
        events: list[Event] = []
        for call in read("".join(self._call_body)):
            if events:
                events.append(CallBegin(len(self._calls)))
            self._calls.append(call)
            events.append(CallEnd(len(self._calls) - 1, call))
        return events


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
