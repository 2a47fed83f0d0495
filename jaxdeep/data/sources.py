"""Where training conversations come from: rows by number, each a list of pieces.

A source is anything with `source[i] -> list[Piece]`; a finite one also has a length and is walked
in an order that a seed and the epoch decide. `fill` packs rows into batches and says where it is, so a
run goes on at the very row where it stopped.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxdeep.data import chat as chats
from jaxdeep.data.chat import Chat
from jaxdeep.data.pack import pack_bins, to_row
from jaxdeep.errors import DataError
from jaxdeep.types import Batch, Message, Piece, Row


class Source(Protocol):
    """Conversations by number."""

    def __getitem__(self, index: int) -> list[Piece]: ...


class Conversations:
    """Rows of a JSONL or JSON file with `messages` (OpenAI style, or traces with inline tags) or
    `conversations` (ShareGPT style), and optionally `tools`."""

    def __init__(self, path: str | Path, chat: Chat) -> None:
        self.path, self.chat = Path(path), chat
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        self.rows: list[tuple[str, Any]] = []  # where each stands, and what is there
        if text.lstrip().startswith("["):
            listed = enumerate(_json(text, str(self.path)))
            self.rows = [(f"{self.path}[{index}]", row) for index, row in listed]
        else:  # a text may hold line separators of Unicode: only "\n" ends a line of JSONL
            lines = ((f"{self.path}:{n}", line) for n, line in enumerate(text.split("\n"), 1))
            self.rows = [(where, _json(line, where)) for where, line in lines if line.strip()]
        if not self.rows:
            raise DataError(f"{self.path} holds no conversation")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Piece]:
        where, row = self.rows[index]
        try:
            return self.chat.pieces(*read(row))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def read(row: Any) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """The messages and tool schemas of one row of data; DataError for what is neither."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, found {row!r:.80}")
    tools = row.get("tools") or []
    tools = _json(tools, "the text of tools") or [] if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools must be a list of objects, found {tools!r:.80}")
    tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    if isinstance(turns := row.get("messages"), list):
        return chats.messages_from_openai(turns, inline=True), tools
    if isinstance(turns := row.get("conversations"), list):
        return chats.messages_from_sharegpt(turns), tools
    raise DataError(f"a row needs a list of messages or conversations, found {', '.join(row)}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


class Position(NamedTuple):
    """How far a walk over a source has come: rows read, and rows left out as too long or empty."""

    read: int = 0
    skipped: int = 0


def _at(source: Source, index: int, seed: int) -> list[Piece]:
    """The row at `index` of the walk; a finite source is walked again and again, shuffled anew."""
    if not hasattr(source, "__len__"):
        return source[index]
    epoch, place = divmod(index, len(source))
    return source[_order(len(source), seed, epoch)[place]]


@functools.lru_cache(maxsize=2)  # every row of an epoch asks for it
def _order(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


def fill(
    source: Source, position: Position, *, B: int, T: int, seed: int
) -> Iterator[tuple[Batch, Position]]:
    """Batches of B packed rows of T positions from `position` on, each with the position after it.

    Rows enter in order, each in the first place it fits, until one fits nowhere. A row longer than T,
    or with nothing to learn, is left out and counted; DataError if a thousand in a row are, or all.
    """
    # one good row of n can be first in an epoch and last in the next: 2n - 2 others between
    most = min(1000, 2 * len(source)) if hasattr(source, "__len__") else 1000
    while True:
        bins: list[list[Row]] = [[] for _ in range(B)]
        room, out = [T] * B, 0
        while True:
            row = to_row(_at(source, position.read, seed))
            n = len(row.tokens)
            if n > T or not row.learn.any():
                position, out = Position(position.read + 1, position.skipped + 1), out + 1
                if out >= most:
                    raise DataError(
                        f"{out} rows, one after the other, are longer than {T} tokens or have nothing "
                        "to learn: raise batch.length or look at the data"
                    )
                continue
            place = next((b for b in range(B) if room[b] >= n), None)
            if place is None:
                break
            bins[place].append(row)
            room[place] -= n
            position, out = position._replace(read=position.read + 1), 0
        yield pack_bins(bins, B, T), position
