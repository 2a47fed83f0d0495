"""What the tool loop asks of others: a policy, an environment, a set of tasks, a reward."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from jaxdeep.types import Completion, Message, Sampling, Task, Trajectory

if TYPE_CHECKING:
    from jaxdeep.agent.tool import Tool

Reward = Callable[[Task, Trajectory], "Awaitable[float | None] | float | None"]
"""A number, or None when this trajectory cannot be judged: then it is left out of baseline and loss."""


class Policy(Protocol):
    """Token ids in, sampled ids and their log-probabilities out. The seam between the two halves."""

    async def __call__(
        self, prompt: Sequence[int], *, seed: int, max_new: int, sampling: Sampling = ...
    ) -> Completion: ...


class Env:
    """One episode: open once, reply to turns without tool calls, close. Never reused."""

    tools: Sequence[Tool] = ()

    async def open(self) -> list[Message]:
        """The messages before the model's first turn."""
        raise NotImplementedError

    async def reply(self, message: Message) -> list[Message]:
        """What the world says to a turn that called no tool; nothing ends the episode."""
        return []

    async def close(self) -> None:
        """Give back what the episode held. Called once, whatever happened."""


class Taskset(Protocol):
    """Tasks, a fresh environment for each rollout of one, and the rewards by name with their weights."""

    rewards: Mapping[str, tuple[float, Reward]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task: ...

    def env(self, task: Task) -> Env: ...

    def gold(self, task: Task) -> list[Message]:
        """The assistant's and the tools' messages of a perfect episode: it scores the maximum."""
        ...
