"""What every model family's chat format offers to the rest of the package.

A chat format turns conversations into token ids and sampled ids back into messages. Only files in
`chat/` know the control tokens of a family; everything else is written against `ChatFormat`.
`families.chat_format` makes one by name, and its table is where another family is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from jaxdeep.chat.learn import PLAIN, LearnConfig
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.types import Message, Piece, ToolCall

Thinking = Literal["write", "skip", "none"]
"""Who writes the block of reasoning at the start of a turn: the policy ("write"), the prompt, which
leaves it empty ("skip"), or nobody ("none", for models that have no such block)."""

Tools = Sequence[Mapping[str, Any]]
"""Tool schemas, as `agent.tool.Tool.schema` makes them."""

Author = Literal["policy", "world"]


class Span(NamedTuple):
    """A run of tokens that people see as one thing, its control tokens included.

    Of a policy's tokens: "think", "call" or "text". Of the world's: "result" (of a tool), or a turn
    of "system", "user" or "assistant", the last being the header that asks the policy to speak;
    "text" is what has no such header.
    """

    tokens: list[int]
    kind: Literal["think", "call", "text", "result", "system", "user", "assistant"]


class ContentText(NamedTuple):
    """More of the message's `content`."""

    text: str


class ReasoningText(NamedTuple):
    """More of the message's `reasoning`."""

    text: str


class CallBegin(NamedTuple):
    """A tool call begins; it will be `calls[index]` of the message."""

    index: int


class CallText(NamedTuple):
    """More of a call as the policy writes it: of its JSON text in a format that uses JSON. Calls
    that a format writes together come as text of the first of them."""

    index: int
    text: str


class CallEnd(NamedTuple):
    """A call is complete, or will never be: then `call.error` says why."""

    index: int
    call: ToolCall


Event = ContentText | ReasoningText | CallBegin | CallText | CallEnd


class TurnParser(Protocol):
    """Reads one policy turn while it is sampled.

        parser = chat.parser()
        for token in ...:
            for event in parser.feed([token]): ...
        for event in parser.flush(): ...    # empty where the turn ended with a stop token
        message = parser.finish()

    However the tokens are split over `feed`, the texts of the events joined by kind, and the calls
    of the `CallEnd`s, are those of `ChatFormat.parse` for the same tokens. An event is final: text
    is buffered while it is not known where it belongs, as are bytes that are not yet a character.
    The work per token is constant on average.
    """

    def feed(self, tokens: Sequence[int]) -> list[Event]:
        """What the next tokens add. Tokens after the first stop token are ignored."""
        ...

    def flush(self) -> list[Event]:
        """What was buffered, when the turn ends here; nothing may be fed after it."""
        ...

    def finish(self) -> Message:
        """The whole message. Ends the turn if it was not ended."""
        ...


class ChatFormat(Protocol):
    """The chat format of a model family over a tokenizer; `base.TurnChat` has what they share.

    Conversations are rendered append-only: every turn is a prefix of the next, each token has one
    author, and the contents of messages are encoded as plain text, so that nothing in them can
    become a control token.
    """

    control_names: ClassVar[tuple[str, ...]]
    """The control tokens of the family, for who builds a tokenizer."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    """Ids that end a policy turn."""
    turn_start: int
    """The id that begins a turn of the user; that which stands before it where the begin is
    text."""
    turn_end: int
    """The id that ends a turn of the policy; one of `stop_ids`."""
    document_end: int
    """The id that ends a plain document, outside any conversation."""

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt of the next policy turn: the conversation so far and the generation prompt."""
        ...

    def reply(self, messages: Sequence[Message], *, closed: bool = True) -> list[int]:
        """What the world appends to a policy turn: the rest of that turn, the messages, and the
        next generation prompt. `closed=False`: the turn lacks its own end token (see `is_closed`),
        which is added. DataError for a message of the assistant."""
        ...

    def pieces(
        self, messages: Sequence[Message], tools: Tools = (), learn: LearnConfig = PLAIN
    ) -> list[Piece]:
        """A whole conversation as runs of tokens by author, with the weights that `learn` gives: a
        piece has `weights` where a token's is not the usual one, 1 for the policy and 0 for the
        world. DataError for a call that cannot be written."""
        ...

    def encode_turn(self, text: str) -> list[int]:
        """The ids of a policy turn with its end token. Control tokens in the text count, so it may
        be broken in any way a policy's turn can be; for trusted text only."""
        ...

    def parse(self, tokens: Sequence[int]) -> Message:
        """The message that a policy turn says, read up to its first stop token. Never raises: a
        call that cannot be read keeps its place and says why in `error`."""
        ...

    def parser(self) -> TurnParser:
        """`parse` for one turn whose tokens are still being sampled."""
        ...

    def is_closed(self, tokens: Sequence[int]) -> bool:
        """Whether a policy turn ended with its own end token, rather than cut or by another
        stop."""
        ...

    def spans(self, tokens: Sequence[int], author: Author) -> list[Span]:
        """A piece's tokens as people read them: in order, each token in one span."""
        ...


class WrittenArguments(dict):
    """The arguments of a call that came as JSON text, which is kept: it is rendered letter by
    letter, as the published templates do."""

    text = ""
