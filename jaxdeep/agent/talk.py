"""A conversation with a person: every line is answered by the tool loop, and told while it happens.

    conversation = Conversation(env, stream, chat, limits, sampling, tell)
    await conversation.ask("What is the capital of Chad?")

`tell` hears the events of a turn as they are sampled (`chat.format.Event`) and each `Result` as the
policy reads it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import SAMPLING, Limits, rollout
from jaxdeep.chat.format import ChatFormat, Event
from jaxdeep.errors import DataError
from jaxdeep.types import Completion, Message, Sampling, Task, ToolCall, Trajectory

Stream = Callable[..., AsyncIterator[Completion]]
"""As `Engine.stream`: a turn in parts, the last of which says why it ended."""


class Result(NamedTuple):
    """What a policy reads as the result of a call."""

    call: ToolCall
    text: str


Tell = Callable[["Event | Result"], None]


class Plain(Env):
    """A question without tools or a prompt of the system."""

    def __init__(self, task: Task) -> None:
        self.task = task

    async def open(self) -> list[Message]:
        return [Message("user", self.task.question)]


@dataclasses.dataclass(eq=False)
class Conversation:
    """What was said so far, and how the next line is answered.

    `env` makes the environment of a question: that of a task set, or `Plain`. With `memory` a line
    goes on from what was said before; without, each is a question of its own, as in training on
    single questions. `said` has the questions since the last `reset`, each with its messages and
    the schemas of its tools.
    """

    env: Callable[[Task], Env]
    stream: Stream
    chat: ChatFormat
    limits: Limits
    sampling: Sampling
    tell: Tell
    memory: bool = True
    said: list[tuple[list[Message], list[Mapping[str, Any]]]] = dataclasses.field(
        default_factory=list
    )
    asked: int = 0

    async def ask(self, line: str) -> Trajectory:
        """The answer to a line. Cancelled, it keeps the line and what was written of the answer."""
        task = Task(f"line {self.asked}", line)
        before = [m for messages, _ in self.said for m in messages if m.role != "system"]
        before = _repeatable(before) if self.memory else []
        env = _Continued(self.env(task), before, self.tell)
        policy = _Told(self.stream, self.chat, self.tell)
        seed, self.asked = self.asked, self.asked + 1
        try:
            trajectory = await rollout(
                env, task, policy, self.chat, limits=self.limits, seed=seed, sampling=self.sampling
            )
        except BaseException:
            partial = dataclasses.replace(policy.partial(), calls=())
            self._keep(env, [*env.opening, *([partial] if partial.content else [])])
            raise
        self._keep(env, trajectory.messages)
        return trajectory

    def reset(self) -> None:
        """Forget what was said."""
        self.said.clear()

    def save(self, path: Path) -> int:
        """Write the conversation as JSON lines that SFT reads: with `memory` one row, without one
        a question; their number. DataError where the file exists, or nothing was said."""
        if not self.said:
            raise DataError("nothing was said yet")
        rows = self.said
        if self.memory:
            system = [m for m in rows[0][0] if m.role == "system"]
            rest = [m for messages, _ in rows for m in messages if m.role != "system"]
            rows = [([*system, *rest], rows[-1][1])]
        try:
            with path.open("x", encoding="utf-8") as file:
                for messages, tools in rows:
                    row = {"messages": [_openai(m) for m in messages]}
                    row |= {"tools": tools} if tools else {}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
        return len(rows)

    def _keep(self, env: _Continued, messages: Sequence[Message]) -> None:
        system = [m for m in messages if m.role == "system"]
        new = [m for m in messages if m.role != "system"][len(env.before) :]
        self.said.append(([*system, *new], [tool.schema for tool in env.tools]))


class _Continued(Env):
    """An environment whose conversation begins with what was said before."""

    def __init__(self, env: Env, before: Sequence[Message], tell: Tell) -> None:
        self.env, self.before, self.tell = env, before, tell
        self.opening: list[Message] = []

    @property
    def tools(self) -> Sequence[Any]:
        return self.env.tools

    async def open(self) -> list[Message]:
        self.env.seed = self.seed
        opening = await self.env.open()
        system = [m for m in opening if m.role == "system"]
        self.opening = [*system, *self.before, *(m for m in opening if m.role != "system")]
        return self.opening

    async def reply(self, message: Message) -> list[Message]:
        return await self.env.reply(message)

    async def shown(self, call: ToolCall, text: str) -> None:
        self.tell(Result(call, text))
        await self.env.shown(call, text)

    async def fork(self, messages: list[Message], room: int) -> list[Message] | None:
        return await self.env.fork(messages, room)

    async def close(self) -> None:
        await self.env.close()


class _Told:
    """A policy that tells its turns while they are sampled."""

    def __init__(self, stream: Stream, chat: ChatFormat, tell: Tell) -> None:
        self.stream, self.chat, self.tell = stream, chat, tell
        self.parser = chat.parser()

    async def __call__(
        self, prompt: Sequence[int], *, seed: int, max_new: int, sampling: Sampling = SAMPLING
    ) -> Completion:
        self.parser = self.chat.parser()
        tokens: list[int] = []
        logps: list[float] = []
        stop, version = "", 0
        async for part in self.stream(prompt, seed=seed, max_new=max_new, sampling=sampling):
            tokens += part.tokens
            logps += part.logps
            stop, version = part.stop, part.version
            self._tell_all(self.parser.feed(part.tokens))
        self._tell_all(self.parser.flush())
        return Completion(tokens, logps, stop, version=version)

    def partial(self) -> Message:
        """What the turn that was begun last says so far."""
        return self.parser.finish()

    def _tell_all(self, events: Sequence[Event]) -> None:
        for event in events:
            self.tell(event)


def _repeatable(messages: Sequence[Message]) -> list[Message]:
    """The messages without turns whose calls could not be read, and without their results: nothing
    would write those again as they were."""
    out: list[Message] = []
    broken = False
    for message in messages:
        if message.role != "tool":
            broken = any(call.error for call in message.calls)
        if not broken:
            out.append(message)
    return out


def _openai(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        row["name"] = message.name
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if calls := [call for call in message.calls if not call.error]:
        row["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
                },
            }
            for call in calls
        ]
    return row
