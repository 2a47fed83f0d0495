"""Fine-tune on conversations: loss exactly on what the assistant wrote, its stop token included.

    rows -> pieces -> packed batches -> accumulate, update -> adapter (or weights, with lora.rank=0)

data.source is jsonl:FILE, json:FILE, hf:NAME:SPLIT, tfds:NAME:SPLIT or text:FOLDER; data.sources
mixes several with weights and caps; data.learn says which roles and spans are learned; data.eval
measures the loss on rows held out; sft.kl.coef holds the policy near its base. Each step writes a
row of `metrics.jsonl`; `checkpoints` holds the last ones. The same command resumes at the very row
where it was stopped. At the end `model` holds the weights where all of them were trained."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import programs, trace
from jaxdeep.chat.format import ChatFormat
from jaxdeep.console import progress, say
from jaxdeep.data import check, mix
from jaxdeep.data.share import Share
from jaxdeep.errors import DivergedError
from jaxdeep.model import load
from jaxdeep.parallel import exchange, hosts
from jaxdeep.parallel import mesh as meshes
from jaxdeep.parallel.rounds import Rounds
from jaxdeep.setup import past, resume, sources, weights
from jaxdeep.setup.monitor import Monitor
from jaxdeep.setup.runs import SftRun
from jaxdeep.setup.sections import check_extras
from jaxdeep.signals import ENDED, Termination
from jaxdeep.train import checkpoint
from jaxdeep.train import state as states
from jaxdeep.train.measure import Measure
from jaxdeep.train.passes import NOT_FINITE
from jaxdeep.types import Batch
from jaxdeep.workdir import Workdir, lock_workdir

DEFAULT_CONFIG = None
KEYS = {"": ("SftRun",)}
EXAMPLE = (
    "python -m jaxdeep sft --config=configs/search/sft.py "
    "--config.data.source=jsonl:traces.jsonl --workdir=runs/sft"
)
NEEDS = (
    "conversations in traces.jsonl, Qwen/Qwen3-8B from the hub and a TPU v5e-16; the "
    "quickstart needs nothing"
)
PROCESSES = True


def main(config: ConfigDict, workdir: Path, **process: str) -> int:
    """Train for `config.train.steps` steps in `workdir`, alone or as one of several processes;
    `process` says which."""
    with hosts.joined(**process):
        run = past.start(SftRun, config, workdir, first=jax.process_index() == 0)
        check_extras(run)
        train(run, config, workdir)
    return 0


def train(run: SftRun, config: ConfigDict, path: Path) -> None:
    """Trains to the last step or to SIGTERM."""
    chat, size = weights.chat_of(run.model), dict(B=run.batch.rows, T=run.batch.length)
    spec = run.spec()
    weights.check_vocabulary(chat, spec.model)
    # a batch may be longer than the model's positions, a sequence in it may not
    longest = min(run.batch.length, spec.model.limit)
    mixture, held = sources.mixture(run.data, chat, run.env, T=longest, seed=run.train.seed)
    measured = sources.measured(held, run.data, **size, longest=longest) if run.data.eval else []
    mesh, workdir = meshes.make_mesh(run.mesh), Workdir(path)
    own = workdir.of_process(jax.process_index())
    location = run.train.checkpoints or workdir.path
    with lock_workdir(own.path), checkpoint.hold(run.train.checkpoints, own.path):
        changed = resume.compare(run, location)
        if run.data.check and not exchange.broadcast(own.metrics.exists()):  # not one that resumes
            check_rows(run, mixture, longest)
        with Termination() as ending, Rounds("rows") as rounds:
            about = configs.save(config, run, own.path, sys.argv)
            share = share_of(rounds, mesh, **size)
            with open_training(run, spec, mesh, mixture, share, workdir, about) as training:
                resume.tell(training.done, run.train.steps, changed)
                fit(training, measured, ending)
        if training.done == run.train.steps and spec.full:
            export(workdir.model, training.state.trained, spec, chat)
    if training.done < run.train.steps:
        print(ENDED.format(step=training.done))
    else:
        for line in sources.summary(training.position.tallies, longest):
            print(line)


def check_rows(run: SftRun, mixture: mix.Mix, longest: int) -> None:
    """Reads all rows once, each process its part, and tells what becomes of them."""
    index, count = jax.process_index(), jax.process_count()
    part = sources.check_rows(mixture, run.data, longest, index=index, count=count)
    found = check.joined(exchange.all_gather_objects([part]))
    if longest < run.batch.length:
        say(
            f"a row may have {longest} tokens, the positions of the model: of "
            f"batch.length={run.batch.length} several share one"
        )
    sources.report(found, run.data, longest)


def fit(t: Training, measured: Sequence[Batch], ending: Termination) -> None:
    """The loop: a step after the other from where the run stands, to the last one or to SIGTERM."""
    steps, save_every = t.run.train.steps, t.run.train.save_every
    for n in range(t.done + 1, steps + 1):
        batches, position = t.read()
        metrics = t.update(n, batches, position)
        score = None
        if measured and sources.due(t.run.data.eval, n, steps):
            with t.timer("eval"):
                seen = t.measure(t.state, t.frozen, measured)
            metrics |= {f"eval/{name}": value for name, value in seen.items()}
            score = -seen["loss"]
        t.write(n, metrics, position)
        ended = any(exchange.all_gather_objects([ending.asked]))
        # one with a score may be the best
        if n % save_every == 0 or n == steps or ended or score is not None:
            t.save(n, score)
        if ended:
            return


@dataclasses.dataclass(eq=False)
class Training:
    """A run that is open: its parts, and where it stands. `done` steps are behind it."""

    run: SftRun
    spec: states.Spec
    mesh: jax.sharding.Mesh
    frozen: states.Frozen
    state: states.State
    saved: checkpoint.Checkpoints
    mixture: mix.Mix
    batches: Iterator[tuple[Batch, mix.Position]]
    position: mix.Position
    monitor: Monitor
    bar: Any
    done: int

    def __post_init__(self) -> None:
        self.step = states.Step(self.spec, self.mesh)
        self.measure = Measure(self.spec, self.mesh)
        self.timer = trace.Timer(trace.Trace(self.monitor.path.parent))

    def read(self) -> tuple[list[Batch], mix.Position]:
        """The microbatches of a step, and the position in the data after them."""
        with self.timer("data"):
            group = [next(self.batches) for _ in range(self.run.data.accumulate)]
        return [batch for batch, _ in group], group[-1][1]

    def update(self, n: int, batches: list[Batch], position: mix.Position) -> dict[str, float]:
        """Takes step n; its metrics. DivergedError where loss or gradient are not finite: the state
        before the step is saved. So where the update made weights that are not."""
        with self.timer("train"):
            grads, metrics = self.step.gradients(self.state, self.frozen, batches)
            metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
            if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
                self.saved.save(n - 1, self.state, self.position.save(self.mixture))
                raise DivergedError(blame(n, metrics, self.position, position))
            self.state, more = self.step.update(self.state, grads)
            metrics |= {name: float(x) for name, x in jax.device_get(more).items()}
            if not metrics.pop("finite"):
                raise DivergedError(f"step {n}: {NOT_FINITE.format(lr=metrics['lr'])}")
            metrics["flops"] = self.step.flops(batches)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        return metrics | sources.counts(position)

    def write(self, n: int, metrics: dict[str, float], position: mix.Position) -> None:
        """The row of step n, with the seconds that each stage took."""
        self.monitor.write(n, metrics | self.timer.take())
        self.bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)
        self.bar.update()
        self.done, self.position = n, position

    def save(self, n: int, score: float | None) -> None:
        """A checkpoint after step n."""
        with self.timer("checkpoint"):
            self.saved.save(n, self.state, self.position.save(self.mixture), score=score)


@contextlib.contextmanager
def open_training(
    run: SftRun,
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    mixture: mix.Mix,
    share: Share | None,
    workdir: Workdir,
    about: dict[str, Any],
) -> Iterator[Training]:
    """The run at its newest checkpoint, or at its start, with all programs compiled."""
    location = run.train.checkpoints or workdir.path
    frozen, state = weights.load_or_init(run.train, run.model, spec, mesh, location)
    base = weights.base_of(run.model, spec, frozen)
    saved = checkpoint.Checkpoints(location, spec, keep=run.train.keep, base=base, run=about)
    done, position = 0, mix.Position()
    if saved.latest() is not None:
        done, state, stored = saved.restore(state)
        position = mix.Position.load(stored, mixture)
    if done < run.train.steps:
        under = tuple(adapter.config for adapter in frozen.under)
        programs.compile_all(run.workload(spec, under), mesh)
    rows = mix.packed_batches(
        mixture,
        position,
        B=run.batch.rows,
        T=run.batch.length,
        seed=run.train.seed,
        longest=spec.model.limit,
        long=run.data.long,
        bad=run.data.bad_rows,
        share=share,
    )
    batches = mix.prefetch(rows, run.data.accumulate)
    own = workdir.of_process(jax.process_index())
    monitor = Monitor(own.path, step=done, mesh=mesh, settings=run.log, profile=run.profile)
    with (
        contextlib.closing(saved),
        monitor,
        progress(run.train.steps, "sft", "step", done=done) as bar,
    ):
        yield Training(
            run, spec, mesh, frozen, state, saved, mixture, batches, position, monitor, bar, done
        )


def share_of(rounds: Rounds, mesh: jax.sharding.Mesh, *, B: int, T: int) -> Share | None:
    """What this process loads of the rows; None where it is alone."""
    if rounds.count == 1:
        return None
    return Share(rounds, rounds.index, rounds.count, meshes.rows_here(mesh, B, T))


def blame(step: int, metrics: dict[str, float], before: mix.Position, after: mix.Position) -> str:
    """Which step and which rows have a loss or a gradient that is not finite."""
    read = {
        name: tally.rows - before.tallies.get(name, mix.Tally()).rows
        for name, tally in after.tallies.items()
    }
    whose = ", ".join(f"{count} of {name}" for name, count in read.items() if count)
    return (
        f"step {step}: the loss is {metrics['loss']:.4g} and the norm of its gradient "
        f"{metrics['grad_norm']:.4g}, on rows {before.read} to {after.read - 1} of the walk ({whose}). The "
        "state before it is kept. Lower optim.lr, or look at these rows"
    )


def export(path: Path, trained: Any, spec: states.Spec, chat: ChatFormat) -> None:
    """The trained weights in the Hugging Face layout, with their tokenizer."""
    cfg = dataclasses.replace(spec.model, dtype="float32")
    load.save(path, trained, cfg, beside=chat.tokenizer.files, replace=True)
