"""The chat format of Qwen3 and Qwen2.5: ChatML with control tokens for reasoning and calls.

Two renderings are made of the same parts, of which only a mark can become a control token:

- published (`render`, `encode_published`): byte for byte the template shipped with the models; it
  drops reasoning from history. For comparing with others, not for training.
- append-only (`opening`, `reply`, `pieces`): reasoning stays, so that every turn is a prefix of the
  next, each token has one author, and contents are encoded as plain text: a web page that says
  `<|im_end|>` stays text. Rollouts and the data of SFT use this one.

How a policy turn is read is in `turn`; traces in others' formats are read in `formats`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxdeep.chat.base import runs, texts
from jaxdeep.chat.chatml import ChatMl
from jaxdeep.chat.format import Tools
from jaxdeep.chat.learn import PLAIN
from jaxdeep.chat.marks import Mark as AnyMark
from jaxdeep.types import Message

QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Mark(AnyMark):
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


class Qwen3Chat(ChatMl):
    """Qwen3's `ChatFormat`. `thinking` says who writes the think block of a turn: the policy
    ("write"), the generation prompt, empty ("skip"), or nobody ("none": the 2507 instruct models,
    and Qwen2.5)."""

    family = "qwen3"
    control_names = tuple(map(str, Mark))
    marks = tuple(Mark)
    needed = tuple(Mark)

    def render(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False
    ) -> str:
        """The text of the published template; `generate` adds its generation prompt."""
        start, turns = self.head(messages, tools, PLAIN)
        parts = texts(start)
        query = _last_query(turns)
        seen = 0
        for role, run in runs(turns):
            if role != "assistant":
                parts += texts(self.world_parts(role, run))
            else:
                for index, turn in enumerate(run, seen):
                    body = self._published_parts(turn, index > query, index == len(turns) - 1)
                    parts += [*self.header(role), *body, *self.footer(role)]
            seen += len(run)
        return "".join(parts + self._prompt if generate else parts)

    def encode_published(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False
    ) -> list[int]:
        """The ids of `render` as others compute them: contents can forge control tokens here."""
        return self.tokenizer.encode_control(self.render(messages, tools, generate=generate))

    def _published_parts(self, turn: Message, after_query: bool, last: bool) -> list[str]:
        """The parts of an assistant's turn as the template writes it, without its `<|im_end|>`.

        `after_query`: it comes after the user's last question. `last`: it is the last turn of all.
        """
        content, reasoning = turn.content, turn.reasoning
        if self.thinking == "none":
            return [content, *self.calls.write(turn.calls, content)]
        if not reasoning and Mark.UNTHINK in content:
            block = content.split(Mark.UNTHINK)[0].rstrip("\n")
            reasoning = block.split(Mark.THINK)[-1].lstrip("\n")
            content = content.split(Mark.UNTHINK)[-1].lstrip("\n")
        # The template looks at the content before it strips it: a content of line ends alone still
        # puts a line end before the first call.
        calls = self.calls.write(turn.calls, content)
        if after_query and (last or reasoning):
            return [*self._block(reasoning), content.lstrip("\n"), *calls]
        return [content, *calls]


def _last_query(turns: Sequence[Message]) -> int:
    """The index of the last user turn that is not a tool result: the template keeps reasoning after
    it. The number of turns where there is none."""
    for index in reversed(range(len(turns))):
        text = turns[index].content
        result = text.startswith(Mark.RESULT) and text.endswith(Mark.UNRESULT)
        if turns[index].role == "user" and not result:
            return index
    return len(turns)
