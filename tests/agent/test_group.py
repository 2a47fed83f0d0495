"""Groups of rollouts, their rewards, and the limits they run under."""

import asyncio
import dataclasses
import time

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.errors import ConfigError, WorldError
from jaxdeep.types import Completion, Message, Stop, Task, Trajectory

LIMITS = Limits(
    max_turns=6, max_calls=6, turn_tokens=400, max_tokens=6000, result_tokens=200, seconds=5.0
)
TASK = Task("t", "q")


class World(Env):
    """An environment that counts how often it was closed."""

    closed = 0

    async def open(self):
        return [Message("user", "go")]

    async def close(self):
        self.closed += 1


class Set:
    """One task in the world above; what is judged is set by a test."""

    def __init__(self, **rewards):
        self.rewards = rewards
        self.envs = []

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return TASK

    def env(self, task):
        self.envs.append(World())
        return self.envs[-1]

    def gold(self, task):
        return [Message("assistant", "done")]


def test_a_group_is_in_order_with_fresh_worlds_and_distinct_seeds(chat):
    taskset, seen = Set(), []

    async def policy(prompt, *, seed, **_):
        seen.append(seed)
        await asyncio.sleep(0.02 * (5 - len(seen)))  # the first asked answers last
        return Completion([len(seen) % 100], [0.0], "stop")

    def roll(seed, task=TASK):
        return asyncio.run(
            loop.group(taskset, task, policy, chat, size=5, limits=LIMITS, seed=seed)
        )

    trajectories = roll(1)
    assert len({t.seed for t in trajectories}) == 5 == len(set(seen))
    assert len(taskset.envs) == 5 and all(env.closed == 1 for env in taskset.envs)
    seeds = [t.seed for t in trajectories]
    assert [t.seed for t in roll(1)] == seeds
    assert not {t.seed for t in roll(2)} & set(seeds)
    assert not {t.seed for t in roll(1, Task("other", "q"))} & set(seeds)


def test_a_group_with_a_broken_policy_closes_every_world(chat):
    taskset, asked = Set(), []

    async def policy(prompt, **_):
        asked.append(1)
        if len(asked) == 2:
            raise ValueError("engine")
        await asyncio.sleep(5)

    with pytest.raises(ValueError, match="engine"):
        asyncio.run(loop.group(taskset, TASK, policy, chat, size=3, limits=LIMITS, seed=0))
    assert [env.closed for env in taskset.envs] == [1, 1, 1]


def scored(trajectory=None, **rewards):
    trajectory = trajectory or Trajectory(TASK, stop=Stop.FINISHED)
    asyncio.run(loop.score(Set(**rewards), trajectory))
    return trajectory


def test_rewards_are_named_weighted_and_may_be_async():
    async def judge(task, trajectory):
        return 0.5

    trajectory = scored(right=(2.0, lambda task, trajectory: True), judged=(0.5, judge))
    assert trajectory.rewards == {"right": 1.0, "judged": 0.5}
    assert trajectory.reward == 2.25


def test_what_cannot_be_judged_has_no_reward():
    def unsure(task, trajectory):
        return None

    async def down(task, trajectory):
        raise WorldError("the judge is down")

    def right(task, trajectory):
        return 1.0

    trajectory = scored(unsure=(1.0, unsure), right=(1.0, right))
    assert trajectory.rewards == {"unsure": None, "right": 1.0} and trajectory.reward is None
    trajectory = scored(down=(0.0, down), right=(1.0, right))
    assert trajectory.reward is None and "the judge is down" in trajectory.failure
    failed = scored(Trajectory(TASK, stop=Stop.FAILED), right=(1.0, right))
    assert failed.rewards == {"right": None} and failed.reward is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: float("nan"), "reward 'odd': ValueError: it gave nan, not a finite number"),
        (lambda: float("inf"), "reward 'odd': ValueError: it gave inf"),
        (lambda: {}["x"], "reward 'odd': KeyError: 'x'"),
        (lambda: "yes", "reward 'odd': TypeError"),
    ],
)
def test_a_reward_that_raises_or_is_no_number_is_named_and_leaves_the_rollout_without_one(
    value, said
):
    def right(task, trajectory):
        return 1.0

    trajectory = scored(odd=(1.0, lambda task, trajectory: value()), right=(1.0, right))
    assert trajectory.rewards == {"odd": None, "right": 1.0} and trajectory.reward is None
    assert said in trajectory.failure and trajectory.stop is Stop.FINISHED


def test_rewards_hold_up_neither_each_other_nor_the_run():
    def slow(task, trajectory):
        time.sleep(0.3)
        return 1.0

    def hangs(task, trajectory):
        time.sleep(3600)

    async def every():
        runs = [Trajectory(TASK, stop=Stop.FINISHED) for _ in range(20)]
        judged = Set(slow=(1.0, slow)), Set(slow=(1.0, slow), hangs=(1.0, hangs))
        await asyncio.gather(*(loop.score(judged[0], run, 60) for run in runs[1:]))
        await loop.score(judged[1], runs[0], 1.0)
        return runs

    begun = time.perf_counter()
    hung, *runs = asyncio.run(every())
    assert [run.reward for run in runs] == [1.0] * 19
    assert time.perf_counter() - begun < 19 * 0.3
    assert hung.rewards == {"slow": 1.0, "hangs": None} and hung.reward is None
    assert "reward 'hangs': no end within 1 s" in hung.failure


def test_limits_must_be_positive():
    for name in ("max_turns", "turn_tokens", "max_tokens", "result_tokens", "seconds"):
        with pytest.raises(ConfigError, match=name):
            dataclasses.replace(LIMITS, **{name: 0})
    assert dataclasses.replace(LIMITS, max_calls=0).max_calls == 0
    with pytest.raises(ConfigError, match="max_calls"):
        dataclasses.replace(LIMITS, max_calls=-1)
