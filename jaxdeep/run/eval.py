"""Evaluate a policy on questions: exact match, F1, searches, and a paired test against another run.

Answers are the most likely ones (temperature 0). `train.start` names the run whose newest adapter is
evaluated, or the folder of a PEFT adapter; empty evaluates the base. The rollouts go to `eval.jsonl` in
the workdir, the numbers to `eval.json`, both also to `eval.html`; `--against` is another evaluation's
workdir on the same questions.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import programs
from jaxdeep.agent import record
from jaxdeep.chat import tokenizer
from jaxdeep.console import progress
from jaxdeep.errors import DataError
from jaxdeep.eval import harness
from jaxdeep.model import lora
from jaxdeep.pages import report
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import grpo
from jaxdeep.setup import sections as setup
from jaxdeep.train import optim
from jaxdeep.train import state as states
from jaxdeep.types import Trajectory
from jaxdeep.workdir import lock_workdir, write_atomic

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep eval --config=configs/eval_search.py "
    "--config.train.start=runs/grpo --workdir=runs/eval"
)
FLAGS = {"against": "the workdir of another evaluation of the same questions, for a paired test"}
COLUMNS = ("name", "n", "em", "f1", "calls", "turns", "failed")


def parts(config: ConfigDict) -> dict[str, Any]:
    """The sections of the configuration, checked."""
    return setup.sections(
        config,
        {
            "model": setup.ModelConfig,
            "lora": lora.LoraConfig,
            "mesh": meshes.MeshConfig,
            "env": setup.EnvConfig,
            "rollout": setup.RolloutConfig,
            "train": setup.TrainConfig,
        },
    )


def main(config: ConfigDict, workdir: Path, against: str = "") -> int:
    """Evaluate on `config.env`, and print a table."""
    other = None
    if against:
        path = Path(against) / "eval.jsonl"
        if not path.exists():
            raise DataError(f"--against={against}: there is no evaluation ({path} does not exist)")
        other = record.read(path)
    seen = run(config, workdir)
    name = config.train.start or config.model.path
    found = {"name": name, **harness.summarize(seen)}
    rows, notes = [found], []
    if other is not None:
        pair = harness.compare(other, seen)
        rows.insert(0, {"name": against, **harness.summarize(other)})
        notes.append(
            f"Of {pair['n']} questions {pair['only_b']} are right only in this run, "
            f"{pair['only_a']} only in {against}: McNemar p = {pair['p']:.2g}"
        )
        found = found | {"against": against, "mcnemar": pair}
    write_atomic(workdir / "eval.json", json.dumps(found, indent=2) + "\n")
    report.page(
        workdir / "eval.html",
        title=f"Evaluation of {name}",
        rows=rows,
        curves={},
        trajectories={"The first questions": seen[:20]},
        notes=notes,
    )
    print(report.table(rows, COLUMNS))
    print("\n".join(notes))
    return 0


def run(config: ConfigDict, workdir: Path) -> list[Trajectory]:
    """One greedy rollout of each question, written to the workdir."""
    part = parts(config)
    chat = setup.chat_of(part["model"])
    taskset = setup.taskset_of(part["env"])
    mesh = meshes.make_mesh(part["mesh"])
    spec = setup.spec_of(part["model"], part["lora"], optim.OptimConfig(lr=0.0, steps=1))
    setup.check_vocabulary(chat, spec.model)
    with lock_workdir(workdir):
        configs.save(config, workdir, sys.argv)
        params, state = setup.load_or_init(part["train"], part["model"], spec, mesh)
        weights, adapter = states.policy(spec, params, state.trained)
        programs.compile_all(
            programs.Workload("eval", spec, engine=setup.size_of(part["rollout"])), mesh, mesh
        )
        engine = setup.engine_of(part["rollout"], weights, spec, mesh)
        engine.set_adapter(adapter and lora.Adapter(adapter, spec.lora.scale))
        bar = progress(len(taskset), "eval", "question")
        try:
            seen = asyncio.run(
                grpo.greedy(
                    taskset,
                    engine,
                    chat,
                    part["rollout"],
                    range(len(taskset)),
                    lambda _: bar.update(),
                )
            )
        finally:
            bar.close()
            engine.close()
        write_atomic(workdir / tokenizer.FILE, chat.tokenizer.text)
        record.write(workdir / "eval.jsonl", seen, chat.tokenizer)
    return seen
