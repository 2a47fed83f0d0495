"""The tool loop: an environment and a policy talk, and what they said becomes a `Trajectory`.

    rollout(env, task, policy, chat, ...)      one conversation
    group(taskset, task, policy, chat, ...)    several of one task, each in a fresh environment
    score(taskset, trajectory)                 its rewards by name, and their weighted total

One turn: the policy continues all tokens of the present branch; its tokens are kept exactly as
sampled; they are parsed; the calls in them run concurrently; only the world's new text is encoded
and appended. Before the next turn the environment may begin a new branch (`Env.fork`). The calls of
a turn that a budget cut are not made.

A branch holds what the policy wrote or was about to read. `Trajectory.messages` holds everything
that happened: what the world answers to the policy's last turn is there alone, since nobody read
it.

Failures: a mistake of the model becomes text it reads. A failure of the world (`WorldError`, and
whatever else the code of an environment or a tool raises) ends the rollout as FAILED; one of a
reward leaves the rollout without a reward. Exceptions of the policy and of this module are bugs of
ours and propagate. The environment is closed in every case.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import itertools
import math
import zlib
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np

from jaxdeep import trace
from jaxdeep.agent.base import Env, Policy, Reward, Taskset, right_reward
from jaxdeep.agent.tool import Tool, ToolResult, in_thread
from jaxdeep.chat.format import ChatFormat
from jaxdeep.errors import DataError, WorldError
from jaxdeep.settings import Above, AtLeast, section
from jaxdeep.types import (
    Branch,
    Completion,
    Message,
    Piece,
    Sampling,
    Stop,
    Task,
    ToolCall,
    Trajectory,
)

T = TypeVar("T")

METRICS = ("turns", "calls", "bad_calls", "sampled_tokens", "tool_seconds")
"""What every trajectory counts, over all its branches:

    turns            of the policy, a last one that was cut included
    calls            made: mistaken and unreadable ones count, those beyond `max_calls` and those
                     of a turn that was cut do not
    bad_calls        of these, those that were a mistake of the model's
    sampled_tokens   of the policy, forced ones left out
    tool_seconds     summed over calls, which overlap

This is the only definition: training metrics, evaluation tables and pages all read
`Trajectory.metrics`. `tool/NAME/COUNT` is there too for each tool that was called, see `COUNTS`."""

COUNTS = ("calls", "failed", "seconds", "cached")
"""Of one tool: its calls; how many of them failed, by a mistake of the model's or of the world; the
seconds they took together; how many were answered from a cache."""

SAMPLING = Sampling()
"""How turns are drawn unless the caller says otherwise."""

NO_CALLS_LEFT = "No tool calls are left: this one was not made. Give your final answer now."

ENV_SEED = 2**31
"""The environment's seed is derived from the rollout's with this number, those of turns with 0, 1,
2, ..."""


@section(slots=True)
class Limits:
    """Bounds of one rollout, all inclusive. Those of turns, calls and seconds are over all
    branches."""

    max_turns: Annotated[int, AtLeast(1), "turns of the policy"]
    max_calls: Annotated[int, AtLeast(0), "calls of tools, unreadable ones included"]
    turn_tokens: Annotated[int, AtLeast(1), "tokens sampled in one turn"]
    max_tokens: Annotated[
        int, AtLeast(1), "tokens of each branch, its prompt included: a row of a batch holds it"
    ]
    result_tokens: Annotated[
        int, AtLeast(1), "tokens of one tool result; the note that it was cut comes on top"
    ]
    seconds: Annotated[
        float, Above(0), "by the clock, of the conversation; opening and closing have as much each"
    ]


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
    """One conversation from `env.open` to its stop. The seeds of the turns and of the environment
    follow from `seed`."""
    trajectory = Trajectory(task, seed, metrics=dict.fromkeys(METRICS, 0.0))
    stop = tuple(dict.fromkeys((*sampling.stop, *chat.stop_ids)))
    sampling = dataclasses.replace(sampling, stop=stop)
    try:
        env.seed = _derive(seed, ENV_SEED)
        with trace.span("", task.id, seed=seed), _noted(trajectory, void=True):
            opening = await _world("env.open", env.open(), limits.seconds)
            if not opening or not all(isinstance(message, Message) for message in opening):
                raise WorldError(f"env.open gave {opening!r:.60}, which is no list of messages")
            loop = _Loop(trajectory, env, _by_name(env.tools), policy, chat, limits, sampling)
            try:
                async with asyncio.timeout(limits.seconds) as clock:
                    trajectory.stop = await loop.run(opening)
            except TimeoutError:
                if not clock.expired():  # not the rollout's clock: the policy's own, a bug of ours
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
    """`size` concurrent rollouts of one task, in order, with distinct seeds that follow from `seed`
    and the task's id. If one raises, the others are cancelled and closed before this raises."""
    if not isinstance(task.id, str):
        raise DataError(f"the id of a task is {task.id!r}, a {type(task.id).__name__}, not a text")
    first = _derive(seed, zlib.crc32(task.id.encode()))
    seeds = [(first + index) % 2**31 for index in range(size)]
    envs = [taskset.env(task) for _ in seeds]
    same = {"limits": limits, "sampling": sampling}
    return await together(
        rollout(env, task, policy, chat, seed=seed, **same)
        for env, seed in zip(envs, seeds, strict=True)
    )


async def score(taskset: Taskset, trajectory: Trajectory, seconds: float | None = None) -> None:
    """Fill in the rewards by name and the weighted total. Each may take `seconds`; a plain function
    is called in a thread, so that one that waits does not hold up other rollouts.

    A reward is None where the trajectory cannot be judged: the world failed, the function returned
    None, raised, took too long, or returned NaN or an infinity. The last three are noted in
    `failure` with the reward's name. One None makes the total None.

    `metrics["right"]` is 1 where the reward that decides it (`base.Taskset`) is 1 or more, else 0.
    """
    trajectory.rewards = dict.fromkeys(taskset.rewards)
    trajectory.reward, trajectory.metrics["right"] = None, 0.0
    if trajectory.stop is Stop.FAILED:
        return
    for name, (_, judge) in taskset.rewards.items():
        with trace.span("reward", name), _noted(trajectory, void=False):
            value = await _world(f"reward {name!r}", _judged(judge, trajectory), seconds)
            trajectory.rewards[name] = value
    decisive = trajectory.rewards[right_reward(taskset)]
    trajectory.metrics["right"] = float(decisive is not None and decisive >= 1)
    if None not in trajectory.rewards.values():
        weights = ((weight, trajectory.rewards[n]) for n, (weight, _) in taskset.rewards.items())
        trajectory.reward = float(sum(weight * value for weight, value in weights))


def mean_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The mean of each of `METRICS` over rollouts."""
    return {
        name: float(np.mean([t.metrics.get(name, 0.0) for t in trajectories])) for name in METRICS
    }


def tools_of(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """For each tool that was called: `tool/NAME/calls` per rollout, the shares of them that
    `failed` and that were `cached`, and the mean `latency` of a call in seconds."""
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
    if value is None:
        return None
    if isinstance(value, str | bytes) or np.ndim(value):
        raise TypeError(f"it gave {value!r:.60}, not a number, or None where it cannot judge")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it gave {number}, not a finite number, or None where it cannot judge")
    return number


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
    prompt: list[int] = dataclasses.field(default_factory=list)  # all tokens of the present branch
    messages: list[Message] = dataclasses.field(default_factory=list)  # what the branch says
    warned: bool = False  # the model was told that no calls are left

    async def run(self, opening: Sequence[Message]) -> Stop:
        """Turns until one of them, the world or a limit ends the conversation."""
        limits = self.limits
        self.trajectory.messages += opening
        self._begin_branch(opening)
        for turn in range(limits.max_turns):
            room = limits.max_tokens - len(self.prompt)
            if room < 1:
                return Stop.MAX_TOKENS
            message, closed, cut = await self._ask(turn, min(limits.turn_tokens, room))
            if cut:
                return Stop.MAX_TOKENS if room <= limits.turn_tokens else Stop.TURN_TOKENS
            if message.calls and self.warned:
                return Stop.MAX_CALLS
            if message.calls:
                answer, done = await self._answer(message.calls)
            else:
                answer, done = await _world("env.reply", self.env.reply(message)), False
                if not answer:
                    return Stop.FINISHED
            self._say(answer)
            if done:
                return Stop.TOOL_DONE
            if turn + 1 < limits.max_turns and not await self._go_on(answer, closed):
                return Stop.MAX_TOKENS
        return Stop.MAX_TURNS

    async def _ask(self, turn: int, budget: int) -> tuple[Message, bool, bool]:
        """The policy's next message, whether its turn is closed, and whether the budget cut it."""
        seed = _derive(self.trajectory.seed, turn)
        with trace.span("policy", f"turn {turn + 1}"):
            completion = await self.policy(
                list(self.prompt), seed=seed, max_new=budget, sampling=self.sampling
            )
        tokens, forced = completion.tokens, completion.forced
        marks = len(tokens if forced is None else forced)
        if not len(tokens) == len(completion.logps) == marks or len(tokens) > budget:
            raise ValueError(
                f"the policy gave {len(tokens)} tokens, {len(completion.logps)} log-probabilities "
                f"and {marks} marks of forced tokens for a budget of {budget}"
            )
        for piece in _by_author(completion):
            self._append(piece)
        metrics = self.trajectory.metrics
        metrics["turns"] += 1
        metrics["sampled_tokens"] = float(self.trajectory.sampled)
        message = self.chat.parse(tokens)
        self._say([message])
        closed = self.chat.is_closed(tokens)
        return message, closed, completion.stop == "length"

    async def _answer(self, calls: Sequence[ToolCall]) -> tuple[list[Message], bool]:
        """The results of a turn's calls as the model reads them, in order, and whether one of them
        ended the episode. Calls within the limit run concurrently, the rest are refused."""
        metrics = self.trajectory.metrics
        left = self.limits.max_calls - int(metrics["calls"])
        made, refused = calls[:left], calls[left:]
        # A model that is told so and calls again is stopped, see `run`.
        self.warned = bool(refused)
        metrics["calls"] += len(made)
        results = await together(self._call(call) for call in made)
        metrics["bad_calls"] += sum(result.failed for result in results)
        metrics["tool_seconds"] += sum(result.seconds for result in results)
        results += [ToolResult(NO_CALLS_LEFT)] * len(refused)
        # The only place where results are cut, so that environments, rewards and the model read the
        # same text.
        texts = [self._shorten(result.text) for result in results]
        for call, text in zip(calls, texts, strict=True):
            await _world("env.shown", self.env.shown(call, text))
        messages = [
            Message("tool", text, name=call.name, call_id=call.id)
            for call, text in zip(calls, texts, strict=True)
        ]
        return messages, any(result.done for result in results)

    async def _go_on(self, answer: Sequence[Message], closed: bool) -> bool:
        """Prepare the prompt of the next turn: the present branch with the world's answer, or a new
        branch. False where the present one is full and the environment begins no other."""
        tokens = self.chat.reply(answer, closed=closed)
        room = self.limits.max_tokens - len(self.prompt) - len(tokens)
        opening = await _world("env.fork", self.env.fork(list(self.messages), room))
        if opening is None:
            if room < 1:
                return False
            self._append(Piece(tokens, "world"))
            return True
        try:
            self._begin_branch(opening)
        except DataError as error:  # it repeats what the model wrote, which may not be writable
            raise WorldError(f"env.fork: {error}") from error
        return True

    async def _call(self, call: ToolCall) -> ToolResult:
        names = ", ".join(self.tools)
        available = f"The tools are: {names}." if names else "There are no tools here."
        if call.error:
            return ToolResult(
                f"This call could not be read: {call.error}. {available}", failed=True
            )
        tool = self.tools.get(call.name)
        if tool is None:
            return ToolResult(f"There is no tool {call.name!r}. {available}", failed=True)
        # Counted as failed until there is an answer: without one, the error leaves from here.
        self._count(tool.name, calls=1, failed=1)
        with trace.span("tools", tool.name):
            result = await _world(f"tool {tool.name}", tool.call(call.arguments))
        self._count(
            tool.name, failed=result.failed - 1, seconds=result.seconds, cached=result.cached
        )
        return result

    def _count(self, tool: str, **amounts: float) -> None:
        metrics = self.trajectory.metrics
        for count in COUNTS:
            key = f"tool/{tool}/{count}"
            metrics[key] = metrics.get(key, 0.0) + amounts.get(count, 0)

    def _shorten(self, text: str) -> str:
        """The text, cut to the tokens that a result may have, with a note that says so."""
        tokenizer, most = self.chat.tokenizer, self.limits.result_tokens
        ids = tokenizer.encode(text)
        if len(ids) <= most:
            return text
        kept = tokenizer.decode(ids[:most]).rstrip("\ufffd")  # a character cut in two
        return f"{kept}\n[cut here: {most} of {len(ids)} tokens shown]"

    def _begin_branch(self, opening: Sequence[Message]) -> None:
        schemas = [tool.schema for tool in self.tools.values()]
        tokens = self.chat.opening(opening, schemas)
        self.trajectory.branches.append(Branch())
        self.prompt, self.messages = [], list(opening)
        self._append(Piece(tokens, "world"))

    def _append(self, piece: Piece) -> None:
        self.trajectory.branches[-1].pieces.append(piece)
        self.prompt += piece.tokens

    def _say(self, messages: Sequence[Message]) -> None:
        self.messages += messages
        self.trajectory.messages += messages


def _by_author(completion: Completion) -> list[Piece]:
    """A turn as pieces. Forced tokens become the world's: then masks, counts of sampled tokens and
    stored log-probabilities leave them out without knowing of them."""
    tokens, logps, version = completion.tokens, completion.logps, completion.version
    if completion.forced is None:
        return [Piece(tokens, "policy", logps, version=version)]
    pieces, start = [], 0
    for forced, run in itertools.groupby(completion.forced):
        end = start + len(list(run))
        span, start = slice(start, end), end
        if forced:
            pieces.append(Piece(tokens[span], "world"))
        else:
            pieces.append(Piece(tokens[span], "policy", logps[span], version=version))
    return pieces


def _by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise ValueError(f"two tools of one name: {sorted(tool.name for tool in tools)}")
    if unbound := [tool.name for tool in tools if tool.unbound]:
        raise TypeError(f"{unbound} are methods: give them as self.NAME, not from the class")
    return by_name


async def _world(what: str, work: Awaitable[T], seconds: float | None = None) -> T:
    """The result of code that is the world's. Whatever it raises becomes a `WorldError`, and so
    does no result within `seconds`."""
    clock = asyncio.timeout(seconds)
    try:
        async with clock:
            return await work
    except WorldError:
        raise
    except Exception as error:
        if clock.expired():
            reason = f"no end within {seconds:g} s"
        else:
            reason = f"{type(error).__name__}: {error}"
        raise WorldError(f"{what}: {reason}") from error


@contextlib.contextmanager
def _noted(trajectory: Trajectory, *, void: bool) -> Iterator[None]:
    """The only place that catches the world's failures. They are noted on the trajectory, and with
    `void` they end the rollout as FAILED."""
    try:
        yield
    except WorldError as error:
        note = f"{type(error).__name__}: {error}"
        trajectory.failure = "; ".join(filter(None, (trajectory.failure, note)))
        if void:
            trajectory.stop = Stop.FAILED


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. If one fails, the others are cancelled and awaited before this raises,
    so that nothing runs on in an environment that is about to be closed."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _derive(seed: int, number: int) -> int:
    """A seed of 31 bits that follows from a seed and a number."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1
