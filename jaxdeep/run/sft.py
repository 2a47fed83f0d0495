"""Fine-tune on conversations: loss exactly on what the assistant wrote, its stop token included.

    rows -> pieces -> packed batches -> accumulate, update -> adapter (or weights, with lora.rank=0)

Each step writes a row of `metrics.jsonl`; `checkpoints` holds the last ones. The same command goes on
where it was stopped. At the end `model` holds the weights where all of them were trained.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import log
from jaxdeep import mesh as meshes
from jaxdeep.data import sources
from jaxdeep.errors import ConfigError
from jaxdeep.model import load, lora
from jaxdeep.run import setup
from jaxdeep.train import checkpoint, optim
from jaxdeep.train import state as states

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep sft --config=configs/sft_search.py "
    "--config.data.source=jsonl:traces.jsonl --workdir=runs/sft"
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where rows come from, and how many microbatches make a step."""

    source: str
    accumulate: int = 1


def parts(config: ConfigDict) -> dict[str, Any]:
    """The sections of the configuration, checked."""
    return setup.sections(
        config,
        {
            "model": setup.ModelConfig,
            "lora": lora.LoraConfig,
            "optim": optim.OptimConfig,
            "mesh": meshes.MeshConfig,
            "data": DataConfig,
            "batch": setup.BatchConfig,
            "train": setup.TrainConfig,
        },
        {"env": setup.EnvConfig},
    )


def main(config: ConfigDict, workdir: Path) -> int:
    """Train for `config.train.steps` steps in `workdir`."""
    part = parts(config)
    train, batch = part["train"], part["batch"]
    chat = setup.chat_of(part["model"])
    source = setup.source_of(part["data"].source, chat, part["env"])
    mesh = meshes.make_mesh(part["mesh"])
    spec = setup.spec_of(part["model"], part["lora"], part["optim"])
    setup.check_vocabulary(chat, spec.model)
    with log.lock(workdir):
        about = configs.save(config, workdir, sys.argv)
        params, state = setup.start_of(train, part["model"], spec, mesh, workdir)
        step = states.Step(spec, mesh)
        base = setup.base_of(part["model"], spec, params)
        saved = checkpoint.Checkpoints(workdir, spec, keep=train.keep, base=base, run=about)
        done, position = 0, sources.Position()
        if saved.latest() is not None:
            done, state, kept = saved.restore(state)
            position = sources.Position(**kept)
        batches = sources.fill(source, position, B=batch.rows, T=batch.length, seed=train.seed)
        timer = log.Timer()
        with log.Metrics(workdir, step=done) as metrics:
            bar = log.progress(train.steps, "sft", "step", done=done)
            for n in range(done + 1, train.steps + 1):
                with timer("data"):
                    group = [next(batches) for _ in range(part["data"].accumulate)]
                    position = group[-1][1]
                with timer("step"):
                    grads, found = step.gradients(state, params, [b for b, _ in group])
                    state, more = step.update(state, grads)
                    found = {k: float(v) for k, v in jax.device_get(found | more).items()}
                if not found["loss"] < float("inf"):
                    raise ConfigError(
                        f"the loss of step {n} is {found['loss']}: lower optim.lr, or look at the rows "
                        f"before number {position.read}"
                    )
                rows = {"data/rows": position.read, "data/skipped": position.skipped}
                metrics.write(n, {f"train/{k}": v for k, v in found.items()} | rows | timer.take())
                bar.set_postfix(loss=f"{found['loss']:.3f}", refresh=False)
                bar.update()
                if n % train.save_every == 0 or n == train.steps:
                    saved.save(n, state, position._asdict())
            bar.close()
        saved.close()
        if spec.full:
            export(workdir / "model", state.trained, spec, chat)
    if position.skipped:
        print(f"{position.skipped} of {position.read} rows were longer than {batch.length} tokens")
    return 0


def export(path: Path, trained: Any, spec: states.Spec, chat: Any) -> None:
    """The trained weights in the Hugging Face layout, with their tokenizer."""
    cfg = dataclasses.replace(spec.model, dtype="float32")
    load.save(path, trained, cfg, beside={"tokenizer.json": chat.tokenizer.text}, replace=True)
