"""Evaluation: every task of a set through a policy, what came of it in numbers, two systems compared.

In: a taskset, a policy and a chat. Out: trajectories in the order of the tasks, then a row of numbers for
a report. A rollout that failed counts as wrong, so a broken tool never makes a score look better; how
many failed is part of the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from jaxdeep.agent.base import Policy, Taskset
from jaxdeep.agent.rollout import Limits, rollout, score, together
from jaxdeep.chat.format import ChatFormat
from jaxdeep.errors import DataError
from jaxdeep.eval import statistics
from jaxdeep.rewards import answers
from jaxdeep.types import Sampling, Stop, Trajectory


async def evaluate(
    taskset: Taskset,
    policy: Policy,
    chat: ChatFormat,
    *,
    limits: Limits,
    sampling: Sampling,
    seed: int,
    indices: Iterable[int] | None = None,
    concurrency: int = 64,
    on_done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """A scored rollout of each task, or of those at `indices`, in that order. At most `concurrency` run at
    once; `on_done` hears of each as it ends. A task's seed depends on its index and `seed` alone."""
    slots = asyncio.Semaphore(concurrency)

    async def run(index: int) -> Trajectory:
        async with slots:
            task = taskset[index]
            trajectory = await rollout(
                taskset.env(task),
                task,
                policy,
                chat,
                limits=limits,
                seed=seed + index,
                sampling=sampling,
            )
            await score(taskset, trajectory, limits.seconds)
        if on_done is not None:
            on_done(trajectory)
        return trajectory

    indices = range(len(taskset)) if indices is None else indices
    return await together(run(index) for index in indices)


async def greedy(
    taskset: Taskset,
    policy: Policy,
    chat: ChatFormat,
    limits: Limits,
    concurrency: int,
    indices: Iterable[int] | None = None,
    on_done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """One scored rollout of each task that always takes the most likely token."""
    return await evaluate(
        taskset,
        policy,
        chat,
        limits=limits,
        sampling=Sampling(0.0),
        seed=0,
        indices=indices,
        concurrency=concurrency,
        on_done=on_done,
    )


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The row of a report: `n` rollouts, exact match with its 95 % interval, F1, mean tool calls and turns of
    the policy, and how many failed or were cut by a limit."""
    if not trajectories:
        raise DataError("no rollouts to summarize")
    n = len(trajectories)
    right = sum(map(correct, trajectories))
    low, high = statistics.wilson(right, n)
    f1 = sum(answers.answer_f1(t.task, t) for t in trajectories if t.stop is not Stop.FAILED)
    calls = sum(len(message.calls) for t in trajectories for message in t.messages)
    turns = sum(piece.author == "policy" for t in trajectories for piece in t.pieces)
    return {
        "n": n,
        "em": right / n,
        "em_low": low,
        "em_high": high,
        "f1": f1 / n,
        "calls": calls / n,
        "turns": turns / n,
        "failed": sum(t.stop is Stop.FAILED for t in trajectories),
        "truncated": sum(t.stop.truncated for t in trajectories),
    }


def correct(trajectory: Trajectory) -> bool:
    """Whether the task's reward of the name `answer` is 1, or where it has none, whether the final answer
    is an accepted one; False where the rollout failed."""
    if trajectory.stop is Stop.FAILED:
        return False
    if "answer" in trajectory.rewards:
        return trajectory.rewards["answer"] == 1
    return answers.answer_em(trajectory.task, trajectory) == 1


def compare(a: Sequence[Trajectory], b: Sequence[Trajectory]) -> dict[str, float]:
    """Exact match of two systems on the same tasks, paired by task: how many only `a`, only `b`, both or
    neither got right, and McNemar's `p`. DataError where the tasks differ."""
    right_a, right_b = _by_task(a), _by_task(b)
    alone_a, alone_b = right_a.keys() - right_b.keys(), right_b.keys() - right_a.keys()
    if alone_a or alone_b:
        example = min(alone_a or alone_b)
        raise DataError(
            f"the two evaluations are not of the same tasks: {len(alone_a)} are only in the first, "
            f"{len(alone_b)} only in the second, such as {example!r}"
        )
    pairs = [(right_a[task], right_b[task]) for task in right_a]
    return {
        "n": len(pairs),
        "both": pairs.count((True, True)),
        "only_a": pairs.count((True, False)),
        "only_b": pairs.count((False, True)),
        "neither": pairs.count((False, False)),
        "p": statistics.mcnemar([x for x, _ in pairs], [y for _, y in pairs]),
    }


def _by_task(trajectories: Sequence[Trajectory]) -> dict[str, bool]:
    right = {trajectory.task.id: correct(trajectory) for trajectory in trajectories}
    if len(right) < len(trajectories):
        raise DataError(
            f"{len(trajectories)} rollouts of {len(right)} tasks: compare takes one rollout of each"
        )
    return right
