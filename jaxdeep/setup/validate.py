"""Tries a task set without a model: is it what the tool loop takes, and can its rewards be earned?

    found = try_out(taskset, chat, limits, count=64)
    found.wrong()                              sentences, one for each kind of problem
    require(taskset, chat, limits, "env")      ConfigError with the first, before a run begins

A script plays the policy: on each task that is tried it opens the environment, plays the perfect
episode (`gold`), which must earn the most, and says nothing at all, which must not. What is wrong
is one sentence that says how to write it. A run tries a few tasks before it loads or compiles
anything; `jaxdeep validate` tries more.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import inspect
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxdeep.agent.base import Env, Taskset, right_reward
from jaxdeep.agent.rollout import Limits, rollout, score, together
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.agent.tool import Tool
from jaxdeep.chat.format import ChatFormat
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.setup import tasksets
from jaxdeep.setup.tasksets import named as _named
from jaxdeep.types import Message, Stop, Task, Trajectory

TRIED = 4  # tasks that a run tries before it begins
MOST_IDS = 10_000  # tasks whose ids are read
MOST_TURNS = 64  # in which nothing is said
SEED = 0  # of the sample
AT_ONCE = 16  # tasks tried at a time
# Kinds of problems that are of the code, not of a task: one task is enough to find them.
OF_THE_CODE = {"task", "id", "env", "open", "tools", "episode"}
# Kinds that do not keep a run from learning: a hard task, a reward that is never 1.
OF_LEARNING = {"limits", "right"}


class Problem(NamedTuple):
    """Something wrong with one task, or with all: its kind, and a sentence."""

    kind: str
    said: str


class Tried(NamedTuple):
    """What trying one task gave: the tokens of its prompt, and what gold and silence earned; None
    where that could not be said."""

    prompt: int | None = None
    gold: float | None = None
    empty: float | None = None
    problems: tuple[Problem, ...] = ()


@dataclasses.dataclass
class Findings:
    """What was found of a task set of `total` tasks, some of which were played; `problems` are of
    the set itself."""

    total: int
    tasks: Sequence[Tried]
    problems: Sequence[Problem] = ()

    def wrong(self, strict: bool = True) -> list[str]:
        """One sentence for each kind of problem, with how many tasks have it. Without `strict`
        those of a task count only where every task that was tried has them."""
        return [said for said, wrong in self._judged(strict) if wrong]

    def notes(self, strict: bool = True) -> list[str]:
        """The sentences that `wrong` leaves out."""
        return [said for said, wrong in self._judged(strict) if not wrong]

    def _judged(self, strict: bool) -> list[tuple[str, bool]]:
        out = [(problem.said, True) for problem in self.problems]
        found = [problem for task in self.tasks for problem in task.problems]
        kinds = [dict.fromkeys(problem.kind for problem in task.problems) for task in self.tasks]
        counts = collections.Counter(kind for of_task in kinds for kind in of_task)
        for kind, count in counts.items():
            said = next(problem.said for problem in found if problem.kind == kind)
            of = f" ({count} of the {len(self.tasks)} tasks tried)" * (len(self.tasks) > 1)
            all_tasks = count == len(self.tasks)
            wrong = kind in OF_THE_CODE or strict or all_tasks
            if kind in OF_LEARNING:
                wrong = strict and (all_tasks or kind != "limits")
            out.append((said + of, wrong))
        return out

    def __str__(self) -> str:
        spans = {
            "prompts of {} tokens": [t.prompt for t in self.tasks],
            "perfect episodes earn {}": [t.gold for t in self.tasks],
            "silence earns {}": [t.empty for t in self.tasks],
        }
        said = [text.format(_span(values)) for text, values in spans.items() if _known(values)]
        if self.tasks and not _known([t.gold for t in self.tasks]):
            said.append("no perfect episode was played")
        return ", ".join([f"{len(self.tasks)} of {self.total} tasks tried", *said])


def require(taskset: Taskset, chat: ChatFormat, limits: Limits, name: str) -> list[str]:
    """Tries a few tasks of a run that is about to begin; `name` is the section's. ConfigError with
    the first problem that keeps it from learning; else lines that say what was found."""
    found = try_out(taskset, chat, limits)
    if wrong := found.wrong(strict=False):
        raise ConfigError(f"{name}: {wrong[0]}. `jaxdeep validate` says all that is wrong")
    return [f"{name}: {line}" for line in (str(found), *found.notes(strict=False))]


def try_out(
    taskset: Taskset, chat: ChatFormat, limits: Limits, count: int | None = TRIED
) -> Findings:
    """Tries `count` tasks, drawn with a fixed seed (None: all), and reads the ids of up to
    MOST_IDS. Nothing is raised for what is wrong with the task set."""
    total = len(taskset)
    order = range(total)
    drawn = order if total <= MOST_IDS else sorted(random.Random(SEED).sample(order, MOST_IDS))
    problems = list(id_problems(taskset, drawn))
    if problems:
        return Findings(total, (), problems)
    every = count is None or count >= total
    tried = order if every else sorted(random.Random(SEED).sample(order, count))

    async def play() -> list[Tried]:
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> Tried:
            async with slots:
                return await _try(taskset, taskset[index], chat, limits)

        return await together(one(index) for index in tried)

    return Findings(total, asyncio.run(play()))


def id_problems(taskset: Taskset, indices: Iterable[int]) -> Iterable[Problem]:
    """What is wrong with tasks and their ids; at most one problem."""
    seen: dict[str, int] = {}
    for index in indices:
        try:
            task = taskset[index]
        except Exception as error:
            yield Problem("task", f"making its task {index} raised {_error(error)}")
            return
        if not isinstance(task, Task):
            yield Problem(
                "task", f"its task {index} is {_named(task)}: return Task(id, question, answers)"
            )
            return
        if not isinstance(task.id, str) or not task.id.strip():
            yield Problem(
                "id",
                f"the id of its task {index} is {_named(task.id)}: an id is a text that is not empty, "
                f"such as Task({str(task.id).strip() or str(index)!r}, ...)",
            )
            return
        if task.id in seen:
            yield Problem(
                "id",
                f"its tasks {seen[task.id]} and {index} both have the id {task.id!r}: give each its "
                "own, so that rollouts of one task are compared with one another",
            )
            return
        seen[task.id] = index


async def _try(taskset: Taskset, task: Task, chat: ChatFormat, limits: Limits) -> Tried:
    """One task: its opening, then gold, then silence. What depends on something that failed is not
    tried."""
    try:
        env = taskset.env(task)
    except Exception as error:
        return _failed("env", f"env(task) of the task {task.id!r} raised {_error(error)}")
    if not isinstance(env, Env):
        return _failed(
            "env",
            f"env(task) gave {_named(env)}: return a fresh environment, an instance of a class that "
            "inherits from jaxdeep.agent.base.Env",
        )
    prompt, problem = await _prompt(env, task, chat, limits)
    if problem:
        return Tried(prompt, problems=(problem,))
    gold, problems = await _gold(taskset, task, chat, limits)
    silence = [""] * min(limits.max_turns, MOST_TURNS)
    silent = await _play(taskset, task, silence, chat, limits)
    empty = None
    if isinstance(silent, Problem):
        problems.append(silent)
    elif silent.failure:
        problems.append(_unjudged(task, silent, "an empty answer"))
    else:
        empty = silent.reward
    if gold is not None and empty is not None and empty >= gold:
        problems.append(
            Problem(
                "empty",
                f"an empty answer to the task {task.id!r} earns {empty:g} and its perfect episode "
                f"{gold:g}: nothing could be learned from such a reward",
            )
        )
    return Tried(prompt, gold, empty, tuple(problems))


async def _prompt(
    env: Env, task: Task, chat: ChatFormat, limits: Limits
) -> tuple[int | None, Problem | None]:
    """The tokens of the first prompt of an environment, which is opened and closed."""
    name = type(env).__name__
    try:
        opening = env.open()
        if not inspect.isawaitable(opening):
            return None, Problem("open", f"{name}.open is no coroutine: write async def open(self)")
        async with asyncio.timeout(limits.seconds):
            opening = await opening
        problem = _opening_problem(name, opening) or _tools_problem(name, env.tools)
        await env.close()
        if problem:
            return None, problem
        tokens = len(chat.opening(opening, [tool.schema for tool in env.tools]))
    except DataError as error:
        return None, Problem("open", f"what {name}.open gives cannot be written: {error}")
    except Exception as error:
        return None, Problem("open", f"opening and closing {name} raised {_error(error)}")
    if tokens >= limits.max_tokens:
        return tokens, Problem(
            "prompt",
            f"the prompt of the task {task.id!r} has {tokens} tokens, and "
            f"rollout.limits.max_tokens={limits.max_tokens} leaves no room for a token: raise it, or "
            "shorten the prompt",
        )
    return tokens, None


def _opening_problem(name: str, opening: Any) -> Problem | None:
    write = 'return a list such as [Message("user", self.task.question)]'
    if not isinstance(opening, list | tuple) or not opening:
        return Problem("open", f"{name}.open gave {_named(opening)}: {write}")
    for message in opening:
        if not isinstance(message, Message) or not isinstance(message.content, str):
            return Problem("open", f"{name}.open gave a list with {_named(message)} in it: {write}")
    return None


def _tools_problem(name: str, tools: Any) -> Problem | None:
    if not isinstance(tools, list | tuple):
        return Problem("tools", f"{name}.tools is {_named(tools)}: write a tuple, (self.search,)")
    for tool in tools:
        if not isinstance(tool, Tool):
            called = getattr(tool, "__name__", "NAME")
            return Problem(
                "tools",
                f"{name}.tools has {_named(tool)} in it: a tool is a function or method below the "
                f"decorator @tool, given as {called} or self.{called}",
            )
        if tool.unbound:
            return Problem(
                "tools",
                f"{name}.tools has {tool.name} from the class: write self.{tool.name}, in __init__",
            )
    names = [tool.name for tool in tools]
    if twice := next((n for n in names if names.count(n) > 1), None):
        return Problem("tools", f"{name}.tools has two tools of the name {twice!r}: rename one")
    return None


async def _gold(
    taskset: Taskset, task: Task, chat: ChatFormat, limits: Limits
) -> tuple[float | None, list[Problem]]:
    """What the perfect episode earns, and what is wrong with it; None where none is known."""
    try:
        episode = taskset.gold(task)
    except Exception as error:
        return None, [Problem("gold", f"gold of the task {task.id!r} raised {_error(error)}")]
    if episode is None:
        return None, []
    messages = isinstance(episode, list | tuple) and all(isinstance(m, Message) for m in episode)
    turns = [m for m in episode if m.role == "assistant"] if messages else []
    if not turns:
        return None, [Problem("episode", f"gold(task) gave {_named(episode)}: {tasksets.GOLD}")]
    played = await _play(taskset, task, turns, chat, limits)
    if isinstance(played, Problem):
        return None, [played]
    if played.failure or played.reward is None:
        return None, [_unjudged(task, played, "the perfect episode")]
    if played.stop.truncated:
        return None, [
            Problem(
                "limits",
                f"the perfect episode of the task {task.id!r} does not fit rollout.limits: it was "
                f"ended by {played.stop.value}",
            )
        ]
    if not played.metrics["right"]:
        name = right_reward(taskset)
        return played.reward, [
            Problem(
                "right",
                f"the perfect episode of the task {task.id!r} gets {played.rewards[name]:g} from the "
                f"reward {name!r}, which decides what is right: not 1, so gold or the reward is wrong, "
                "or the attribute `right` of the task set should name another reward",
            )
        ]
    return played.reward, []


async def _play(
    taskset: Taskset, task: Task, turns: Sequence[str | Message], chat: ChatFormat, limits: Limits
) -> Trajectory | Problem:
    """A scored rollout in which a script plays these turns."""
    try:
        policy = ScriptedPolicy(chat, turns)
        played = await rollout(taskset.env(task), task, policy, chat, limits=limits, seed=SEED)
    except DataError as error:
        return Problem("gold", f"gold of the task {task.id!r} cannot be written: {error}")
    except ValueError as error:  # of the script
        return Problem(
            "gold", f"gold of the task {task.id!r} ends before the episode does: {error}"
        )
    await score(taskset, played, limits.seconds)
    return played


def _unjudged(task: Task, played: Trajectory, what: str) -> Problem:
    """Why a rollout has no reward."""
    if played.stop is Stop.FAILED:
        return Problem("world", f"{what} to the task {task.id!r} failed: {played.failure}")
    if played.failure:
        return Problem("reward", f"{what} to the task {task.id!r} has no reward: {played.failure}")
    none = ", ".join(name for name, value in played.rewards.items() if value is None)
    return Problem("gold", f"{what} to the task {task.id!r} is not judged: {none} gave None")


def _failed(kind: str, said: str) -> Tried:
    return Tried(problems=(Problem(kind, said),))


def _error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _span(values: Iterable[float | None]) -> str:
    low, high = min(_known(values)), max(_known(values))
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
