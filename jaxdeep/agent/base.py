"""What the tool loop asks of others: a policy, an environment, a set of tasks, a reward."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from jaxdeep.types import Completion, Message, Sampling, Task, ToolCall, Trajectory

if TYPE_CHECKING:
    from jaxdeep.agent.tool import Tool

Reward = Callable[[Task, Trajectory], "Awaitable[float | None] | float | None"]
"""A number, or None when this trajectory cannot be judged: it then counts neither in the baseline
nor in the loss."""


class Policy(Protocol):
    """Token ids in, sampled ids and their log-probabilities out. Training code and the tool loop
    meet here: an engine, a remote server and a script look the same to the loop."""

    async def __call__(
        self, prompt: Sequence[int], *, seed: int, max_new: int, sampling: Sampling = ...
    ) -> Completion: ...


class Env:
    """One episode. The loop opens it once, asks its hooks while the conversation goes on, and
    closes it once, whatever happened. It is never used again. Only `open` must be written.

    `seed` follows from the rollout's and is set before `open`. Draw everything random from it, and
    the same rollout meets the same world again.
    """

    tools: Sequence[Tool] = ()
    seed: int = 0

    async def open(self) -> list[Message]:
        """The messages before the model's first turn."""
        raise NotImplementedError

    async def reply(self, message: Message) -> list[Message]:
        """The answer to a turn that called no tool. An empty list ends the episode."""
        return []

    async def shown(self, call: ToolCall, text: str) -> None:
        """Told, for each call of a turn in order, exactly what the model reads as its result: after
        the cut to `limits.result_tokens`, and also where the text only says that the call could not
        be read or was not made. A tool that returned a text cannot know this by itself."""

    async def fork(self, messages: list[Message], room: int) -> list[Message] | None:
        """The messages that a new branch of the conversation begins with, or None to go on in the
        present one. This is where context is managed: go on from a summary, without old results.

        Asked before every turn of the policy but the first. `messages` are the present branch's,
        the last answer of the world included. `room` is how many tokens the next turn could have in
        it; below 1 the branch is full, and None then ends the rollout as MAX_TOKENS. A turn that
        the budget cuts in the middle ends the rollout without asking, so fork while there is room.

        What the new branch says is the world's and not learned there, an assistant's messages too.
        A turn with a call that could not be read cannot be repeated, since nothing would write it
        so.
        """
        return None

    async def close(self) -> None:
        """Give back what the episode held."""


class Taskset(Protocol):
    """Tasks, a fresh environment for each rollout of one, and the rewards by name with their
    weights.

    One reward decides whether a rollout got its task right, which is what evaluation counts: it is
    right where that reward is 1 or more. A task set names it in an attribute `right`; without one
    it is the first of `rewards`.
    """

    rewards: Mapping[str, tuple[float, Reward]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task: ...

    def env(self, task: Task) -> Env: ...

    def gold(self, task: Task) -> list[Message] | None:
        """The assistant's and the tools' messages of a perfect episode: it scores the maximum. None
        where no perfect episode is known."""
        ...


def right_reward(taskset: Taskset) -> str:
    """The name of the reward that decides whether a rollout is right."""
    return named_right(taskset) or next(iter(taskset.rewards))


def named_right(taskset: Taskset) -> str | None:
    """That name, where the task set says it."""
    right = getattr(taskset, "right", None)
    return right if isinstance(right, str) else None  # a method may be called so
