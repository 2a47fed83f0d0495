"""The scored rollouts of each step of a GRPO run, of all processes together.

    explorer.groups(n, ending)      the scored groups of step n

Conversations run in an asyncio loop in a thread of its own, so that those of later steps can go on
while the trainer works: the rollouts of step n begin once update n - 1 - `grpo.ahead` is made, and
none of their tokens is from a policy more than `grpo.ahead` updates old. Tasks are drawn, and
processes communicate, only inside `groups`: every process does both in the same order. The solve
rates of a curriculum may be `grpo.ahead` updates old.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdeep.agent.base import Taskset
from jaxdeep.agent.rollout import group, score, together
from jaxdeep.chat.format import ChatFormat
from jaxdeep.parallel import exchange
from jaxdeep.rl import advantages
from jaxdeep.rl.curriculum import TaskOrder
from jaxdeep.sample.engine import Engine
from jaxdeep.setup.runs import GrpoRun
from jaxdeep.signals import Terminated, Termination
from jaxdeep.types import Sampling, Trajectory

Groups = list[list[Trajectory]]


class Sampled(NamedTuple):
    """The scored groups of a step, and the rewards that are compared in each of them."""

    groups: Groups
    rewards: list[list[float | None]]


class Explorer:
    """The rollouts of the steps after `done`. `position` is given to a run that resumes; after
    `rollbacks` of the guard other samples are drawn. Close it at the end: rollouts that are still
    in progress are dropped."""

    def __init__(
        self,
        taskset: Taskset,
        engine: Engine,
        chat: ChatFormat,
        run: GrpoRun,
        done: int = 0,
        position: Mapping[str, Any] | None = None,
        rollbacks: int = 0,
    ) -> None:
        self.taskset, self.engine, self.chat = taskset, engine, chat
        settings, seed = run.grpo, run.train.seed
        self.settings, self.limits = settings, run.rollout.limits
        self.walk = TaskOrder(len(taskset), seed, settings.curriculum)
        self._seed = seed * 1_000_003 + rollbacks * 500_009  # a step adds its number
        self._rules = settings.rules(self.limits)
        self._begun, self._last = done, run.train.steps
        self._drawn: collections.deque[Sequence[int]] = collections.deque()
        if position:
            self.walk.restore(position)
            self._drawn.extend(position.get("drawn", ()))
        self._flying: collections.deque[tuple[Sequence[int], concurrent.futures.Future]]
        self._flying = collections.deque()
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def groups(self, n: int, ending: Termination) -> Sampled | None:
        """The groups of step n, `grpo.prompts` of them. With `grpo.flat=resample` tasks are drawn
        again until that many groups have unequal rewards, at most `grpo.tries` times: then there
        are more groups. None after SIGTERM to any of the processes."""
        settings = self.settings
        while self._begun < min(n + settings.ahead, self._last):
            self._begun += 1
            some = self._drawn.popleft() if self._drawn else self.walk.draw(settings.prompts)
            self._flying.append((some, self._begin(self._begun, some)))
        tasks, work = self._flying.popleft()
        sampled = Sampled([], [])
        drawn: list[int] = []
        tries = settings.tries if settings.flat == "resample" else 1
        while True:
            found = self._end(work, ending)
            if found is None:
                return None
            for index, group_ in zip(tasks, found, strict=True):
                self.walk.note(index, advantages.solved_share(group_, settings.solved))
                sampled.groups.append(group_)
                sampled.rewards.append(advantages.baseline_rewards(group_, self._rules))
            drawn += tasks
            tries -= 1
            useful = (
                advantages.informative(group_, rewards, self._rules)
                for group_, rewards in zip(*sampled, strict=True)
            )
            missing = settings.prompts - sum(useful)
            tasks = self.walk.draw(missing, drawn) if tries and missing > 0 else []
            if not tasks:
                return sampled
            work = self._begin(n, tasks)

    def position(self) -> dict[str, Any]:
        """The position in the order of tasks, and the tasks already drawn for later steps: a run
        that resumes from here skips none and takes none twice."""
        flying = [list(tasks) for tasks, _ in self._flying]
        return self.walk.position() | {"drawn": [*flying, *map(list, self._drawn)]}

    def close(self) -> None:
        """Cancel the rollouts in progress; their environments are closed when this returns."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()

    def _begin(self, n: int, tasks: Sequence[int]) -> concurrent.futures.Future:
        work = self._collect(exchange.my_items(tasks), self._seed + n)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self, work: concurrent.futures.Future, ending: Termination) -> Groups | None:
        mine = None
        with self.engine.serving(), contextlib.suppress(Terminated), ending.droppable():
            mine = work.result()
        if any(exchange.all_gather_objects([mine is None])):
            return None
        return exchange.all_gather_objects(mine)

    async def _collect(self, tasks: Sequence[int], seed: int) -> Groups:
        """Scored rollouts of each task, at temperature 1: any other would sample another density
        than the one the loss compares with."""

        async def one(index: int) -> list[Trajectory]:
            found = await group(
                self.taskset,
                self.taskset[index],
                self.engine,
                self.chat,
                size=self.settings.group,
                limits=self.limits,
                seed=seed,
                sampling=Sampling(1.0),
            )
            await together(
                score(self.taskset, trajectory, self.limits.seconds) for trajectory in found
            )
            return found

        return await together(one(index) for index in tasks)
