"""The tool loop: an environment and a policy talk, and what they said becomes a `Trajectory`.

    rollout(env, task, policy, chat, ...)      one conversation
    group(taskset, task, policy, chat, ...)    several of one task, each in a fresh environment
    score(taskset, trajectory)                 its rewards by name, and their weighted total

One turn: the policy continues *all tokens so far*; its tokens are kept exactly as sampled; they are
parsed; the calls in them run at once; only the world's new text is encoded and appended. A turn that
was cut runs nothing. `pieces` holds what the policy wrote or was about to read, `messages` all that
happened: what the world says after the last turn of a policy is in `messages` only.

Failures: the model's become text it reads; the world's (`WorldError`, and whatever else the code of
an environment or a tool raises) end this rollout as FAILED, and those of a reward leave it without one;
those of the policy and of this code are ours and propagate. Whatever happens, the environment is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import math
import zlib
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxdeep import trace
from jaxdeep.agent.base import Env, Policy, Reward, Taskset
from jaxdeep.agent.tool import Tool, ToolResult, in_thread
from jaxdeep.chat.format import ChatFormat
from jaxdeep.errors import ConfigError, WorldError
from jaxdeep.types import Message, Piece, Sampling, Stop, Task, ToolCall, Trajectory

T = TypeVar("T")

METRICS = ("turns", "calls", "bad_calls", "sampled_tokens", "tool_seconds")
"""On every trajectory; `tool/NAME/COUNT` is there for each tool that was called."""

COUNTS = ("calls", "failed", "seconds", "cached")
"""Of one tool: calls, those of them that failed (the model's mistakes and the world's) or were answered
from a cache, and the seconds that all of them took."""

SAMPLING = Sampling()
"""How turns are drawn unless the caller says otherwise."""

NO_CALLS_LEFT = "No tool calls are left: this one was not made. Give your final answer now."


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one rollout, all inclusive."""

    max_turns: int  # of the policy
    max_calls: int  # of tools, unreadable ones included
    turn_tokens: int  # sampled in one turn
    max_tokens: int  # of the whole conversation, the prompt included
    result_tokens: int  # of one tool result; the mark that says it was cut comes on top
    seconds: float  # by the clock, for the conversation; opening and closing have as much each

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (value == 0 and name != "max_calls"):
                raise ConfigError(f"the limit {name} must be positive, got {value}")


async def rollout(
    env: Env,
    task: Task,
    policy: Policy,
    chat: ChatFormat,
    *,
    limits: Limits,
    seed: int,
    sampling: Sampling = SAMPLING,
) -> Trajectory:
    """One conversation from `env.open` to its stop. The turns' seeds follow from `seed`."""
    trajectory = Trajectory(task, seed, metrics=dict.fromkeys(METRICS, 0.0))
    stop = tuple(dict.fromkeys((*sampling.stop, *chat.stop_ids)))
    sampling = dataclasses.replace(sampling, stop=stop)
    try:
        with trace.span("", task.id, seed=seed), _noted(trajectory, void=True):
            opening = await _world("env.open", env.open(), limits.seconds)
            loop = _Loop(trajectory, env, _by_name(env.tools), policy, chat, limits, sampling)
            try:
                async with asyncio.timeout(limits.seconds) as clock:
                    trajectory.stop = await loop.run(opening)
            except TimeoutError:
                if not clock.expired():
                    raise
                trajectory.stop = Stop.TIMEOUT
    finally:
        with _noted(trajectory, void=True):
            await _world("env.close", env.close(), limits.seconds)
    return trajectory


async def group(
    taskset: Taskset,
    task: Task,
    policy: Policy,
    chat: ChatFormat,
    *,
    size: int,
    limits: Limits,
    seed: int,
    sampling: Sampling = SAMPLING,
) -> list[Trajectory]:
    """`size` rollouts of one task at once, in order, with distinct seeds that follow from `seed` and
    the task's id. If one raises, the others are cancelled and closed first."""
    first = _derive(seed, zlib.crc32(task.id.encode()))
    seeds = [(first + index) % 2**31 for index in range(size)]
    envs = [taskset.env(task) for _ in seeds]
    same = {"limits": limits, "sampling": sampling}
    return await together(
        rollout(env, task, policy, chat, seed=seed, **same)
        for env, seed in zip(envs, seeds, strict=True)
    )


async def score(taskset: Taskset, trajectory: Trajectory, seconds: float | None = None) -> None:
    """Fill in the rewards by name and the weighted total. Each may take so many `seconds`; one that is no
    coroutine is called in a thread, and others go on meanwhile.

    A reward is None where the trajectory cannot be judged: the world failed, the function says so, it
    raised, took too long, or gave what is no number (noted in `failure`, with its name). One None makes the
    total None.
    """
    trajectory.rewards = dict.fromkeys(taskset.rewards)
    trajectory.reward = None
    if trajectory.stop is Stop.FAILED:
        return
    for name, (_, judge) in taskset.rewards.items():
        with trace.span("reward", name), _noted(trajectory, void=False):
            value = await _world(f"reward {name!r}", _judged(judge, trajectory), seconds)
            trajectory.rewards[name] = value
    if None not in trajectory.rewards.values():
        weights = ((weight, trajectory.rewards[n]) for n, (weight, _) in taskset.rewards.items())
        trajectory.reward = float(sum(weight * value for weight, value in weights))


def tools_of(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Of each tool that was called: `tool/NAME/calls` a rollout, the shares of them that `failed` and
    that were `cached`, and the mean `latency` in seconds."""
    trajectories = list(trajectories)
    keys = {key for t in trajectories for key in t.metrics if key.startswith("tool/")}
    total = {key: sum(t.metrics.get(key, 0.0) for t in trajectories) for key in sorted(keys)}
    out = {}
    for key, calls in total.items():
        name, _, count = key.rpartition("/")
        if count == "calls":
            out[key] = calls / len(trajectories)
            out[f"{name}/latency"] = total[f"{name}/seconds"] / calls
            for part in ("failed", "cached"):
                out[f"{name}/{part}"] = total[f"{name}/{part}"] / calls
    return out


async def _judged(judge: Reward, trajectory: Trajectory) -> float | None:
    if inspect.iscoroutinefunction(judge):
        value = await judge(trajectory.task, trajectory)
    else:
        value = await in_thread("reward", judge, trajectory.task, trajectory)
        value = await value if inspect.isawaitable(value) else value
    if value is not None and not math.isfinite(value):
        raise ValueError(f"it is {value}")
    return None if value is None else float(value)


@dataclasses.dataclass(slots=True)
class _Loop:
    """One conversation in progress."""

    trajectory: Trajectory
    env: Env
    tools: dict[str, Tool]
    policy: Policy
    chat: ChatFormat
    limits: Limits
    sampling: Sampling
    tokens: list[int] = dataclasses.field(default_factory=list)  # all so far: the next prompt
    calls: int = 0
    warned: bool = False  # that no calls are left

    async def run(self, opening: Sequence[Message]) -> Stop:
        limits, metrics = self.limits, self.trajectory.metrics
        self.trajectory.messages += opening
        schemas = [tool.schema for tool in self.tools.values()]
        self._append(Piece(self.chat.opening(opening, schemas), "world"))
        for turn in range(limits.max_turns):
            room = limits.max_tokens - len(self.tokens)
            if room < 1:
                return Stop.MAX_TOKENS
            message, closed, cut = await self._ask(turn, min(limits.turn_tokens, room))
            metrics["turns"] += 1
            if cut:
                return Stop.MAX_TOKENS if room <= limits.turn_tokens else Stop.TURN_TOKENS
            if message.calls and self.warned:
                return Stop.MAX_CALLS
            if message.calls:
                results = await self._answer(message.calls)
                said = [
                    Message("tool", self._shorten(result.text), name=call.name)
                    for call, result in zip(message.calls, results, strict=True)
                ]
            else:
                results = []
                said = await _world("env.reply", self.env.reply(message))
                if not said:
                    return Stop.FINISHED
            self.trajectory.messages += said
            if any(result.done for result in results):
                return Stop.TOOL_DONE
            if turn + 1 < limits.max_turns:
                tokens = self.chat.reply(said, closed=closed)
                if len(self.tokens) + len(tokens) >= limits.max_tokens:
                    return Stop.MAX_TOKENS
                self._append(Piece(tokens, "world"))
        return Stop.MAX_TURNS

    async def _ask(self, turn: int, budget: int) -> tuple[Message, bool, bool]:
        """The policy's next message, whether its turn is closed, and whether the budget cut it."""
        seed = _derive(self.trajectory.seed, turn)
        with trace.span("policy", f"turn {turn + 1}"):
            said = await self.policy(
                list(self.tokens), seed=seed, max_new=budget, sampling=self.sampling
            )
        if len(said.tokens) != len(said.logps) or len(said.tokens) > budget:
            raise ValueError(
                f"the policy gave {len(said.tokens)} tokens and {len(said.logps)} log-probabilities "
                f"for a budget of {budget}"
            )
        self._append(Piece(said.tokens, "policy", said.logps, version=said.version))
        self.trajectory.metrics["sampled_tokens"] += len(said.tokens)
        message = self.chat.parse(said.tokens)
        self.trajectory.messages.append(message)
        closed = self.chat.is_closed(said.tokens)
        return message, closed, said.stop == "length"

    async def _answer(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """A result for each call, in order; those within the limit run at once."""
        left = max(self.limits.max_calls - self.calls, 0)
        made, refused = calls[:left], calls[left:]
        self.calls += len(made)
        self.warned = bool(refused)
        results = await together(self._call(call) for call in made)
        metrics = self.trajectory.metrics
        metrics["calls"] = float(self.calls)
        metrics["bad_calls"] += sum(result.failed for result in results)
        metrics["tool_seconds"] += sum(result.seconds for result in results)
        return results + [ToolResult(NO_CALLS_LEFT)] * len(refused)

    async def _call(self, call: ToolCall) -> ToolResult:
        names = ", ".join(self.tools)
        there = f"The tools are: {names}." if names else "There are no tools here."
        if call.error:
            return ToolResult(f"This call could not be read: {call.error}. {there}", failed=True)
        tool = self.tools.get(call.name)
        if tool is None:
            return ToolResult(f"There is no tool {call.name!r}. {there}", failed=True)
        self._count(tool.name, calls=1, failed=1)  # until there is an answer
        with trace.span("tools", tool.name):
            result = await _world(f"tool {tool.name}", tool.call(call.arguments))
        self._count(
            tool.name, failed=result.failed - 1, seconds=result.seconds, cached=result.cached
        )
        return result

    def _count(self, tool: str, **more: float) -> None:
        metrics = self.trajectory.metrics
        for count in COUNTS:
            key = f"tool/{tool}/{count}"
            metrics[key] = metrics.get(key, 0.0) + more.get(count, 0)

    def _shorten(self, text: str) -> str:
        """The text, cut visibly to the tokens a result may have."""
        tokenizer, most = self.chat.tokenizer, self.limits.result_tokens
        ids = tokenizer.encode(text)
        if len(ids) <= most:
            return text
        kept = tokenizer.decode(ids[:most]).rstrip("�")  # a character cut in two
        return f"{kept}\n[cut here: {most} of {len(ids)} tokens shown]"

    def _append(self, piece: Piece) -> None:
        self.trajectory.pieces.append(piece)
        self.tokens += piece.tokens


def _by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    named = {tool.name: tool for tool in tools}
    if len(named) < len(tools):
        raise ValueError(f"two tools of one name: {sorted(tool.name for tool in tools)}")
    if unbound := [tool.name for tool in tools if tool.unbound]:
        raise TypeError(f"{unbound} are methods: give them as self.NAME, not from the class")
    return named


async def _world(what: str, work: Awaitable[T], seconds: float | None = None) -> T:
    """What the world's code gives back. Whatever it raises, or no answer in time, is a `WorldError`."""
    clock = asyncio.timeout(seconds)
    try:
        async with clock:
            return await work
    except WorldError:
        raise
    except Exception as error:
        why = (
            f"no end within {seconds:g} s"
            if clock.expired()
            else f"{type(error).__name__}: {error}"
        )
        raise WorldError(f"{what}: {why}") from error


@contextlib.contextmanager
def _noted(trajectory: Trajectory, *, void: bool) -> Iterator[None]:
    """The one place that catches the world's failures: noted, and with `void` the end of a rollout."""
    try:
        yield
    except WorldError as error:
        note = f"{type(error).__name__}: {error}"
        trajectory.failure = "; ".join(filter(None, (trajectory.failure, note)))
        if void:
            trajectory.stop = Stop.FAILED


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. If one fails the rest are cancelled, and have ended when this raises."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _derive(seed: int, branch: int) -> int:
    """A seed of 31 bits for one branch below a seed."""
    return int(np.random.SeedSequence([seed, branch]).generate_state(1)[0]) >> 1
