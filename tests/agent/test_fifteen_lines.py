"""A tool, an environment with its tasks, and a reward of one's own: each is at most 15 lines."""

import asyncio
import inspect
from typing import Annotated

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.agent.tool import tool
from jaxdeep.types import Message, Stop, Task, ToolCall, Trajectory


@tool(timeout=5.0)
def add(a: Annotated[int, "the first number"], b: int = 0) -> str:
    """Add two whole numbers."""
    return str(a + b)


class Guess(Env):
    """The model guesses a number by a tool that says whether to go higher or lower."""

    def __init__(self, task: Task) -> None:
        self.number = int(task.answers[0])
        self.tools = [self.compare]

    async def open(self) -> list[Message]:
        return [Message("user", "Find my number from 1 to 9. Compare, then say it.")]

    @tool
    def compare(self, guess: int) -> str:
        """Compare a guess with the number."""
        return "higher" if guess < self.number else "lower" if guess > self.number else "equal"


def found(task: Task, trajectory: Trajectory) -> float:
    return float(trajectory.messages[-1].content == task.answers[0])


class Numbers:
    """The tasks: every number from 1 to 9."""

    rewards = {"found": (1.0, found)}  # noqa: RUF012 - as short as a user writes it

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Task:
        return Task(str(index), "which number?", (str(index + 1),))

    def env(self, task: Task) -> Env:
        return Guess(task)

    def gold(self, task: Task) -> list[Message]:
        return [Message("assistant", task.answers[0])]


@pytest.mark.parametrize("part", [add.function, Guess, found, Numbers])
def test_each_part_is_short(part):
    code = [line for line in inspect.getsource(part).splitlines() if line.strip()]
    assert len(code) <= 15


def test_and_they_work(chat):
    limits = Limits(
        max_turns=9, max_calls=9, turn_tokens=300, max_tokens=9000, result_tokens=99, seconds=5.0
    )
    tasks = Numbers()
    asks = [Message("assistant", calls=(ToolCall("compare", {"guess": g}),)) for g in (5, 8, 7)]
    policy = ScriptedPolicy(chat, [*asks, Message("assistant", "7")])
    for index, reward in ((6, 1.0), (4, 0.0)):
        trajectories = asyncio.run(
            loop.group(tasks, tasks[index], policy, chat, size=2, limits=limits, seed=0)
        )
        for trajectory in trajectories:
            asyncio.run(loop.score(tasks, trajectory))
            assert trajectory.stop is Stop.FINISHED and trajectory.reward == reward
    heard = [m.content for m in trajectories[0].messages if m.role == "tool"]
    assert heard == ["equal", "lower", "lower"]
    assert asyncio.run(add.call({"a": "2", "b": 3})).text == "5"
    for index in range(len(tasks)):
        task = tasks[index]
        gold = Trajectory(task, messages=tasks.gold(task), stop=Stop.FINISHED)
        asyncio.run(loop.score(tasks, gold))
        assert gold.reward == 1.0
