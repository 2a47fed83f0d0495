"""What all chat formats share: conversations to token ids by author, and sampled ids back.

A format says with which parts a turn of each role begins and ends; the rest is here. Contents are
encoded as plain text, so that nothing in them can become a control token. A mark that is text,
because the tokenizer has no token for it, could be imitated: there, what a content has of it is
encoded letter by letter, so that the ids of the mark never come from a content. What remains is
that a model may read the letters as the mark all the same, and that a policy's own turn may say
any of them.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from jaxdeep.chat.calls import CallSyntax, Content, Hermes
from jaxdeep.chat.format import Author, Span, Thinking, Tools
from jaxdeep.chat.learn import PLAIN, LearnConfig, WeightedPart
from jaxdeep.chat.marks import INSIDE, BareCall, Lead, Mark, Stage, TextMarks, any_of, split
from jaxdeep.chat.spans import Spans
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.chat.turn import Block, StreamedTurn, read_turn
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Message, Piece, Role

LEADING_THOUGHTS = re.compile(r"(?:\s*<think>(?:(?!</think>).)*(?:</think>\s*|\Z))*", re.DOTALL)
"""The blocks of reasoning that a text begins with; the last may be open to its end."""


class ThinkMark(Mark):
    THINK = "<think>"
    UNTHINK = "</think>"


class TurnChat:
    """The shared half of every `ChatFormat`; a family fills in what is below.

    `thinking`: who writes the block of reasoning. `calls`: how tools are called, where it is not
    the family's own way. `tools_in_prompt=False` leaves the schemas of tools out, for a policy that
    was taught its tools. `guarded=False` encodes contents as others do, also where they imitate a
    mark that is text. `default_system` is said where a conversation has no system message.

    ConfigError: a way of thinking that the format does not have, or marks that cannot be guarded.
    DataError: the tokenizer lacks a control token that is needed.
    """

    family: ClassVar[str]
    marks: ClassVar[tuple[Mark, ...]]
    """The family's marks but those of its calls."""
    needed: ClassVar[tuple[Mark, ...]]
    """Those that must be control tokens; others may be text."""
    ways: ClassVar[tuple[Thinking, ...]] = ("none",)
    opens_block = False
    """Whether with thinking "write" the prompt begins the block."""
    block_begin = "\n"
    """What stands between `<think>` and the reasoning."""
    lead = ""
    """What stands before a turn's text; at most one character."""
    after: ClassVar[tuple[str, ...]] = ()
    """The parts that the world adds to a policy's turn before anything else."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: Thinking = "write",
        *,
        tools_in_prompt: bool = True,
        calls: CallSyntax | None = None,
        guarded: bool = True,
        default_system: str = "",
    ) -> None:
        if thinking not in self.ways:
            raise ConfigError(
                f"model.thinking={thinking!r}: the chat format {self.family} "
                + (
                    "has no block of reasoning: set model.thinking=none"
                    if self.ways == ("none",)
                    else f"has none such: choose one of {', '.join(self.ways)}"
                )
            )
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.tools_in_prompt = tools_in_prompt
        self.calls = calls or self.own_calls()
        self.default_system = default_system
        self._learn_ids(guarded)
        self._skipped = self._block("") if thinking == "skip" else []
        self._opened = thinking == "write" and self.opens_block
        self._block_state: Block = (
            "open" if self._opened else "closed" if thinking == "skip" else "may come"
        )
        self._prompt = [
            *self.header("assistant"),
            *([ThinkMark.THINK, self.block_begin] if self._opened else self._skipped),
        ]

    # what a family fills in

    def own_calls(self) -> CallSyntax:
        """How the family's models call tools; Hermes where nothing is published."""
        return Hermes()

    def begin(self) -> list[str]:
        """The parts before everything else."""
        return []

    def header(self, role: str) -> list[str]:
        """The parts that begin a turn. `role` is one of `Role`, or the `result_role` of calls."""
        raise NotImplementedError

    def footer(self, role: str) -> list[str]:
        """The parts that end a turn of the world: the first is learned with the turn."""
        raise NotImplementedError

    def ends(self) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        """The marks with which a policy ends its turn, the usual one first, and those with which it
        ends a document."""
        raise NotImplementedError

    def shown(self, message: Message) -> str:
        """The content of a message as the format says it."""
        return message.content

    def system_parts(
        self, message: Message | None, tools: Tools, learn: LearnConfig
    ) -> list[WeightedPart]:
        """The parts of the system's turn; none where it would be empty."""
        parts, weight = self.system_content(message, tools, learn)
        return self.framed("system", parts, weight) if parts else []

    # conversations to ids

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt of the next policy turn: the conversation so far and the generation prompt."""
        pieces, rest = self._render(messages, tools)
        ids = [id for piece in pieces for id in piece.tokens]
        return ids + self._encode([*texts(rest), *self._prompt])

    def reply(self, messages: Sequence[Message], *, closed: bool = True) -> list[int]:
        """What the world appends to a policy turn: the rest of that turn, its own messages, and the
        next generation prompt. `closed=False`: the turn was cut before its end.
        """
        # A line end after the end of a turn is the template's, and no policy samples it: stopping
        # comes first. Training that leaves it out sees other tokens than the published format has.
        parts: list[str] = [] if closed else [self.ends()[0][0]]
        parts += self.after
        for role, run in runs(messages):
            if role == "assistant":
                raise DataError(
                    f"the world cannot reply with an assistant's message: {run[0]!r:.200}"
                )
            parts += texts(self.world_parts(role, run))
        return self._encode([*parts, *self._prompt])

    def pieces(
        self, messages: Sequence[Message], tools: Tools = (), learn: LearnConfig = PLAIN
    ) -> list[Piece]:
        """A whole conversation by author: an assistant's text and its end are the policy's, except
        for spans in it that `learn` names as the world's. A piece has `weights` where a token's is
        not the usual one, 1 for the policy and 0 for the world.

        With thinking "write" every such turn has a think block, empty where the message has no
        reasoning; with "skip" and "none" reasoning is left out.
        """
        pieces, rest = self._render(messages, tools, learn)
        if texts(rest) != list(self.after):  # more than the line end after a policy turn
            pieces.append(self._piece(rest, "world"))
        return [piece for piece in pieces if piece.tokens]

    def encode_turn(self, text: str) -> list[int]:
        """The ids of a policy turn with its end token; control tokens in the text count."""
        return self.tokenizer.encode_control(f"{text}{self.ends()[0][0]}")

    # ids to messages

    def parse(self, tokens: Sequence[int]) -> Message:
        """The message that a policy turn says, read up to its first stop token. Never raises; how
        it is read is in `turn`."""
        parts: list[str] = []
        turn = itertools.takewhile(lambda id: id not in self.stop_ids, tokens)
        for marked, run in itertools.groupby(turn, key=self._turn_marks.__contains__):
            if marked:
                parts += [self._turn_marks[id] for id in run]
            else:
                parts.append(self.tokenizer.decode(list(run)))
        return read_turn(parts, self.calls, self._stages(), self._block_state)

    def parser(self) -> StreamedTurn:
        """`parse` for one turn whose tokens are still being sampled."""
        return StreamedTurn(
            self.tokenizer,
            self._turn_marks,
            self.stop_ids,
            self.calls,
            self._stages(),
            self._block_state,
            may_think=self.thinking != "none",
        )

    def is_closed(self, tokens: Sequence[int]) -> bool:
        """Whether a policy turn ended with an end of its own, rather than cut or by another
        stop."""
        return bool(tokens) and tokens[-1] in self._turn_ends

    def spans(self, tokens: Sequence[int], author: Author) -> list[Span]:
        """Runs of a piece as people read them: thoughts, calls and results with their marks, the
        turns of the world by role, and text."""
        bare_call = author == "policy" and self._is_bare_call(tokens)
        return self._spans.of(tokens, author, bare_call=bare_call)

    # shared by the families

    def system_content(
        self, message: Message | None, tools: Tools, learn: LearnConfig
    ) -> tuple[list[WeightedPart], float]:
        """What the system says (its message or the usual one, and the tools where their place is
        here), and the weight of its turn."""
        weight = weight_of(message, learn) if message else 0.0
        text = self.shown(message) if message else self.default_system
        parts: list[WeightedPart] = [(Content(text), weight)] if message or text else []
        if declared := self.declared(tools, "system"):
            parts += unlearned([*(["\n\n"] if parts else []), *declared])
        return parts, weight

    def declared(self, tools: Tools, place: str) -> list[str]:
        """The parts that tell the policy of its tools, where this is their place."""
        return self.calls.declare(tools) if tools and place == self.calls.place else []

    def framed(self, role: str, parts: list[WeightedPart], weight: float) -> list[WeightedPart]:
        """The parts of a turn of the world, whose end has this weight."""
        first, *rest = self.footer(role) or [""]
        end = [(first, weight), *unlearned(rest)]
        return [*unlearned(self.header(role)), *parts, *end]

    def world_parts(
        self, role: Role, run: Sequence[Message], learn: LearnConfig = PLAIN
    ) -> list[WeightedPart]:
        """The parts of neighbouring turns of one role other than the assistant's."""
        parts: list[WeightedPart] = []
        if role == "tool":
            return self._result_parts(run, learn)
        for turn in run:
            weight = weight_of(turn, learn)
            parts += self.framed(role, [(Content(self.shown(turn)), weight)], weight)
        return parts

    def _result_parts(self, run: Sequence[Message], learn: LearnConfig) -> list[WeightedPart]:
        results: list[tuple[list[WeightedPart], float]] = []
        for index, turn in enumerate(run):
            weight = weight_of(turn, learn)
            first, told = self.calls.result(turn, index)
            parts = [*unlearned(first), *((part, weight) for part in told)]
            results.append((parts, weight))
        role = self.calls.result_role
        if not role:
            return [part for parts, _ in results for part in parts]
        if self.calls.together:
            return self.framed(role, [part for parts, _ in results for part in parts], 0.0)
        return [part for parts, weight in results for part in self.framed(role, parts, weight)]

    def _render(
        self, messages: Sequence[Message], tools: Tools, learn: LearnConfig = PLAIN
    ) -> tuple[list[Piece], list[WeightedPart]]:
        """The pieces up to the last policy turn, and the parts of the world after it."""
        pieces: list[Piece] = []
        world, turns = self.head(messages, tools if self.tools_in_prompt else (), learn)
        for role, run in runs(turns):
            if role != "assistant":
                world += self.world_parts(role, run, learn)
                continue
            for turn in run:
                pieces.append(self._piece([*world, *unlearned(self._prompt)], "world"))
                pieces += self._turn_pieces(turn, learn)
                world = unlearned(self.after)
        return pieces, world

    def head(
        self, messages: Sequence[Message], tools: Tools, learn: LearnConfig
    ) -> tuple[list[WeightedPart], Sequence[Message]]:
        """The parts before the first turn of another role than the system's, and the turns from it
        on. Tools whose place is the user's turn are in its first, or in one of their own where
        the assistant begins: before that, nothing is said of them."""
        system = None
        if messages and messages[0].role == "system":
            system, *messages = messages
        parts = [*unlearned(self.begin()), *self.system_parts(system, tools, learn)]
        declared = unlearned(self.declared(tools, "user"))
        if not (declared and messages):
            return parts, messages
        if messages[0].role != "user":
            return [*parts, *self.framed("user", declared, 0.0)], messages
        user, *messages = messages
        weight = weight_of(user, learn)
        said = [*declared, (Content(self.shown(user)), weight)]
        return [*parts, *self.framed("user", said, weight)], messages

    def _turn_pieces(self, turn: Message, learn: LearnConfig) -> list[Piece]:
        """An assistant's turn: one piece of the policy, or its text between spans of the world."""
        base = weight_of(turn, learn)
        if not learn.has_world_span(turn.content):
            return [self._piece(learn.weigh(self._turn_parts(turn), base), "policy")]
        pieces, authored = [], learn.split_by_author(turn.content)
        for index, (text, of_world) in enumerate(authored):
            end = [self.ends()[0][0]] if index == len(authored) - 1 else []
            if of_world:
                # A trace that ends with the world's words was cut there: the policy would have gone
                # on, so an end after them is not its choice and is not learned.
                pieces.append(self._piece(unlearned([Content(text), *end]), "world"))
            else:
                parts = [*self._tagged_parts(text, index == 0), *end]
                pieces.append(self._piece(learn.weigh(parts, base), "policy"))
        return pieces

    def _tagged_parts(self, text: str, first: bool) -> list[str]:
        """The parts of an assistant's text as it stands, its tags as marks: those of calls and of
        the reasoning that it begins with. In the middle of a text `<think>` is a word."""
        thoughts = LEADING_THOUGHTS.match(text)[0]
        inside = {str(mark): mark for mark in self._inside}
        calls = {text: mark for text, mark in inside.items() if mark.kind in ("call", "uncall")}
        parts = split(text[len(thoughts) :], calls)
        if self.thinking != "write":
            thoughts = re.sub(r"<think>.*?</think>\s*", "", thoughts, flags=re.DOTALL)
            lead = [self.lead] if first else []
            return [*lead, thoughts, *parts] if thoughts else [*lead, *parts]
        if thoughts:
            parts = [*split(thoughts, inside), *parts]
            if first and self._opened and parts[0] == ThinkMark.THINK:
                return [str(parts[1]).removeprefix(self.block_begin), *parts[2:]]
            return parts
        return [*self._written_block(""), *parts] if first else parts

    def _turn_parts(self, turn: Message) -> list[str]:
        """The parts of an assistant's turn as the policy writes it."""
        content = self.shown(turn)
        think: list[str] = []
        if self.thinking == "write":
            think = self._written_block(turn.reasoning)
        if self.thinking != "none":
            content = content.lstrip("\n")
        lead = self.lead if content or not turn.calls else ""
        end = self.ends()[0][0]
        return [*think, lead, content, *self.calls.write(turn.calls, content), end]

    def _block(self, reasoning: str) -> list[str]:
        """The parts of a block of reasoning."""
        text = reasoning.strip("\n")
        return [ThinkMark.THINK, f"{self.block_begin}{text}\n", ThinkMark.UNTHINK, "\n\n"]

    def _written_block(self, reasoning: str) -> list[str]:
        """Those of its parts that the policy writes."""
        think, text, *rest = self._block(reasoning)
        if self._opened:
            return [text.removeprefix(self.block_begin), *rest]
        return [think, text, *rest]

    # marks and ids

    def _learn_ids(self, guarded: bool) -> None:
        """The ids of marks, which of them are text, and what the tokenizer stops at."""
        marks = [*self.marks, *self.calls.marks]
        if self.thinking == "none":
            marks = [mark for mark in marks if mark.kind not in ("think", "unthink")]
        needed = [mark for mark in (*self.needed, *self.calls.needed) if mark in marks]
        self._ids = {mark: self.tokenizer.id(mark) for mark in needed}
        self._ids |= {m: self.tokenizer.id(m) for m in marks if self.tokenizer.has(m)}
        self._inside = [mark for mark in marks if mark.kind in INSIDE]
        self._turn_marks = {self._ids[mark]: mark for mark in self._inside if mark in self._ids}
        text_marks = [mark for mark in marks if mark not in self._ids]
        self._text_marks = [mark for mark in text_marks if mark.kind in INSIDE]
        self._guard = any_of(map(str, text_marks)) if guarded and text_marks else None
        if self._guard:
            self._refuse_spelled(text_marks)
        turn_ends, document_ends = self.ends()
        self._turn_ends = [self.tokenizer.id(m) for m in turn_ends if m in self._ids]
        last = [self._ids[mark] for mark in document_ends if mark in self._ids]
        self.turn_end = self._ids[turn_ends[0]]
        self.document_end = last[0] if last else self.turn_end
        self.stop_ids = tuple(dict.fromkeys([*self._turn_ends, *last]))
        self._spans = Spans(self.tokenizer, (*self.marks, *self.calls.marks), self.stop_ids)
        header = [mark for mark in self.header("user") if mark in self._ids]
        self.turn_start = self._ids[header[0]] if header else self.document_end

    def _refuse_spelled(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            if self.tokenizer.encode(mark) == self._spelled(mark):
                raise ConfigError(
                    f"the tokenizer writes {mark} letter by letter, so that it cannot be told from "
                    "the same text in a message: take one that has a token for it, or accept that "
                    "with model.chat=chatml-unguarded"
                )

    def _spelled(self, text: str) -> list[int]:
        return [id for letter in text for id in self.tokenizer.encode(letter)]

    def _stages(self) -> list[Stage]:
        lead = [Lead(self.lead)] if self.lead else []
        text = [TextMarks(self._text_marks)] if self._text_marks else []
        return [*lead, *text, *self.calls.stages()]

    def _is_bare_call(self, tokens: Sequence[int]) -> bool:
        may_be = any(isinstance(stage, BareCall) for stage in self.calls.stages())
        if not may_be or not tokens or self._turn_marks.keys() & set(tokens):
            return False
        return bool(self.parse(tokens).calls)

    def _encode(self, parts: Iterable[str]) -> list[int]:
        """The ids of parts: marks by id, everything between two of them joined, as plain text."""
        return self._piece(unlearned(parts), "world").tokens

    def _piece(self, parts: Iterable[WeightedPart], author: Author) -> Piece:
        """The parts encoded, with their weights where these are not the usual ones."""
        ids: list[int] = []
        weights: list[float] = []
        # Text is joined before it is encoded, so that where parts meet does not change the tokens.
        for is_token, run in itertools.groupby(parts, key=self._is_token):
            run = list(run)
            if is_token:
                ids += [self._ids[mark] for mark, _ in run]
                weights += [weight for _, weight in run]
                continue
            for part_run in self._guarded_runs(run):
                run_ids, run_weights = self._encode_text(part_run)
                ids += run_ids
                weights += run_weights
        usual = float(author == "policy")
        return Piece(ids, author, None, None if set(weights) <= {usual} else weights)

    def _is_token(self, part: WeightedPart) -> bool:
        return isinstance(part[0], Mark) and part[0] in self._ids

    def _guarded_runs(self, run: list[WeightedPart]) -> Iterator[list[WeightedPart]]:
        """The texts to be encoded one by one: all together, or cut around the letters of what
        imitates a mark in a content."""
        together: list[WeightedPart] = []
        for part, weight in run:
            at = 0
            if self._guard and isinstance(part, Content):
                for found in self._guard.finditer(part):
                    yield [*together, (part[at : found.start()], weight)]
                    yield from ([(letter, weight)] for letter in found[0])
                    together, at = [], found.end()
            together.append((part[at:], weight))
        yield together

    def _encode_text(self, run: list[WeightedPart]) -> tuple[list[int], list[float]]:
        run_texts, run_weights = zip(*run, strict=True)
        text = "".join(run_texts)
        if len(set(run_weights)) == 1:
            ids = self.tokenizer.encode(text)
            return ids, [run_weights[0]] * len(ids)
        # a token across parts has the weight of the character it starts with
        ids, starts = self.tokenizer.encode_starts(text)
        ends = list(itertools.accumulate(map(len, run_texts)))
        return ids, [run_weights[bisect.bisect_right(ends, start)] for start in starts]


def runs(turns: Sequence[Message]) -> Iterator[tuple[Role, list[Message]]]:
    """Neighbours of one role together: consecutive tool results may share one turn."""
    for role, run in itertools.groupby(turns, key=lambda turn: turn.role):
        yield role, list(run)


def texts(parts: Iterable[WeightedPart]) -> list[str]:
    return [part for part, _ in parts]


def unlearned(parts: Iterable[str]) -> list[WeightedPart]:
    return [(part, 0.0) for part in parts]


def weight_of(turn: Message, learn: LearnConfig) -> float:
    """The weight of a turn's tokens."""
    return turn.weight if turn.role in learn.roles else 0.0
