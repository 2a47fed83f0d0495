"""Which tasks a run draws, and rollouts that begin before their step: how old their policy may be,
what a run that goes on draws, how they end."""

import asyncio
import collections
import contextlib
import json
import threading
import time
import types

import pytest
from ml_collections import ConfigDict
from run import small

from jaxdeep import config as configs
from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy import facts
from jaxdeep.rl import algorithms
from jaxdeep.setup import explore
from jaxdeep.setup.sections import RolloutConfig, TrainConfig
from jaxdeep.signals import Termination
from jaxdeep.types import Message, Task

LIMITS = Limits(
    max_turns=2, max_calls=1, turn_tokens=20, max_tokens=90, result_tokens=9, seconds=9.0
)


class World(Env):
    opened = closed = 0

    def __init__(self, task):
        self.task = task

    async def open(self):
        World.opened += 1
        return [Message("user", self.task.question)]

    async def close(self):
        World.closed += 1


class Tasks:
    """Tasks of which some are always solved, some never, the others by every second rollout."""

    def __init__(self, count=12):
        self.rewards = {"right": (1.0, self.right)}
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Task(str(index), f"task {index}", meta={"kind": index % 4})

    def env(self, task):
        return World(task)

    def right(self, task, trajectory):
        return {0: 0.0, 1: 1.0}.get(task.meta["kind"], float(trajectory.seed % 2))


class Policy:
    """Says "done" in any conversation. `version` is the test's to count; `wait` is set while it may
    go on."""

    def __init__(self, chat):
        self.script, self.chat, self.version = None, chat, 0
        self.heard, self.wait = collections.Counter(), threading.Event()
        self.serving = contextlib.nullcontext
        self.wait.set()

    async def __call__(self, prompt, **how):
        version = self.version
        self.heard[version] += 1
        while not self.wait.is_set():
            await asyncio.sleep(0.001)
        said = await ScriptedPolicy(self.chat, ["done"])(prompt, **how)
        return said._replace(version=version)


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer(facts.tokenizer(small.VOCABULARY)), "none")


@contextlib.contextmanager
def exploring(chat, *, done=0, last=1000, position=None, seed=0, **settings):
    config = ConfigDict(dict(grpo=dict(prompts=4, group=4, tolerance=1e-4) | settings))
    run = types.SimpleNamespace(
        grpo=configs.build(algorithms.GrpoConfig, algorithms.expand(config).grpo, "grpo"),
        train=TrainConfig(steps=last, seed=seed),
        rollout=RolloutConfig(limits=LIMITS, slots=8),
    )
    explorer = explore.Explorer(Tasks(), Policy(chat), chat, run, done, position)
    try:
        yield explorer
    finally:
        explorer.close()


def steps(explorer, numbers):
    """The tasks and rewards of each step; an update follows it."""
    out = []
    for n in numbers:
        groups = explorer.groups(n, Termination()).groups
        explorer.engine.version += 1
        out.append([(g[0].task.id, [t.reward for t in g]) for g in groups])
    return out


def until(is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def kinds(groups):
    return [int(task) % 4 for task, _ in groups]


def test_groups_of_equal_rewards_are_replaced_until_there_are_enough(chat):
    with exploring(chat, flat="resample", tries=9) as explorer:
        found = steps(explorer, range(1, 6))
    for groups in found:
        tasks = [task for task, _ in groups]
        assert len(set(tasks)) == len(tasks)  # no task twice in a step
        assert sum(kind > 1 for kind in kinds(groups)) == 4 and kinds(groups)[-1] > 1
        assert all(rewards[0] != rewards[1] for task, rewards in groups if int(task) % 4 > 1)
    with exploring(chat) as explorer:
        assert [len(groups) for groups in steps(explorer, range(1, 4))] == [4, 4, 4]


def test_drawing_ends_after_so_many_tries_and_when_no_task_is_left(chat):
    with exploring(chat, flat="resample", tries=1) as explorer:
        assert len(steps(explorer, [1])[0]) == 4
    with exploring(chat, flat="resample", tries=99, prompts=10) as explorer:
        (all_of_them,) = steps(explorer, [1])
    assert sorted(int(task) for task, _ in all_of_them) == list(range(12))


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("flat", ["drop", "resample"])
def test_drawing_is_the_same_again_and_goes_on_where_it_was_saved(chat, flat, ahead):
    how = dict(flat=flat, ahead=ahead, curriculum=dict(low=0.2, high=0.8, rest=0.3), seed=3)
    with exploring(chat, **how) as explorer:
        first = steps(explorer, range(1, 7))
        saved = json.loads(json.dumps(explorer.position()))
        rest = steps(explorer, range(7, 11))
    with exploring(chat, **how) as explorer:
        assert steps(explorer, range(1, 11)) == first + rest
    with exploring(chat, done=6, position=saved, **how) as explorer:
        assert steps(explorer, range(7, 11)) == rest


def test_a_curriculum_prefers_what_is_solved_sometimes(chat):
    with exploring(chat, curriculum=dict(low=0.2, high=0.8, rest=0.1)) as explorer:
        found = steps(explorer, range(1, 61))
    seen = collections.Counter(k for groups in found for k in kinds(groups))
    assert seen[2] + seen[3] > 5 * (seen[0] + seen[1])
    rates = explorer.walk.rates
    assert {rates[i] for i in range(0, 12, 4)} == {0.0} and rates[2] == 0.5


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_token_is_from_a_policy_older_than_so_many_updates(chat, ahead):
    with exploring(chat, ahead=ahead, last=6) as explorer:
        for n in range(1, 7):
            groups = explorer.groups(n, Termination()).groups
            oldest = max(n - 1 - ahead, 0)
            versions = {
                p.version for g in groups for t in g for p in t.pieces if t.sampled and p.logps
            }
            assert oldest <= min(versions) and max(versions) <= n - 1
            # what comes next is begun, and all it waits for is this step's update
            begun = 16 * min(n + ahead, 6)
            until(lambda n=begun: sum(explorer.engine.heard.values()) >= n)
            assert sum(explorer.engine.heard.values()) == begun
            explorer.engine.version += 1
        assert explorer.position()["drawn"] == []
    assert len(explorer.engine.heard) == 6 - ahead  # the first steps are all begun at once


def test_a_run_that_goes_on_takes_the_tasks_of_the_steps_that_were_begun(chat):
    with exploring(chat, ahead=1) as explorer:
        whole = steps(explorer, range(1, 9))
    with exploring(chat, ahead=1) as explorer:
        parts = steps(explorer, range(1, 4))
        saved = explorer.position()
    assert [len(tasks) for tasks in saved["drawn"]] == [4]
    for more, ahead in ((range(4, 6), 0), (range(6, 9), 2)):  # also with another setting
        with exploring(chat, done=more[0] - 1, position=saved, ahead=ahead) as explorer:
            parts += steps(explorer, more)
            saved = explorer.position()
    assert parts == whole


def test_what_is_under_way_at_the_end_is_dropped_with_its_worlds_closed(chat):
    World.opened = World.closed = 0
    with exploring(chat, ahead=1) as explorer:
        steps(explorer, [1])
        explorer.engine.wait.clear()
        with Termination() as ending:
            ending.asked = True
            assert explorer.groups(2, ending) is None  # begins step 3
        until(lambda: World.opened == 16 * 3)
        assert World.closed < World.opened
    assert World.closed == World.opened == 16 * 3


def test_an_error_ahead_is_raised_at_its_step(chat):
    with exploring(chat) as explorer:
        bad = steps(explorer, [1, 2, 3])[2][0][0]
    with exploring(chat, ahead=1) as explorer:
        explorer.taskset.env = lambda task: World(task) if task.id != bad else {}[task.id]
        steps(explorer, [1, 2])  # begins step 3
        with pytest.raises(KeyError, match=bad):
            explorer.groups(3, Termination())
