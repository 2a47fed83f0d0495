"""Evaluation: a rollout of every task of a set, their results in numbers, and two systems compared.

    evaluate(taskset, policy, chat, ...)    scored trajectories, in the order of the tasks
    greedy(taskset, policy, chat, ...)      the same, with the most likely token at every step
    summarize(trajectories)                 one row of a table
    compare(a, b)                           a paired test on the same tasks

A rollout that failed counts as wrong, so a broken tool never makes a score look better. How many
failed is part of the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from jaxdeep.agent.base import Policy, Taskset
from jaxdeep.agent.rollout import Limits, mean_metrics, rollout, score, together
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
    """A scored rollout of each task, or of those at `indices`, in that order. At most `concurrency`
    run at once. `on_done` is called with each as it ends. A task's seed depends on its index and
    `seed` alone, so a part of a set gives what the whole set would."""
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
    """As `evaluate`, always taking the most likely token: the score of a policy has no sampling
    noise and two policies are compared on equal terms."""
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


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """One row of a table: `n` rollouts; the share `em` of them that are right (`correct`) with its
    95 % interval; F1 of the answers, where any rollout gave one in <answer>; the mean `calls` made
    of tools and `turns` of the policy, as `agent.rollout.METRICS` defines them; how many rollouts
    failed, and how many a limit cut; the mean of each reward as "reward/NAME", over the rollouts
    that have it. DataError for no rollouts."""
    if not trajectories:
        raise DataError("no rollouts to summarize")
    n = len(trajectories)
    right = sum(map(correct, trajectories))
    low, high = statistics.wilson(right, n)
    means = mean_metrics(trajectories)
    f1 = {}
    if any(answers.final_answer(t) is not None for t in trajectories):
        ended = (t for t in trajectories if t.stop is not Stop.FAILED)
        f1["f1"] = sum(answers.answer_f1(t.task, t) for t in ended) / n
    return {
        "n": n,
        "em": right / n,
        "em_low": low,
        "em_high": high,
        **f1,
        "calls": means["calls"],
        "turns": means["turns"],
        "failed": sum(t.stop is Stop.FAILED for t in trajectories),
        "truncated": sum(t.stop.truncated for t in trajectories),
        **reward_means(trajectories),
    }


def refuse_unplayed(trajectories: Sequence[Trajectory]) -> None:
    """DataError for an evaluation that says nothing about the policy: every rollout failed, or none
    has a sampled token."""
    failed = [t for t in trajectories if t.stop is Stop.FAILED]
    if len(failed) == len(trajectories):
        raise DataError(f"all {len(failed)} rollouts failed. The first: {failed[0].failure}")
    if not any(t.sampled for t in trajectories):
        raise DataError(
            f"in none of the {len(trajectories)} rollouts a token was sampled: the prompts leave no "
            "room in rollout.limits.max_tokens"
        )


def reward_means(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """The mean of each reward as "reward/NAME", over the rollouts that have it; None where none
    has."""
    out = {}
    for name in dict.fromkeys(name for t in trajectories for name in t.rewards):
        values = [value for t in trajectories if (value := t.rewards.get(name)) is not None]
        out[f"reward/{name}"] = sum(values) / len(values) if values else None
    return out


def correct(trajectory: Trajectory) -> bool:
    """Whether a rollout got its task right, as `agent.rollout.score` noted it. Of a record that is
    older than that, whether its first reward is 1 or more. False where the rollout failed."""
    if trajectory.stop is Stop.FAILED:
        return False
    if "right" in trajectory.metrics:
        return trajectory.metrics["right"] == 1
    first = next(iter(trajectory.rewards.values()), None)
    return first is not None and first >= 1


def compare(a: Sequence[Trajectory], b: Sequence[Trajectory]) -> dict[str, float]:
    """Two systems on the same tasks, paired by task: how many tasks `both`, only `a`, only `b` or
    `neither` got right, and `p` of McNemar's test that they are equally good. DataError where the
    tasks differ or one comes twice."""
    right_a, right_b = _by_task(a), _by_task(b)
    extra_a, extra_b = right_a.keys() - right_b.keys(), right_b.keys() - right_a.keys()
    if extra_a or extra_b:
        example = min(extra_a or extra_b)
        raise DataError(
            f"the two evaluations are not of the same tasks: {len(extra_a)} are only in the first, "
            f"{len(extra_b)} only in the second, such as {example!r}"
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
