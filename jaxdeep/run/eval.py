"""Evaluate a policy on questions: how many are right, all rewards, a paired test of two runs.

RUN is the folder of a run, or gs://... where its checkpoints are: its newest adapter is evaluated
as it was trained, and what --config.KEY=VALUE changes is said. With --config=FILE.py instead
`train.start` names the run, or the folder of a PEFT adapter; empty evaluates the base. Answers are
the most likely ones (temperature 0). The rollouts go to `eval.jsonl` in the workdir, the numbers to
`eval.json`, both also to `eval.html`. Several processes share the questions out."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent import record
from jaxdeep.console import progress, say
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.eval import harness
from jaxdeep.pages import report
from jaxdeep.parallel import exchange, hosts
from jaxdeep.setup import past, validate, weights
from jaxdeep.setup.policy import open_policy
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.sections import check_extras
from jaxdeep.types import Trajectory
from jaxdeep.workdir import Workdir, home, lock_workdir, write_atomic

DEFAULT_CONFIG = None
RUN = "optional"
KEYS = {"": ("EvalRun",)}
EXAMPLE = "python -m jaxdeep eval runs/grpo --config.env.questions=test.jsonl --workdir=runs/eval"
NEEDS = "the run of the example of grpo, and other questions in test.jsonl"
FLAGS = {"against": "the workdir of another evaluation of the same questions, for a paired test"}
PROCESSES = True
COLUMNS = ("name", "n", "em", "f1", "calls", "turns", "failed")


def main(config: ConfigDict, workdir: Path, against: str = "", **process: str) -> int:
    """Evaluate on `config.env`, and print a table; `process` says which of several this is."""
    other = read_evaluation(against) if against else None
    with hosts.joined(**process):
        first = jax.process_index() == 0
        run = past.start(EvalRun, config, first=first)
        check_extras(run)
        trajectories = evaluate(run, config, workdir)
        if first:
            name = run.train.start or run.model.path
            show(name, trajectories, against, other, Workdir(workdir))
        harness.refuse_unplayed(trajectories)
    return 0


def evaluate(run: EvalRun, config: ConfigDict, path: Path) -> list[Trajectory]:
    """One greedy rollout of each question, written to the workdir. Each process does its share of
    them and has all in the end; the first one writes."""
    if run.env is None:
        raise ConfigError(
            "there is nothing to ask: this run has no task set, name one with --config.env.taskset"
        )
    taskset, workdir = run.env.load(), Workdir(path)
    own = workdir.of_process(jax.process_index())
    indices = exchange.my_items(range(len(taskset)))
    chat, limits = weights.chat_of(run.model), run.rollout.limits
    say("\n".join(validate.require(taskset, chat, limits, "env")))
    with lock_workdir(own.path):
        configs.save(config, run, own.path, sys.argv)
        with (
            open_policy(run) as policy,
            progress(len(indices), "eval", "question") as bar,
        ):
            work = harness.greedy(
                taskset,
                policy.engine,
                policy.chat,
                limits=run.rollout.limits,
                concurrency=run.rollout.slots,
                indices=indices,
                on_done=lambda _: bar.update(),
            )
            with policy.engine.serving():
                mine = asyncio.run(work)
            trajectories = exchange.all_gather_objects(mine)
        if own == workdir:
            for name, text in policy.chat.tokenizer.files.items():
                write_atomic(workdir.path / name, text)
            record.write(workdir.evaluation, trajectories, policy.chat.tokenizer)
    return trajectories


def read_evaluation(path: str) -> list[Trajectory]:
    """The rollouts of the evaluation in a workdir."""
    rollouts = Workdir(home(path)).evaluation
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
