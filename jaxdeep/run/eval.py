"""Evaluate a policy on questions: how many are right, all rewards, a paired test of two runs.

Answers are the most likely ones (temperature 0). `train.start` names the run whose newest adapter
is evaluated, or the folder of a PEFT adapter; empty evaluates the base. The rollouts go to
`eval.jsonl` in the workdir, the numbers to `eval.json`, both also to `eval.html`; `--against` is
another evaluation's workdir on the same questions."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent import record
from jaxdeep.console import progress, say
from jaxdeep.errors import DataError
from jaxdeep.eval import harness
from jaxdeep.pages import report
from jaxdeep.setup import validate, weights
from jaxdeep.setup.policy import open_policy
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.sections import check_extras, load_run
from jaxdeep.types import Trajectory
from jaxdeep.workdir import Workdir, lock_workdir, write_atomic

DEFAULT_CONFIG = None
KEYS = {"": ("EvalRun",)}
EXAMPLE = (
    "python -m jaxdeep eval --config=configs/search/eval.py "
    "--config.train.start=runs/grpo --workdir=runs/eval"
)
NEEDS = "the run of the example of grpo, its corpus in docs/, and other questions in test.jsonl"
FLAGS = {"against": "the workdir of another evaluation of the same questions, for a paired test"}
COLUMNS = ("name", "n", "em", "f1", "calls", "turns", "failed")


def main(config: ConfigDict, workdir: Path, against: str = "") -> int:
    """Evaluate on `config.env`, and print a table."""
    run = load_run(EvalRun, config)
    check_extras(run)
    other = read_evaluation(against) if against else None
    trajectories = evaluate(run, config, workdir)
    show(run.train.start or run.model.path, trajectories, against, other, Workdir(workdir))
    harness.refuse_unplayed(trajectories)
    return 0


def evaluate(run: EvalRun, config: ConfigDict, path: Path) -> list[Trajectory]:
    """One greedy rollout of each question, written to the workdir."""
    taskset, workdir = run.env.load(), Workdir(path)
    chat, limits = weights.chat_of(run.model), run.rollout.limits
    say("\n".join(validate.require(taskset, chat, limits, "env")))
    with lock_workdir(path):
        configs.save(config, path, sys.argv)
        with (
            open_policy(run) as policy,
            progress(len(taskset), "eval", "question") as bar,
        ):
            trajectories = asyncio.run(
                harness.greedy(
                    taskset,
                    policy.engine,
                    policy.chat,
                    limits=run.rollout.limits,
                    concurrency=run.rollout.slots,
                    on_done=lambda _: bar.update(),
                )
            )
        write_atomic(workdir.tokenizer, policy.chat.tokenizer.text)
        record.write(workdir.evaluation, trajectories, policy.chat.tokenizer)
    return trajectories


def read_evaluation(path: str) -> list[Trajectory]:
    """The rollouts of the evaluation in a workdir."""
    rollouts = Workdir(Path(path)).evaluation
    if not rollouts.exists():
        raise DataError(f"--against={path}: there is no evaluation ({rollouts} does not exist)")
    return record.read(rollouts)


def show(
    name: str,
    trajectories: Sequence[Trajectory],
    against: str,
    other: Sequence[Trajectory] | None,
    workdir: Workdir,
) -> None:
    """Prints the table and writes `eval.json` and `eval.html`, compared with another evaluation if
    given."""
    summary = {"name": name, **harness.summarize(trajectories)}
    rows, notes = [summary], []
    if other is not None:
        pair = harness.compare(other, trajectories)
        rows.insert(0, {"name": against, **harness.summarize(other)})
        notes.append(
            f"Of {pair['n']} questions {pair['only_b']} are right only in this run, "
            f"{pair['only_a']} only in {against}: McNemar p = {pair['p']:.2g}"
        )
        summary = summary | {"against": against, "mcnemar": pair}
    write_atomic(workdir.evaluation_summary, json.dumps(summary, indent=2) + "\n")
    report.page(
        workdir.evaluation_page,
        title=f"Evaluation of {name}",
        rows=rows,
        curves={},
        trajectories={"The first questions": trajectories[:20]},
        notes=notes,
    )
    rewards = dict.fromkeys(key for row in rows for key in row if key.startswith("reward/"))
    columns = [*(c for c in COLUMNS if any(c in row for row in rows)), *rewards]
    print(report.table(rows, columns))
    print("\n".join(notes))
