"""Watch a small Qwen3 learn to search: SFT, then GRPO, then a test on entities it never met.

The base comes with the package; the corpus, the questions and the search engine are real and local.
With --config=configs/toy/maze.py it learns to find its way through mazes instead. Every stage is
the verb of its name with a section of the configuration, in a folder of the workdir; the same
command resumes a run that was stopped. It ends with a table, `index.html` and `summary.json`. The
workdir is then a run: `chat`, `eval`, `export` and `view` take it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent import record
from jaxdeep.errors import ConfigError
from jaxdeep.eval import harness
from jaxdeep.metrics import read_metrics
from jaxdeep.pages import report, view
from jaxdeep.rl import algorithms
from jaxdeep.run import grpo, sft
from jaxdeep.run.eval import evaluate
from jaxdeep.setup import past
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun
from jaxdeep.setup.sections import load_run
from jaxdeep.signals import Termination
from jaxdeep.types import Trajectory
from jaxdeep.workdir import Workdir, write_atomic

DEFAULT_CONFIG = "configs/search/quickstart.py"
KEYS = {"sft": ("SftRun",), "grpo": ("GrpoRun",), "test": ("EnvConfig",)}
EXAMPLE = "python -m jaxdeep quickstart --config.seed=1 --workdir=runs/quickstart-1"
STAGES = {"base": "before training", "sft": "after SFT", "grpo": "after GRPO"}
TALK = "python -m jaxdeep chat {workdir}"
HOPS = {"one_hop": 1, "two_hops": 2}


def main(config: ConfigDict, workdir: Path) -> int:
    """Run what is still missing of the quickstart and print its result."""
    if set(config) != {"seed", "sft", "grpo", "test"}:
        raise ConfigError(f"a quickstart has seed, sft, grpo and test, not {', '.join(config)}")
    # a mistake in a late stage is told before the first one starts
    stages = stages_of(config)
    begun = time.perf_counter()
    same_run(config, stages, workdir)
    evaluated = {}
    with Termination() as ending:
        for stage in STAGES:
            start = ""
            if stage == "sft":
                sft.main(config.sft, workdir / "sft")
                if not finished(config.sft, workdir / "sft"):
                    return 0
                start = go_on(config, workdir / "sft")
            if stage == "grpo":
                grpo.main(config.grpo, workdir / "grpo")
                if not finished(config.grpo, workdir / "grpo"):
                    return 0
                start = str(workdir / "grpo")
            place = workdir / f"eval-{stage}"
            if not ending.asked and not Workdir(place).evaluation.exists():
                print(f"test: {STAGES[stage]}", file=sys.stderr)
                test = test_config(config, start)
                evaluate(load_run(EvalRun, test), test, place)
            if ending.asked:
                print(f"terminated {STAGES[stage]}: the same command continues")
                return 0
            evaluated[stage] = record.read(Workdir(place).evaluation)
    finish(workdir, evaluated, time.perf_counter() - begun)
    return 0


def stages_of(config: ConfigDict) -> dict[str, Any]:
    """The sections of a quickstart as typed runs. ConfigError for what cannot be used."""
    return {
        "seed": config.seed,
        "sft": load_run(SftRun, config.sft, "sft."),
        "grpo": load_run(GrpoRun, algorithms.expand(config.grpo), "grpo."),
        "test": load_run(EvalRun, test_config(config, "")).env,
    }


def same_run(config: ConfigDict, stages: Mapping[str, Any], workdir: Path) -> None:
    """Refuse a workdir with the state of another configuration; else note this one, `stages` as
    typed runs."""
    path = Workdir(workdir).config
    if path.exists():
        theirs, mine = configs.read_record(path)["config"], configs.plain(stages)
        theirs, mine = dict(past.flatten(theirs)), dict(past.flatten(mine))
        keys = sorted(theirs.keys() | mine.keys())
        if differ := [key for key in keys if theirs.get(key) != mine.get(key)]:
            said = ", ".join(
                f"{key}={theirs.get(key)} there, {mine.get(key)} here" for key in differ
            )
            raise ConfigError(
                f"{workdir} holds a quickstart with another configuration ({said:.500}): choose "
                "another --workdir, or remove that folder"
            )
    configs.save(config, stages, workdir, sys.argv)


def finished(config: ConfigDict, place: Path) -> bool:
    """Whether the run in `place` came to its last step: SIGTERM ends one before that, in good
    order."""
    rows = read_metrics(Workdir(place).metrics)
    return bool(rows) and rows[-1]["step"] == config.train.steps


def go_on(config: ConfigDict, place: Path) -> str:
    """Let GRPO begin with what SFT left in `place`: its adapter or weights, or where it trained the
    weights and GRPO is to train an adapter, these as the base. The `train.start` that evaluates
    it."""
    if config.grpo.lora.rank and not config.sft.lora.rank:
        config.grpo.model.update(path=str(Workdir(place).model), weights="load")
    else:
        config.grpo.train.start = str(place)
    return config.grpo.train.start


def test_config(config: ConfigDict, start: str) -> ConfigDict:
    """The configuration of one evaluation on the test questions."""
    out = ConfigDict({name: config.grpo[name] for name in ("model", "lora", "mesh", "rollout")})
    out.env = config.test
    out.train = ConfigDict({"start": start, "seed": config.seed})
    return out


def finish(workdir: Path, evaluated: dict[str, list[Trajectory]], seconds: float) -> None:
    """The table, the page and the summary."""
    rows = [row(STAGES[stage], seen) for stage, seen in evaluated.items()]
    before, after = evaluated["sft"], evaluated["grpo"]
    pair = harness.compare(before, after)
    steps = read_metrics(Workdir(workdir / "grpo").metrics)
    summary = {
        "n": len(after),
        "base_em": rows[0]["em"],
        "sft_em": rows[1]["em"],
        "grpo_em": rows[2]["em"],
        "mcnemar_p": pair["p"],
        "wall_s": round(seconds, 1),
        "max_logp_diff": max(step.get("train/max_logp_diff") or 0.0 for step in steps),
    }
    fresh = Workdir(workdir).summary
    if fresh.exists():  # nothing was left to do: keep the time of the run that did it
        summary["wall_s"] = json.loads(fresh.read_text())["wall_s"]
    better = [
        i for i, t in enumerate(after) if harness.correct(t) and not harness.correct(before[i])
    ]
    shown = better[:1] + [i for i in better[1:] if after[i].task.meta.get("hops") != 1][:2]
    shown += [i for i, t in enumerate(after) if not harness.correct(t)][:2]
    curves = {
        # the rollouts of a step are of the policy before its update
        name: [(step["step"] - before, step[key]) for step in steps if step.get(key) is not None]
        for name, key, before in (
            ("exact match on dev", "dev/em", 0),
            ("reward of a rollout", "reward/mean", 1),
            ("tool calls of a rollout", "rollout/calls", 1),
        )
    }
    pages = view.build([workdir / "grpo"], Workdir(workdir / "grpo").pages)
    report.page(
        Workdir(workdir).index,
        title="A small model learns",
        rows=rows,
        curves=curves,
        trajectories={
            "After GRPO": [after[i] for i in shown],
            "The same questions after SFT": [before[i] for i in shown],
        },
        notes=[
            f"{summary['n']} tasks, of which nothing was in training: entities that no training text "
            "mentions, or mazes with walls of their own; the most likely token at each step; the last "
            "checkpoint.",
            f"After GRPO {pair['only_b']} tasks are right that were wrong after SFT, and "
            f"{pair['only_a']} the other way round: McNemar p = {pair['p']:.2g}.",
        ],
        along="updates by GRPO",
        links={"Every rollout of GRPO, token by token": pages.relative_to(workdir).as_posix()},
        commands={"Talk to it": TALK.format(workdir=workdir)},
    )
    write_atomic(Workdir(workdir).summary, json.dumps(summary, indent=2) + "\n")
    print(report.table(rows, [c for c in rows[0] if c not in ("em_low", "em_high")]))
    print(f"\nMcNemar p = {pair['p']:.2g}; {seconds:.0f} s. Look at {workdir / 'index.html'}")
    print(f"Talk to it: {TALK.format(workdir=workdir)}")


def row(name: str, seen: list[Trajectory]) -> dict[str, Any]:
    """One line of the table."""
    found = harness.summarize(seen)
    hops = {
        column: [harness.correct(t) for t in seen if t.task.meta.get("hops") == n]
        for column, n in HOPS.items()
    }
    return {
        "policy": name,
        **{key: found[key] for key in ("n", "em", "em_low", "em_high")},
        **{column: sum(right) / len(right) for column, right in hops.items() if right},
        "calls": found["calls"],
    }
