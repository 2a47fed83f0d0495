"""The chat format of Qwen3: conversations to token ids, and sampled ids back to messages.

Two renderings are made of the same parts, of which only a `Mark` can become a control token:

- published (`render`, `encode_published`): byte for byte the template shipped with the models; it
  drops reasoning from history. For comparing with others, not for training.
- append-only (`opening`, `reply`, `pieces`): reasoning stays, so that every turn is a prefix of the
  next, each token has one author, and contents are encoded as plain text: a web page that says
  `<|im_end|>` stays text. Rollouts and the data of SFT use this one.

    world    <|im_start|>user\\n ... <|im_end|>\\n<|im_start|>assistant\\n
    policy   <think>\\n ... \\n</think>\\n\\n ... <tool_call>\\n ... \\n</tool_call><|im_end|>
    world    \\n<|im_start|>user\\n<tool_response>\\n ... \\n</tool_response><|im_end|>\\n
             <|im_start|>assistant\\n

How a policy turn is read is in `qwen3_turn`; traces in others' formats are read in `formats`.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from jaxdeep.chat.format import Author, Span, Thinking, Tools
from jaxdeep.chat.learn import PLAIN, LearnConfig, WeightedPart
from jaxdeep.chat.qwen3_turn import INSIDE, STRAY_TAG, Mark, Qwen3TurnParser, read_call, read_turn
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.types import Message, Piece, Role, ToolCall, plain

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
# The template names the marks of calls in the system turn, and published tokenizers read them there
# as control tokens: they are Marks here too, so that the prompt is the one the models were trained
# with.
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within ",
    *(Mark.CALL, Mark.UNCALL, " XML tags:\n", Mark.CALL),
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
    Mark.UNCALL,
)

HEADER_TOKENS = 16
"""Tokens at the start of a turn in which it says whose it is."""

LEADING_THOUGHTS = re.compile(
    rf"(?:\s*{Mark.THINK}(?:(?!{Mark.UNTHINK}).)*(?:{Mark.UNTHINK}\s*|\Z))*", re.DOTALL
)
"""The blocks of reasoning that a text begins with; the last may be open to its end."""

SPAN_ENDS = {Mark.THINK: Mark.UNTHINK, Mark.CALL: Mark.UNCALL, Mark.RESULT: Mark.UNRESULT}
POLICY_SPANS = {Mark.THINK: "think", Mark.CALL: "call"}
WORLD_SPANS = {Mark.RESULT: "result"}


class Qwen3Chat:
    """Qwen3's `ChatFormat`. `thinking` says who writes the think block of a turn: the policy
    ("write"), the generation prompt, empty ("skip"), or nobody ("none": the 2507 instruct models).

    `tools_in_prompt=False` leaves the schemas of tools out, for a policy that was taught its tools.
    ConfigError: another `thinking`. DataError: the tokenizer lacks a control token that is needed.
    """

    control_names = tuple(map(str, Mark))
    stray_tag = STRAY_TAG

    def __init__(
        self, tokenizer: Tokenizer, thinking: Thinking = "write", *, tools_in_prompt: bool = True
    ) -> None:
        if thinking not in get_args(Thinking):
            known = ", ".join(get_args(Thinking))
            raise ConfigError(f"model.thinking={thinking!r}: choose one of {known}")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.tools_in_prompt = tools_in_prompt
        unused = (Mark.THINK, Mark.UNTHINK) if thinking == "none" else ()
        self._ids = {mark: tokenizer.id(mark) for mark in Mark if mark not in unused}
        self._turn_marks = {id: mark for mark, id in self._ids.items() if mark in INSIDE}
        # A record is shown with the marks that its tokenizer has, whether its policy uses them or
        # not.
        self._shown_marks = {tokenizer.id(mark): mark for mark in Mark if tokenizer.has(mark)}
        think = _think_block("") if thinking == "skip" else ()
        self._generation_prompt = [Mark.START, "assistant\n", *think]
        self.turn_start = self._ids[Mark.START]
        self.turn_end = self._ids[Mark.END]
        self.document_end = self._ids[Mark.EOT]
        self.stop_ids = (self.turn_end, self.document_end)

    def render(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False
    ) -> str:
        """The text of the published template; `generate` adds its generation prompt."""
        start, turns = _system_turn(messages, tools)
        parts = _texts(start)
        query = _last_query(turns)
        seen = 0
        for role, run in _runs(turns):
            if role != "assistant":
                parts += _texts(_world_parts(role, run))
            else:
                for index, turn in enumerate(run, seen):
                    body = self._published_parts(turn, index > query, index == len(turns) - 1)
                    parts += [Mark.START, "assistant\n", *body, Mark.END, "\n"]
            seen += len(run)
        return "".join(parts + self._generation_prompt if generate else parts)

    def encode_published(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False
    ) -> list[int]:
        """The ids of `render` as others compute them: contents can forge control tokens here."""
        return self.tokenizer.encode_control(self.render(messages, tools, generate=generate))

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt of the next policy turn: the conversation so far and the generation prompt."""
        pieces, rest = self._render(messages, tools)
        ids = [id for piece in pieces for id in piece.tokens]
        return ids + self._encode(_texts(rest) + self._generation_prompt)

    def reply(self, messages: Sequence[Message], *, closed: bool = True) -> list[int]:
        """What the world appends to a policy turn: the rest of that turn, its own messages, and the
        next generation prompt. `closed=False`: the turn was cut before its `<|im_end|>`.
        """
        # The line end after <|im_end|> is the template's, and no policy samples it: stopping comes
        # first. Training that leaves it out sees other tokens than the published format has.
        parts: list[str] = ["\n"] if closed else [Mark.END, "\n"]
        for role, run in _runs(messages):
            if role == "assistant":
                raise DataError(
                    f"the world cannot reply with an assistant's message: {run[0]!r:.200}"
                )
            parts += _texts(_world_parts(role, run))
        return self._encode(parts + self._generation_prompt)

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
        if len(rest) > 1:  # more than the line end after a policy turn
            pieces.append(self._piece(rest, "world"))
        return pieces

    def encode_turn(self, text: str) -> list[int]:
        """The ids of a policy turn with its `<|im_end|>`; control tokens in the text count."""
        return self.tokenizer.encode_control(f"{text}{Mark.END}")

    def parse(self, tokens: Sequence[int]) -> Message:
        """The message that a policy turn says, read up to its first stop token. Never raises.

        Reasoning is what stands before `</think>`, or after a `<think>` that nothing closes: no
        call is read from it. A call that cannot be read keeps its place and says why in `error`.
        """
        parts: list[str] = []
        turn = itertools.takewhile(lambda id: id not in self.stop_ids, tokens)
        for marked, run in itertools.groupby(turn, key=self._turn_marks.__contains__):
            if marked:
                parts += [self._turn_marks[id] for id in run]
            else:
                parts.append(self.tokenizer.decode(list(run)))
        return read_turn(parts, think_closed=self.thinking == "skip")

    def parser(self) -> Qwen3TurnParser:
        """`parse` for one turn whose tokens are still being sampled."""
        undecided = self.thinking == "write"
        return Qwen3TurnParser(self.tokenizer, self._turn_marks, self.stop_ids, undecided=undecided)

    def is_closed(self, tokens: Sequence[int]) -> bool:
        """Whether a policy turn ended with `<|im_end|>`."""
        return tokens[-1:] == [self.turn_end]

    def spans(self, tokens: Sequence[int], author: Author) -> list[Span]:
        """Runs of a piece as people read them: thoughts, calls and results with their marks, the
        turns of the world by role, and text."""
        spans, begun = [], 0
        for end, block in self._span_ends(tokens, author):
            run = list(tokens[begun:end])
            spans.append(Span(run, block or ("text" if author == "policy" else self._role(run))))
            begun = end
        return spans

    def _span_ends(self, tokens: Sequence[int], author: Author) -> Iterator[tuple[int, str]]:
        """Where each span ends, and which block it is, "" for what is outside of blocks."""
        blocks = POLICY_SPANS if author == "policy" else WORLD_SPANS
        begun, block, end_mark = 0, "", None
        has_header = False  # a second turn begins a span of its own
        for at, id in enumerate(tokens):
            mark = self._shown_marks.get(id)
            if mark is None or (end_mark is not None and mark is not end_mark):
                continue
            if mark is end_mark:
                yield at + 1, block
                begun, block, end_mark, has_header = at + 1, "", None, False
            elif mark in blocks or (mark is Mark.START and has_header):
                if at > begun:
                    yield at, block
                begun, block, end_mark = at, blocks.get(mark, ""), SPAN_ENDS.get(mark)
            has_header |= mark is Mark.START
        if begun < len(tokens):
            yield len(tokens), block

    def _role(self, tokens: Sequence[int]) -> str:
        """Who speaks in a run of the world's tokens, "text" where it does not say."""
        _, _, header = self.tokenizer.decode(tokens[:HEADER_TOKENS]).partition(Mark.START)
        roles = ("system", "user", "assistant")
        return next((role for role in roles if header.startswith(role)), "text")

    def _render(
        self, messages: Sequence[Message], tools: Tools, learn: LearnConfig = PLAIN
    ) -> tuple[list[Piece], list[WeightedPart]]:
        """The pieces up to the last policy turn, and the parts of the world after it."""
        pieces: list[Piece] = []
        world, turns = _system_turn(messages, tools if self.tools_in_prompt else (), learn)
        for role, run in _runs(turns):
            if role != "assistant":
                world += _world_parts(role, run, learn)
                continue
            for turn in run:
                pieces.append(self._piece([*world, *_unlearned(self._generation_prompt)], "world"))
                pieces += self._turn_pieces(turn, learn)
                world = _unlearned(["\n"])
        return pieces, world

    def _turn_pieces(self, turn: Message, learn: LearnConfig) -> list[Piece]:
        """An assistant's turn: one piece of the policy, or its text between spans of the world."""
        base = _weight(turn, learn)
        if not learn.has_world_span(turn.content):
            return [self._piece(learn.weigh(self._turn_parts(turn), base), "policy")]
        pieces, authored = [], learn.split_by_author(turn.content)
        for index, (text, of_world) in enumerate(authored):
            end = [Mark.END] if index == len(authored) - 1 else []
            if of_world:
                # A trace that ends with the world's words was cut there: the policy would have gone
                # on, so an end after them is not its choice and is not learned.
                pieces.append(self._piece(_unlearned([text, *end]), "world"))
            else:
                parts = [*self._tagged_parts(text, index == 0), *end]
                pieces.append(self._piece(learn.weigh(parts, base), "policy"))
        return pieces

    def _tagged_parts(self, text: str, first: bool) -> list[str]:
        """The parts of an assistant's text as it stands, its tags as control tokens: those of calls
        and of the reasoning that it begins with. In the middle of a text `<think>` is a word."""
        thoughts = LEADING_THOUGHTS.match(text)[0]
        marks = {str(mark): mark for mark in (Mark.CALL, Mark.UNCALL)}
        parts = _split(text[len(thoughts) :], marks)
        if self.thinking != "write":
            thoughts = re.sub(rf"{Mark.THINK}.*?{Mark.UNTHINK}\s*", "", thoughts, flags=re.DOTALL)
            return [thoughts, *parts] if thoughts else parts
        if thoughts:
            return [*_split(thoughts, INSIDE), *parts]
        return [*_think_block(""), *parts] if first else parts

    def _turn_parts(self, turn: Message) -> list[str]:
        """The parts of an assistant's turn as the policy writes it."""
        think = _think_block(turn.reasoning) if self.thinking == "write" else []
        content = turn.content if self.thinking == "none" else turn.content.lstrip("\n")
        return [*think, content, *_call_parts(turn.calls, content), Mark.END]

    def _published_parts(self, turn: Message, after_query: bool, last: bool) -> list[str]:
        """The parts of an assistant's turn as the template writes it, without its `<|im_end|>`.

        `after_query`: it comes after the user's last question. `last`: it is the last turn of all.
        """
        content, reasoning = turn.content, turn.reasoning
        if self.thinking == "none":
            return [content, *_call_parts(turn.calls, content)]
        if not reasoning and Mark.UNTHINK in content:
            block = content.split(Mark.UNTHINK)[0].rstrip("\n")
            reasoning = block.split(Mark.THINK)[-1].lstrip("\n")
            content = content.split(Mark.UNTHINK)[-1].lstrip("\n")
        # The template looks at the content before it strips it: a content of line ends alone still
        # puts a line end before the first call.
        calls = _call_parts(turn.calls, content)
        if after_query and (last or reasoning):
            return [*_think_block(reasoning), content.lstrip("\n"), *calls]
        return [content, *calls]

    def _encode(self, parts: Iterable[str]) -> list[int]:
        """The ids of parts: marks by id, everything between two of them joined, as plain text."""
        return self._piece(_unlearned(parts), "world").tokens

    def _piece(self, parts: Iterable[WeightedPart], author: Author) -> Piece:
        """The parts encoded, with their weights where these are not the usual ones."""
        ids: list[int] = []
        weights: list[float] = []
        # Text is joined before it is encoded, so that where parts meet does not change the tokens.
        for kind, run in itertools.groupby(parts, key=lambda part: type(part[0])):
            texts, run_weights = zip(*run, strict=True)
            if kind is Mark:
                ids += [self._ids[mark] for mark in texts]
                weights += run_weights
            elif len(set(run_weights)) == 1:
                run_ids = self.tokenizer.encode("".join(texts))
                ids += run_ids
                weights += [run_weights[0]] * len(run_ids)
            else:  # a token across parts has the weight of the character it starts with
                run_ids, starts = self.tokenizer.encode_starts("".join(texts))
                ends = list(itertools.accumulate(map(len, texts)))
                ids += run_ids
                weights += [run_weights[bisect.bisect_right(ends, start)] for start in starts]
        usual = float(author == "policy")
        return Piece(ids, author, None, None if set(weights) <= {usual} else weights)


def _runs(turns: Sequence[Message]) -> Iterator[tuple[Role, list[Message]]]:
    """Neighbours of one role together: consecutive tool results share one turn."""
    for role, run in itertools.groupby(turns, key=lambda turn: turn.role):
        yield role, list(run)


def _texts(parts: Iterable[WeightedPart]) -> list[str]:
    return [part for part, _ in parts]


def _unlearned(parts: Iterable[str]) -> list[WeightedPart]:
    return [(part, 0.0) for part in parts]


def _system_turn(
    messages: Sequence[Message], tools: Tools, learn: LearnConfig = PLAIN
) -> tuple[list[WeightedPart], Sequence[Message]]:
    """The parts of the system turn (a first system message, the tools), and the turns after it."""
    parts: list[WeightedPart] = []
    weight = 0.0
    if messages and messages[0].role == "system":
        weight = _weight(messages[0], learn)
        parts = [(messages[0].content, weight), *_unlearned(["\n\n"] if tools else [])]
        messages = messages[1:]
    if tools:
        parts += _unlearned([TOOLS_HEAD, *(f"\n{_dump(tool)}" for tool in tools), *TOOLS_TAIL])
    if not parts:
        return [], messages
    header, end = _unlearned([Mark.START, "system\n"]), [(Mark.END, weight), ("\n", 0.0)]
    return [*header, *parts, *end], messages


def _world_parts(role: Role, run: list[Message], learn: LearnConfig = PLAIN) -> list[WeightedPart]:
    """The parts of neighbouring turns of one role other than the assistant's."""
    parts: list[WeightedPart] = []
    if role == "tool":  # the format has no such role: results are a user's turn
        for turn in run:
            parts += _unlearned(["\n", Mark.RESULT, "\n"])
            parts += [(part, _weight(turn, learn)) for part in (f"{turn.content}\n", Mark.UNRESULT)]
        return [*_unlearned([Mark.START, "user"]), *parts, *_unlearned([Mark.END, "\n"])]
    for turn in run:
        parts += _unlearned([Mark.START, f"{role}\n"])
        parts += [(part, _weight(turn, learn)) for part in (turn.content, Mark.END)]
        parts += _unlearned(["\n"])
    return parts


def _weight(turn: Message, learn: LearnConfig) -> float:
    return turn.weight if turn.role in learn.roles else 0.0


def _think_block(reasoning: str) -> list[str]:
    text = reasoning.strip("\n")
    return [Mark.THINK, f"\n{text}\n", Mark.UNTHINK, "\n\n"]


def _call_parts(calls: Sequence[ToolCall], content: str) -> list[str]:
    """The parts of a turn's calls after its content, a line end before each that is not the first
    text of the turn."""
    parts: list[str] = []
    for call in calls:
        if call.error:
            raise DataError(f"a tool call that could not be read cannot be written: {call}")
        if content or parts:
            parts.append("\n")
        text = f'\n{{"name": "{call.name}", "arguments": {_dump(call.arguments)}}}\n'
        # What cannot be read again would be learned, and then never run.
        if error := read_call(text).error:
            raise DataError(f"{error}: {call!r:.200}")
        parts += [Mark.CALL, text, Mark.UNCALL]
    return parts


def _split(text: str, marks: Mapping[str, Mark]) -> list[str]:
    """The text cut at its marks, which become `Mark`s."""
    return [marks.get(part, part) for part in re.split(f"({'|'.join(marks)})", text) if part]


def _last_query(turns: Sequence[Message]) -> int:
    """The index of the last user turn that is not a tool result: the template keeps reasoning after
    it. The number of turns where there is none."""
    for index in reversed(range(len(turns))):
        text = turns[index].content
        result = text.startswith(Mark.RESULT) and text.endswith(Mark.UNRESULT)
        if turns[index].role == "user" and not result:
            return index
    return len(turns)


def _dump(value: Mapping[str, Any]) -> str:
    if text := getattr(value, "text", ""):
        return text
    try:
        return json.dumps(dict(value), ensure_ascii=False, allow_nan=False, default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{value!r:.200} cannot be written as JSON: {error}") from error
