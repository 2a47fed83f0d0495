"""Fine-tune on conversations: loss exactly on what the assistant wrote, its stop token included.

    rows -> pieces -> packed batches -> accumulate, update -> adapter (or weights, with lora.rank=0)

data.source is jsonl:FILE, json:FILE, hf:NAME:SPLIT, tfds:NAME:SPLIT or text:FOLDER; data.sources mixes
several with weights and caps; data.learn says which roles and spans are learned; data.eval measures the
loss on rows held out; sft.kl.coef holds the policy near its base. Each step writes a row of
`metrics.jsonl`; `checkpoints` holds the last ones. The same command goes on at the very row where it was
stopped. At the end `model` holds the weights where all of them were trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import programs, trace
from jaxdeep.console import progress
from jaxdeep.data import mix
from jaxdeep.data.share import Share
from jaxdeep.errors import ConfigError, DivergedError
from jaxdeep.model import load, lora
from jaxdeep.parallel import exchange, hosts
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl.objective import SFT, Kl
from jaxdeep.setup import monitor
from jaxdeep.setup import sections as setup
from jaxdeep.setup import sources as rows
from jaxdeep.signals import ENDED, Termination
from jaxdeep.train import checkpoint, optim
from jaxdeep.train import state as states
from jaxdeep.train.measure import Measure
from jaxdeep.workdir import lock_workdir

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep sft --config=configs/sft_search.py "
    "--config.data.source=jsonl:traces.jsonl --workdir=runs/sft"
)
FLAGS = {
    "coordinator": "host:port of the first of several processes, where no launcher says so",
    "processes": "how many there are; 1: this one is a run of its own",
    "process": "which of them this is, from 0",
}


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """What the likelihood is held back by: `kl` to the base, the adapter off, at the learned tokens. They
    are the data's and not sampled from the policy: k2 and k3 are distances there, 0 where both agree."""

    kl: Kl = dataclasses.field(default_factory=Kl)

    def __post_init__(self) -> None:
        if self.kl.kind == "k1" and self.kl.coef:
            raise ConfigError(
                "sft.kl.kind='k1' has the gradient of the likelihood itself, only smaller: use k2 or k3"
            )


def parts(config: ConfigDict) -> dict[str, Any]:
    """The sections of the configuration, checked."""
    return setup.sections(
        config,
        {
            "model": setup.ModelConfig,
            "lora": lora.LoraConfig,
            "optim": optim.OptimConfig,
            "mesh": meshes.MeshConfig,
            "data": rows.DataConfig,
            "batch": setup.BatchConfig,
            "train": setup.TrainConfig,
        },
        {
            "env": setup.EnvConfig,
            "sft": SftConfig,
            "log": monitor.LogConfig,
            "profile": monitor.ProfileConfig,
        },
    )


def main(
    config: ConfigDict,
    workdir: Path,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> int:
    """Train for `config.train.steps` steps in `workdir`, as one of several processes or alone."""
    part = parts(config)
    with hosts.joined(coordinator, processes, process):
        run(part, config, workdir)
    return 0


def run(part: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """The run that the parts of `config` describe."""
    train, batch, data = part["train"], part["batch"], part["data"]
    chat = setup.chat_of(part["model"])
    size = dict(B=batch.rows, T=batch.length)
    walk, held = rows.mixture(data, chat, part["env"], T=batch.length, seed=train.seed)
    measured = rows.measured(held, data, **size) if data.eval else []
    mesh = meshes.make_mesh(part["mesh"])
    spec = spec_of(part)
    setup.check_vocabulary(chat, spec.model)
    place = setup.folder_of(workdir)
    with lock_workdir(place), Termination() as ending, hosts.Rounds("rows") as circle:
        about = configs.save(config, place, sys.argv)
        where = setup.checkpoint_dir(train, workdir)
        params, state = setup.load_or_init(train, part["model"], spec, mesh, where)
        step, measure = states.Step(spec, mesh), Measure(spec, mesh)
        base = setup.base_of(part["model"], spec, params)
        saved = checkpoint.Checkpoints(where, spec, keep=train.keep, base=base, run=about)
        done, position = 0, mix.Position()
        if saved.latest() is not None:
            done, state, kept = saved.restore(state)
            position = mix.Position.load(kept, walk)
        if done < train.steps:
            programs.compile_all(work_of(part, spec), mesh)
        how = dict(
            seed=train.seed, long=data.long, bad=data.bad_rows, share=share_of(circle, mesh, **size)
        )
        batches = mix.prefetch(mix.fill(walk, position, **size, **how), data.accumulate)
        timer = trace.Timer(trace.Trace(place))
        watched = monitor.Monitor(place, step=done, mesh=mesh, part=part)
        with contextlib.closing(saved), watched as metrics:
            bar = progress(train.steps, "sft", "step", done=done)
            for n in range(done + 1, train.steps + 1):
                before = position
                with timer("data"):
                    group = [next(batches) for _ in range(data.accumulate)]
                    position = group[-1][1]
                with timer("train"):
                    grads, found = step.gradients(
                        state, states.Frozen(params), [b for b, _ in group]
                    )
                    found = {k: float(v) for k, v in jax.device_get(found).items()}
                    if not np.isfinite([found["loss"], found["grad_norm"]]).all():
                        saved.save(n - 1, state, before.save(walk))
                        raise DivergedError(blame(n, found, before, position))
                    state, more = step.update(state, grads)
                    found |= {k: float(v) for k, v in jax.device_get(more).items()}
                    found["flops"] = step.flops([b for b, _ in group])
                row = {f"train/{k}": v for k, v in found.items()} | rows.counts(position)
                if measured and rows.due(data.eval, n, train.steps):
                    with timer("eval"):
                        seen = measure(state, states.Frozen(params), measured)
                    row |= {f"eval/{k}": v for k, v in seen.items()}
                metrics.write(n, row | timer.take())
                bar.set_postfix(loss=f"{found['loss']:.3f}", refresh=False)
                bar.update()
                ended = any(exchange.all_gather_objects([ending.asked]))
                if n % train.save_every == 0 or n == train.steps or ended:
                    score = -row["eval/loss"] if "eval/loss" in row else None
                    with timer("checkpoint"):
                        saved.save(n, state, position.save(walk), score=score)
                if ended:
                    break
            bar.close()
        if done < train.steps and ended and n < train.steps:
            print(ENDED.format(step=n))
            return
        if spec.full:
            export(workdir / "model", state.trained, spec, chat)
    for line in rows.summary(position, batch.length):
        print(line)


def spec_of(part: dict[str, Any], hf: Mapping[str, Any] | None = None) -> states.Spec:
    """What the steps are compiled from; `hf` as in `setup.spec_of`."""
    objective = dataclasses.replace(SFT, kl=(part["sft"] or SftConfig()).kl)
    return setup.spec_of(part["model"], part["lora"], part["optim"], objective, hf=hf)


def work_of(part: dict[str, Any], spec: states.Spec) -> programs.Workload:
    """What a step asks devices for."""
    batch = part["batch"]
    return programs.Workload("sft", spec, batch.rows, batch.length, part["data"].accumulate)


def share_of(circle: hosts.Rounds, mesh: jax.sharding.Mesh, *, B: int, T: int) -> Share | None:
    """What this process loads of the rows; None where it is alone."""
    if circle.count == 1:
        return None
    return Share(circle, circle.index, circle.count, meshes.rows_here(mesh, B, T))


def blame(step: int, found: dict[str, float], before: mix.Position, after: mix.Position) -> str:
    """Which step and which rows have a loss or a gradient that is no number."""
    read = {
        name: tally.rows - before.tallies.get(name, mix.Tally()).rows
        for name, tally in after.tallies.items()
    }
    whose = ", ".join(f"{count} of {name}" for name, count in read.items() if count)
    return (
        f"step {step}: the loss is {found['loss']:.4g} and the norm of its gradient "
        f"{found['grad_norm']:.4g}, on rows {before.read} to {after.read - 1} of the walk ({whose}). The "
        "state before it is kept. Lower optim.lr, or look at these rows"
    )


def export(path: Path, trained: Any, spec: states.Spec, chat: Any) -> None:
    """The trained weights in the Hugging Face layout, with their tokenizer."""
    cfg = dataclasses.replace(spec.model, dtype="float32")
    load.save(path, trained, cfg, beside={"tokenizer.json": chat.tokenizer.text}, replace=True)
