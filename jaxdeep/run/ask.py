"""Ask one question and get a report whose every citation leads to the sentence it rests on.

RUN is the folder of a run, whose newest adapter answers as it was trained. With --config=FILE.py
instead `train.start` names the run, or the folder of a PEFT adapter; empty is the base. In the
workdir: `report.json`, `report.md` and `report.html`, the conversation as `trajectory.jsonl`, and
what was read in `sources/`. `jaxdeep check` checks the report again."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent import record
from jaxdeep.agent.rollout import rollout
from jaxdeep.envs.research import conversation
from jaxdeep.envs.research.explain import short_answer
from jaxdeep.envs.research.report import Report, summary, to_json, to_markdown
from jaxdeep.errors import ConfigError
from jaxdeep.pages import answer
from jaxdeep.setup import past
from jaxdeep.setup.policy import open_policy
from jaxdeep.setup.runs import EvalRun
from jaxdeep.types import Sampling, Task, Trajectory
from jaxdeep.workdir import lock_workdir, write_atomic

DEFAULT_CONFIG = None
RUN = "optional"
KEYS = {"": ("EvalRun",)}
EXAMPLE = (
    "python -m jaxdeep ask --config=configs/research/eval.py "
    '--question="What is the capital of Chad?" --workdir=runs/ask'
)
FLAGS = {
    "question": "what to ask",
    "temperature": "0 (the default) takes the most likely words, 1 samples",
    "seed": "of sampling and of the environment (default 0)",
}


def main(
    config: ConfigDict, workdir: Path, question: str = "", temperature: str = "0", seed: str = "0"
) -> int:
    """Answer the question, write the report, and print where it is."""
    if not question.strip():
        raise ConfigError('ask needs --question="..."')
    try:
        sampling, number = Sampling(float(temperature)), int(seed)
    except ValueError:
        raise ConfigError(
            f"--temperature={temperature} and --seed={seed} must be numbers, the second a whole one"
        ) from None
    run = past.start(EvalRun, config)
    if run.env is None:
        raise ConfigError("ask needs a task set whose tools find sources: set env.taskset")
    taskset, task = run.env.load(), Task("ask", question)
    if not hasattr(taskset, "source_tools"):
        raise ConfigError(
            f"env.taskset={run.env.taskset} has no source_tools: none of its tools shows sources "
            "that a report could cite"
        )
    with lock_workdir(workdir):
        configs.save(config, run, workdir, sys.argv)
        with open_policy(run, "ask") as policy:
            limits = run.rollout.limits
            talk = rollout(
                taskset.env(task),
                task,
                policy.engine,
                policy.chat,
                limits=limits,
                seed=number,
                sampling=sampling,
            )
            played = asyncio.run(talk)
            record.write(workdir / "trajectory.jsonl", [played], policy.chat.tokenizer)
        report = conversation.report(question, played.messages, taskset.source_tools)
        write(report, workdir)
    show(report, played, workdir)
    return 0


def write(report: Report, folder: Path) -> None:
    """The report in its three forms, and the texts of its sources."""
    row = to_json(report)
    write_atomic(folder / "report.json", json.dumps(row, indent=1) + "\n")
    text = to_markdown(report).encode("utf-8", "replace").decode("utf-8")
    write_atomic(folder / "report.md", text)
    answer.page(folder / "report.html", row)
    sources = folder / "sources"
    sources.mkdir(exist_ok=True)
    for old in sources.glob("S*.txt"):
        old.unlink()  # of another question that was asked here
    for source in report.shelf:
        text = source.text.encode("utf-8", "replace").decode("utf-8")
        write_atomic(sources / f"{source.id}.txt", text)


def show(report: Report, played: Trajectory, folder: Path) -> None:
    """Prints the short answer, what became of the citations, and where the report is."""
    reason = f" ({played.stop.value}{f': {played.failure}' if played.failure else ''})"
    print(short_answer(report.tree) or f"no answer{reason}")
    if report.incomplete and report.answer:
        print(f"the report was cut{reason}")
    print(f"{summary(report)}\n{folder / 'report.html'}: open it in a browser")
