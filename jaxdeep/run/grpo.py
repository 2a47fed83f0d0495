"""Improve a policy by GRPO on its own tool-using rollouts.

    P tasks -> P x G rollouts through the tool loop -> rewards -> group advantages -> packed batches
    -> one optimizer pass, or several -> the new adapter to the sampler, and again

`grpo.algorithm` says by which rules (`rl.algorithms`). At the first update of every run the
trainer's log-probabilities must be within `grpo.tolerance` of the sampler's, or the run stops. Each
step writes a row of `metrics.jsonl` and its rollouts to `rollouts/`; the same command resumes a run
that was stopped. With `grpo.ahead` rollouts of the next steps are sampled while the trainer updates
(`setup.explore`).

Several processes (`parallel.hosts`) share the tasks of a step: each has an engine and tool loops of
its own. Then the rollouts are all-gathered, and all take together the step that one process would
take. `grpo_minimal.py` beside this file is the same loop for one process, without resume, guard or
boards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import programs, trace
from jaxdeep.agent import record
from jaxdeep.agent.base import Taskset
from jaxdeep.chat.format import ChatFormat
from jaxdeep.console import progress, say
from jaxdeep.data.pack import pack
from jaxdeep.errors import DivergedError
from jaxdeep.eval import harness
from jaxdeep.metrics import read_metrics
from jaxdeep.model import tensors
from jaxdeep.parallel import exchange, hosts
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl import advantages, algorithms, summary, trouble
from jaxdeep.sample import sizes
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import past, resume, validate, weights
from jaxdeep.setup.explore import Explorer, Sampled
from jaxdeep.setup.monitor import Monitor
from jaxdeep.setup.runs import GrpoRun
from jaxdeep.setup.sections import BatchConfig, check_extras
from jaxdeep.signals import ENDED, Termination
from jaxdeep.train import checkpoint, guard, passes
from jaxdeep.train import state as states
from jaxdeep.types import Batch, Row, Trajectory
from jaxdeep.workdir import Workdir, lock_workdir, write_atomic

DEFAULT_CONFIG = None
KEYS = {"": ("GrpoRun",)}
EXAMPLE = (
    "python -m jaxdeep grpo --config=configs/search/grpo.py --config.env.corpus=docs/ "
    "--config.env.questions=questions.jsonl --workdir=runs/grpo"
)
NEEDS = (
    "a corpus in docs/, questions with answers in questions.jsonl, Qwen/Qwen3-8B from the "
    "hub and a TPU v5e-16; the quickstart needs nothing"
)
PROCESSES = True


def main(config: ConfigDict, workdir: Path, **process: str) -> int:
    """Train for `config.train.steps` steps in `workdir`, alone or as one of several processes;
    `process` says which."""
    expanded = algorithms.expand(config)
    with hosts.joined(**process):
        run = past.start(GrpoRun, expanded, workdir, first=jax.process_index() == 0)
        check_extras(run)
        train(run, config, workdir)
    return 0


def train(run: GrpoRun, config: ConfigDict, path: Path) -> None:
    """Trains to the last step or to SIGTERM; where the guard sets the run back, again from
    there."""
    chat, taskset = weights.chat_of(run.model), run.env.load()
    dev = run.dev.load() if run.dev else None
    for name, tasks in (("env", taskset), ("dev", dev)):
        if tasks is not None:
            lines = validate.require(tasks, chat, run.rollout.limits, name)
            if jax.process_index() == 0:
                say("\n".join(lines))
    mesh = meshes.make_mesh(run.mesh)
    run.check_sizes(len(taskset), mesh)
    own = Workdir(path).of_process(jax.process_index())
    location = run.train.checkpoints or path
    with (
        lock_workdir(own.path),
        checkpoint.hold(run.train.checkpoints, own.path),
        Termination() as ending,
    ):
        changed = resume.compare(run, location)
        about = configs.save(config, run, own.path, sys.argv)
        for name, text in chat.tokenizer.files.items():
            write_atomic(own.path / name, text)
        finished = False
        while not finished:
            with open_training(run, chat, taskset, dev, mesh, Workdir(path), about) as training:
                resume.tell(training.done, run.train.steps, changed)
                changed, finished = [], improve(training, ending)


def improve(t: Training, ending: Termination) -> bool:
    """The loop: a step after the other from where the run stands; False where the guard set it
    back."""
    steps, save_every = t.run.train.steps, t.run.train.save_every
    t.evaluate_start()
    for n in range(t.done + 1, steps + 1):
        position = t.explorer.position()
        sampled = t.sample(n, ending)
        if sampled is None:  # SIGTERM
            break
        groups = sampled.groups
        data = t.prepare(n, sampled)
        metrics = t.describe(groups) | data.metrics
        if data.rows:
            update = t.update(data.batches, len(advantages.learned(groups)))
            if update.trouble:
                t.save_good(n - 1, update.state, position)
                if t.set_back(n, [update.trouble]):
                    return False
                raise DivergedError(f"step {n}: {update.trouble}")
            metrics |= t.compare(n, groups, data.rows, update)
            t.hand_over(update.state)
        dev = t.evaluate(n)
        score = dev.get("dev/em")
        row = t.write(n, metrics | dev)
        if n % save_every == 0 or n == steps or score is not None:  # which may be the best
            t.save(n, score)
        if t.set_back(n, t.watch.see(row)):
            return False
    if t.done < steps:
        t.save(t.done)
        print(ENDED.format(step=t.done))
    else:
        t.trouble.refuse_idle(steps, t.version)
    return True


class StepData(NamedTuple):
    """What a step learns from: its rows, the microbatches they are packed in, and shares of
    rollouts."""

    rows: list[Row]
    batches: list[Batch]
    metrics: dict[str, float]


class Update(NamedTuple):
    """What a step's passes made: the new state, metrics, the trainer's log-probabilities [B, T] of
    each microbatch, and what is wrong, or nothing. With trouble `state` is the last good one, None
    where an update has used it up."""

    state: states.State | None
    metrics: dict[str, float]
    logps: list[jax.Array]
    trouble: str


@dataclasses.dataclass(eq=False)
class Training:
    """A run that is open: its parts, and where it stands. `done` steps are behind it."""

    run: GrpoRun
    workdir: Workdir
    chat: ChatFormat
    dev: Taskset | None
    spec: states.Spec
    mesh: jax.sharding.Mesh
    frozen: states.Frozen
    state: states.State
    sampler_frozen: states.Frozen
    saved: checkpoint.Checkpoints
    engine: Engine
    explorer: Explorer
    monitor: Monitor
    bar: Any
    done: int
    compared: bool = False  # whether trainer and sampler have been compared in this process

    def __post_init__(self) -> None:
        self.own = self.workdir.of_process(jax.process_index())
        self.writes_rollouts = self.own == self.workdir  # the first process, for all of them
        self.step = states.Step(self.spec, self.mesh)
        self.version = version_of(self.state, self.run)
        self.rules = self.run.grpo.rules(self.run.rollout.limits)
        self.trouble = trouble.Trouble(say if self.writes_rollouts else lambda line: None)
        self.timer = trace.Timer(trace.Trace(self.own.path))
        # all processes judge by the rows of the first one
        self.known = exchange.broadcast(read_metrics(self.own.metrics))
        self.watch = guard.Guard(self.run.guard, self.known)
        self.counts = self.engine.metrics()

    def sample(self, n: int, ending: Termination) -> Sampled | None:
        """The scored groups of step n; None after SIGTERM."""
        with self.timer("rollout"):
            return self.explorer.groups(n, ending)

    def prepare(self, n: int, sampled: Sampled) -> StepData:
        """Advantages, rows and microbatches of a step; writes its rollouts down."""
        groups, rewards = sampled
        with self.timer("data"):
            advantages.assign_advantages(groups, self.rules, rewards)
            rows = advantages.to_rows(groups, self.run.grpo.aggregate)
            shares = summary.advantage_metrics(groups, rewards, self.rules)
            if self.writes_rollouts:
                # gaps of an earlier try at this step, which the guard set back
                self.workdir.gaps(n).unlink(missing_ok=True)
                every = [trajectory for group in groups for trajectory in group]
                record.write(self.workdir.rollouts(n), every, self.chat.tokenizer)
            self.trouble.see(n, groups, rewards)
            batches = batches_of(rows, self.run.batch, shares["grpo/loss_tokens"])
        return StepData(rows, batches, shares | {"grpo/epochs": self.explorer.walk.epochs})

    def describe(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """Metrics of the rollouts, and of the engines of all processes since the last step."""
        before, self.counts = self.counts, self.engine.metrics()
        readings = exchange.all_gather_objects([(before, self.counts)])
        return summary.summarize(groups) | summary.engine_counts(readings)

    def update(self, batches: Sequence[Batch], rollouts: int) -> Update:
        """The passes over a step's microbatches, which hold so many rollouts; at the first of them
        trainer and sampler must agree."""
        tolerance, self.compared = None if self.compared else self.run.grpo.tolerance, True
        logps: list[jax.Array] = []
        with self.timer("train"):
            state, metrics, trouble = passes.learn(
                self.step,
                self.state,
                self.frozen,
                batches,
                tolerance,
                self.run.grpo.passes,
                logps,
                rollouts,
            )
        return Update(state, metrics, logps, trouble)

    def compare(
        self, n: int, groups: Sequence[Sequence[Trajectory]], rows: Sequence[Row], update: Update
    ) -> dict[str, float]:
        """Metrics of the update, with how far trainer and sampler are apart; writes the gaps
        down."""
        every = [trajectory for group in groups for trajectory in group]
        with self.timer("data"):
            logps = [tensors.on_host(x) for x in update.logps]
            gaps = summary.gaps_of(every, rows, logps, self.run.batch.length)
            if self.writes_rollouts:
                record.write_gaps(self.workdir.gaps(n), every, gaps)
        metrics = update.metrics | summary.staleness(every, gaps, self.version)
        return {f"train/{name}": value for name, value in metrics.items()}

    def hand_over(self, state: states.State) -> None:
        """The new policy to the sampler: conversations in progress go on with the one they began
        with."""
        self.state, self.version = state, self.version + 1
        policy = weights.sampled_policy(
            self.spec, self.sampler_frozen, state.trained, self.engine.mesh
        )
        self.engine.follow(*policy, self.version)

    def evaluate(self, n: int) -> dict[str, float]:
        """The share of greedy rollouts on `dev` that are right, and their mean rewards, as metrics;
        each process does its share. Empty where it is not due."""
        eval_every = self.run.grpo.eval_every
        if self.dev is None or not eval_every or n % eval_every:
            return {}
        indices = exchange.my_items(range(len(self.dev)))
        limits, slots = self.run.rollout.limits, self.run.rollout.slots
        with self.timer("eval"), self.engine.serving():
            work = harness.greedy(self.dev, self.engine, self.chat, limits, slots, indices)
            trajectories = asyncio.run(work)
        trajectories = exchange.all_gather_objects(trajectories)
        means = {
            k: mean for k, mean in harness.reward_means(trajectories).items() if mean is not None
        }
        found = {"em": harness.summarize(trajectories)["em"], **means}
        return {f"dev/{name}": value for name, value in found.items()}

    def evaluate_start(self) -> None:
        """Where `dev` is evaluated, a row of step 0 for the policy that the run begins with."""
        if self.known or self.done:
            return
        found = self.evaluate(0)
        if found and self.monitor.step < 0:
            self.monitor.write(0, found | self.timer.take())

    def write(self, n: int, metrics: dict[str, float]) -> dict[str, Any]:
        """The row of step n, with the seconds that each stage took."""
        row = self.monitor.write(n, metrics | self.timer.take())
        self.bar.set_postfix(reward=f"{metrics['reward/mean']:.3f}", refresh=False)
        self.bar.update()
        self.done = n
        return row

    def save(self, n: int, score: float | None = None) -> None:
        """A checkpoint after step n, where there is none and there was a step."""
        if self.saved.latest() != n > 0:
            with self.timer("checkpoint"):
                self.saved.save(n, self.state, self.explorer.position(), score=score)

    def save_good(self, n: int, state: states.State | None, position: dict[str, Any]) -> None:
        """The last good state before an update that failed, where there still is one."""
        if state is not None:
            self.saved.save(n, state, position)

    def set_back(self, n: int, alarms: Sequence[str]) -> bool:
        """Acts on a collapse after step n: see `guard.roll_back`."""
        save_every = self.run.train.save_every
        return guard.roll_back(self.own.path, self.saved, self.watch, n, alarms, save_every)


@contextlib.contextmanager
def open_training(
    run: GrpoRun,
    chat: ChatFormat,
    taskset: Taskset,
    dev: Taskset | None,
    mesh: jax.sharding.Mesh,
    workdir: Workdir,
    about: dict[str, Any],
) -> Iterator[Training]:
    """The run at its newest checkpoint, or at its start, with all programs compiled. Everything
    that has a thread or a file open is closed at the end."""
    own = workdir.of_process(jax.process_index())
    guard.share_history(own.path)
    spec = run.spec(guard.lr_factor(run.guard, own.path))
    sampler_mesh = sizes.devices(spec.model, mesh)
    weights.check_vocabulary(chat, spec.model)
    location = run.train.checkpoints or workdir.path
    frozen, state = weights.load_or_init(run.train, run.model, spec, mesh, location)
    base = weights.base_of(run.model, spec, frozen)
    intervals = [run.train.save_every, *([run.grpo.eval_every] if dev else [])]
    to_roll_back = (guard.checkpoints_to_keep(run.guard, n) - 1 for n in intervals if n)
    keep = max(run.train.keep, 1 + sum(to_roll_back))
    saved = checkpoint.Checkpoints(location, spec, keep=keep, base=base, run=about)
    guard.finish_rollback(own.path, saved)
    done, position = 0, {}
    if saved.latest() is not None:
        done, state, position = saved.restore(state)
    if done < run.train.steps:
        under = tuple(adapter.config for adapter in frozen.under)
        programs.compile_all(run.workload(spec, under), mesh, sampler_mesh)
    with contextlib.ExitStack() as stack:
        stack.callback(saved.close)
        sampler_frozen = weights.frozen_for_sampler(
            run.model, spec, frozen, sampler_mesh, run.train.seed
        )
        policy = weights.sampled_policy(spec, sampler_frozen, state.trained, sampler_mesh)
        engine = Engine(policy[0], spec.model, sampler_mesh, run.rollout.engine(1 + run.grpo.ahead))
        stack.callback(engine.close)
        engine.set_adapter(policy[1], version=version_of(state, run))
        monitor = Monitor(own.path, step=done, mesh=mesh, settings=run.log, profile=run.profile)
        stack.enter_context(monitor)
        bar = stack.enter_context(progress(run.train.steps, "grpo", "step", done=done))
        rollbacks = guard.rollback_count(own.path)
        explorer = Explorer(taskset, engine, chat, run, done, position, rollbacks)
        stack.callback(explorer.close)
        yield Training(
            run, workdir, chat, dev, spec, mesh, frozen, state, sampler_frozen, saved, engine, explorer,
            monitor, bar, done,
        )  # fmt: skip


def version_of(state: states.State, run: GrpoRun) -> int:
    """How many steps have updated the policy."""
    return int(tensors.on_host(state.step)) // run.grpo.passes


def batches_of(rows: Sequence[Row], batch: BatchConfig, sampled: float) -> list[Batch]:
    """The rows in microbatches. ValueError where their masks do not add up to the tokens that were
    sampled: a wrong mask would train, quietly, on something else."""
    batches = pack(rows, B=batch.rows, T=batch.length)
    masked = sum(int(np.count_nonzero(b.learn_BT)) for b in batches)
    if masked != sampled:
        raise ValueError(
            f"the masks of a step hold {masked} tokens, but its rollouts sampled {sampled:.0f}"
        )
    return batches
