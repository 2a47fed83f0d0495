"""The verbs as functions of Python, for notebooks and programs.

    config = load_config("search/grpo", "train.steps=5", "env.corpus=docs/")
    config.optim.lr = 1e-5                                  # a ConfigDict: any value can be set
    run = run_verb("grpo", config, workdir="runs/grpo")     # as the command; `run` has the paths

What the command would print as an error is raised as a `JaxdeepError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from jaxdeep import compiled
from jaxdeep import config as configs
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.run import cli
from jaxdeep.setup import tasksets
from jaxdeep.workdir import Workdir


def load_config(config: str | Path, *overrides: str) -> ConfigDict:
    """The configuration that `--config` would name, with overrides such as "train.steps=5".
    ConfigError where the file or an override cannot be used."""
    words = [f"--config.{override.removeprefix('--config.')}" for override in overrides]
    return tasksets.load_config(str(config), words)


def run_verb(
    verb: str,
    config: ConfigDict | str | Path,
    workdir: str | Path,
    **flags: object,
) -> Workdir:
    """Runs a verb that takes a configuration, as the command does, and returns the folder of the
    run. `config` is a loaded configuration or what `--config` takes, or where the verb takes one
    the folder of a run; `flags` are the verb's own, by name. JaxdeepError where the verb fails, or
    ends with another status than 0."""
    described = cli.verb(verb)
    if described.arguments:
        raise ConfigError(f"{verb} takes {described.arguments}, not a configuration")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    name = "" if isinstance(config, ConfigDict) else str(config)
    is_run = described.takes_run and name and ("://" in name or configs.is_run(name))
    command = cli.parse(described, [name if is_run else f"--config={name}", *words])
    if not isinstance(config, ConfigDict):
        config = cli.configuration(command)
    elif command.overrides:
        config = tasksets.override(config, command.overrides)
    compiled.keep()
    module = importlib.import_module(f"jaxdeep.run.{verb}")
    with _no_running_loop():
        status = module.main(config, Path(workdir), **command.flags)
    if status:
        raise JaxdeepError(f"{verb} ended with status {status}: what it printed says why")
    return Workdir(Path(workdir))


@contextlib.contextmanager
def _no_running_loop() -> Iterator[None]:
    """Notebooks run their cells inside an event loop, and a verb starts one of its own, which
    asyncio refuses while another is known to run in the same thread."""
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)
