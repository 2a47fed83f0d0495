"""Check a configuration and its task set in seconds, without a model.

Every section is read as its verb reads it, the files of data are opened, and some tasks of each
task set are tried: ids, prompts, tools and rewards are what the tool loop takes, every prompt
leaves room to answer, the perfect episode (`gold`) earns the most, and an empty answer does not.
What is wrong is one sentence each, with status 2. Every verb that plays a task set tries a few of
its tasks, too, before it loads or compiles anything."""

from __future__ import annotations

import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxdeep.agent.rollout import Limits
from jaxdeep.chat.format import ChatFormat
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.rl import algorithms
from jaxdeep.run import quickstart
from jaxdeep.setup import sources, validate, weights
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun
from jaxdeep.setup.sections import check_extras, load_run

Run = SftRun | GrpoRun | EvalRun

DEFAULT_CONFIG = "configs/search/quickstart.py"
KEYS = {"": ("GrpoRun", "SftRun", "EvalRun")}
EXAMPLE = "python -m jaxdeep validate --config=configs/search/quickstart.py --tasks=20"
FLAGS = {"tasks": "how many tasks of each set to try (default 64), or all"}
# of rollouts where the configuration has none
LIMITS = Limits(
    max_turns=64,
    max_calls=64,
    turn_tokens=2**20,
    max_tokens=2**20,
    result_tokens=2**20,
    seconds=600.0,
)


def main(config: ConfigDict, workdir: Path, tasks: str = "64") -> int:
    """Print what was found; 2 where something is wrong."""
    if tasks != "all" and not (tasks.isdigit() and int(tasks)):
        raise ConfigError(f"--tasks={tasks} is neither a number of tasks nor all")
    runs = runs_of(config)
    print("the settings: all in their bounds")
    problems = 0
    for prefix, run in runs:
        chat = weights.chat_of(run.model)
        if isinstance(run, SftRun):
            problems += check_data(f"{prefix}data", run, chat)
        for name in ("env", "dev"):
            if getattr(run, name, None) is not None:
                problems += check_tasks(f"{prefix}{name}", run, name, chat, tasks)
    print(f"{problems} problems" if problems else "nothing is wrong")
    return 2 if problems else 0


def runs_of(config: ConfigDict) -> list[tuple[str, Run]]:
    """The runs that a configuration describes, with what their keys begin with. ConfigError as
    their verbs raise it."""
    parts = {"": config}
    if {"sft", "grpo", "test"} <= set(config) and "model" not in config:
        test = quickstart.test_config(config, "")
        parts = {"sft.": config.sft, "grpo.": config.grpo, "test.": test}
    found: list[tuple[str, Run]] = []
    for prefix, part in parts.items():
        kind = SftRun if "data" in part else GrpoRun if "grpo" in part else EvalRun
        found.append((prefix, load_run(kind, algorithms.expand(part), prefix)))
        check_extras(found[-1][1])
    return found


def check_data(key: str, run: SftRun, chat: ChatFormat) -> int:
    """Opens the sources of a run; how many problems there are."""
    try:
        mixture, _ = sources.mixture(
            run.data, chat, run.env, T=run.batch.length, seed=run.train.seed
        )
    except JaxdeepError as error:
        return tell(key, [str(error)])
    sizes = {name: part.size for name, part in mixture.parts.items()}
    said = ", ".join(f"{name} ({n or 'endless'} rows)" for name, n in sizes.items())
    print(f"{key}: {said}")
    return 0


def check_tasks(key: str, run: Run, name: str, chat: ChatFormat, tasks: str) -> int:
    """Tries tasks of a task set; how many problems there are."""
    limits = LIMITS if isinstance(run, SftRun) else run.rollout.limits
    count = None if tasks == "all" else int(tasks)
    try:
        found = validate.try_out(getattr(run, name).load(), chat, limits, count)
    except JaxdeepError as error:
        return tell(key, [str(error)])
    print(f"{key}: {found}")
    for note in found.notes():
        print(f"{key}: note: {note}")
    return tell(key, found.wrong())


def tell(key: str, problems: list[str]) -> int:
    """Prints problems, and counts them."""
    for problem in problems:
        print(f"error: {key}: {problem}", file=sys.stderr)
    return len(problems)
