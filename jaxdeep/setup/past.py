"""A run that was made, by its folder or its checkpoints in a bucket, as the source of settings.

    find(name)                 what the run was configured with, and where its result is
    policy_config(name)        the configuration with which eval, chat and export open its policy
    start(cls, config)         a typed run, completed by what `train.start` brings

A policy is used as it was trained: `start` takes from the run in `train.start` what a configuration
leaves open (the model and how it is talked to, the adapter's shape, settings of the same task set,
limits), and says what the configuration has otherwise. The folder of a quickstart stands for the
last run in it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.console import say
from jaxdeep.errors import ConfigError
from jaxdeep.setup.sections import SHIPPED, load_run
from jaxdeep.setup.tasksets import SharedSettings, settings_class
from jaxdeep.workdir import Workdir, home

T = TypeVar("T")

EXPORTED = "run.json"
"""Beside weights that were exported: the record of the run they are of."""

TASKSET = SharedSettings.taskset  # where a section does not say
SPEED = ("model.remat", "model.attention", "model.chunk", "model.weights")
CHOICE = ("env.first", "env.count", "env.rewards")
"""Settings that a policy does not notice: how fast the model is, and which tasks it is given."""

PATHS = ("model.path", "model.tokenizer", "train.start", "train.checkpoints", "lora.under")
PATH = re.compile(r"^((?:\w+:)?)([^:]*[./][^:]*)((?::.*)?)$")
"""A text that may name a file: "docs/", "jsonl:rows.jsonl", "mine.py:Tasks"."""


class Past(NamedTuple):
    """A run that was made. `start` is what `train.start` takes to get its result. `config` are its
    sections as they are to be used, `trained` those that its result was trained with; None where
    nobody wrote them down, and of a base that was not trained."""

    name: str
    start: str
    config: Mapping[str, Any] | None
    trained: Mapping[str, Any] | None


def find(name: str, tell: bool = True) -> Past:
    """The run that `name` is the folder of: of `sft`, `grpo`, `eval` or a quickstart, of weights
    that `export` wrote, or of checkpoints alone, also in a bucket. ConfigError or CheckpointError
    where there is none. `tell`: say where its paths are read from, if not from here."""
    if "://" in name:
        return _of_checkpoints(name, tell)
    path = home(name)
    if not path.is_dir():
        raise ConfigError(f"{name}: there is no such run")
    if (path / EXPORTED).is_file():
        return _of_exported(name, path, tell)
    if (path / "adapter_config.json").is_file():
        return Past(name, str(path), None, None)
    file = Workdir(path).config
    if not file.is_file():
        return _of_checkpoints(str(path), tell)
    record = configs.read_record(file)
    config = _relocated(record, tell)
    if set(config) >= configs.QUICKSTART:
        last = find(str(configs.last_stage(path)), tell=False)
        config = {"rollout": config["grpo"]["rollout"], **last.config, "env": config["test"]}
        return Past(name, last.start, config, last.trained)
    if "optim" in config:
        return Past(name, config["train"].get("checkpoints") or str(path), config, config)
    begun = config["train"].get("start", "")
    return Past(name, begun, config, find(begun, tell=False).trained if begun else None)


def policy_config(name: str) -> ConfigDict:
    """The configuration with which `eval`, `chat` and `export` open the policy of a run: its own
    sections, with `train.start` the run."""
    found = find(name)
    if found.config is None:
        raise ConfigError(
            f"{name} does not say how it was configured: give --config=FILE.py with "
            f"--config.train.start={name}"
        )
    return policy_sections(found.config, found.start)


def policy_sections(config: Mapping[str, Any], begun: str) -> ConfigDict:
    """The sections of a run that its policy is opened with, as the result of the run `begun`. A run
    without limits, such as of SFT, gets some from the length of its rows, which is said."""
    wanted = ("model", "lora", "mesh", "env", "rollout")
    sections = {key: config[key] for key in wanted if config.get(key) is not None}
    if "rollout" not in sections:
        length = config["batch"]["length"]
        sections["rollout"] = dict(slots=8, limits=_limits(length))
        say(f"a run without limits: rollout.limits.max_tokens={length}, as its rows")
    seed = config["train"].get("seed", 0)
    return ConfigDict(sections | {"train": {"start": begun, "best": False, "seed": seed}})


def _limits(length: int) -> dict[str, Any]:
    turns = dict(max_turns=16, max_calls=15, turn_tokens=max(length // 2, 1), max_tokens=length)
    return turns | dict(result_tokens=max(length // 4, 1), seconds=600.0)


def start(cls: type[T], config: ConfigDict, workdir: Path | None = None, first: bool = True) -> T:
    """The typed run of a configuration whose `train.start` names a run: what it leaves open is
    taken from there, and what it has otherwise is said, by the `first` process of several.

    A run in `workdir` that goes on does not read `train.start` again: it keeps what it took.
    """
    train = config.get("train") or {}
    begun = train.get("start", "")
    if not begun:
        if train.get("best"):
            raise ConfigError("train.best=True needs train.start: a run that has checkpoints")
        return load_run(cls, config)
    own = _config_in(train.get("checkpoints") or workdir) if workdir else None
    if own is not None:
        return load_run(cls, _completed(cls, config, own)[0])
    found, taken = find(begun, tell=first), []
    if not found.start:
        raise ConfigError(
            f"train.start={begun} has no adapter and no checkpoint to begin from: whole weights are "
            f"named by model.path"
        )
    if found.trained is not None:
        config, taken = _completed(cls, config, found.trained)
    run = load_run(cls, config)
    if first and taken:
        say(f"taken from the run in {begun}: {', '.join(taken)}")
    if first and (differ := differences(run, found.trained or {})):
        say(f"differs from the run: {', '.join(differ)}")
    return run


def differences(run: Any, trained: Mapping[str, Any]) -> list[str]:
    """The settings in which a typed run differs from what its policy was trained with, as far as
    the policy notices them."""
    theirs, ours = dict(flatten(trained)), dict(flatten(configs.plain(run)))
    other_tasks = ours.get("env.taskset") != theirs.get("env.taskset")
    out = []
    for key, value in ours.items():
        section = key.partition(".")[0]
        watched = section in ("model", "lora", "env") or key.startswith("rollout.limits.")
        if not watched or key.startswith((*SPEED, *CHOICE)) or theirs.get(key, value) == value:
            continue
        if section != "env" or key == "env.taskset" or not other_tasks:
            out.append(f"{key}={value} (trained with {theirs[key]})")
    return out


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections with their dotted keys."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _completed(
    cls: type, config: ConfigDict, theirs: Mapping[str, Any]
) -> tuple[ConfigDict, list[str]]:
    """The configuration with what it leaves open taken from another one, and what was taken: those
    settings that are not what they would be anyway."""
    config, taken = copy.deepcopy(config), []
    hints = typing.get_type_hints(cls)
    # the task set of a run of SFT is that of its rows
    known = {"model", "lora"} if "data" in hints else {"model", "lora", "env", "rollout"}
    for name in known & hints.keys() & theirs.keys():
        section, values, usual = config.get(name), theirs[name], {}
        if section is None:
            with config.unlocked():
                config[name] = ConfigDict(values)
            taken.append(name)
        elif name == "env":
            taskset = section.get("taskset", TASKSET)
            if taskset == values.get("taskset", TASKSET):
                usual = _defaults(settings_class(taskset, "env.taskset"))
        elif name != "rollout":  # whose limits have no defaults; all else is how fast it is
            usual = _defaults(hints[name])
        for key in usual.keys() & values.keys() - set(section or ()):
            if f"{name}.{key}".startswith((*SPEED, *CHOICE)):
                continue
            with section.unlocked():
                section[key] = values[key]
            if usual[key] != values[key]:
                taken.append(f"{name}.{key}={values[key]}")
    return config, sorted(taken)


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of a section's settings, as JSON holds them."""
    missing = dataclasses.MISSING
    return {
        field.name: configs.plain(
            field.default if field.default is not missing else field.default_factory()
        )
        for field in dataclasses.fields(cls)
        if field.default is not missing or field.default_factory is not missing
    }


def _config_in(location: str | Path) -> Mapping[str, Any] | None:
    """The configuration of the run that has left a checkpoint in `location`, if one has."""
    from jaxdeep.train import checkpoint  # brings jax, which help and typing mistakes do without

    if not checkpoint.exists(location):
        return None
    return (checkpoint.about(location).get("run") or {}).get("config", {})


def _of_checkpoints(name: str, tell: bool) -> Past:
    from jaxdeep.train import checkpoint

    run = checkpoint.about(name).get("run") or {}
    config = _relocated(run, tell) if run.get("config") else None
    return Past(name, name, config, config)


def _of_exported(name: str, path: Path, tell: bool) -> Past:
    record = configs.read_record(path / EXPORTED)
    config = _relocated(record, tell)
    if (path / "adapter_config.json").is_file():
        return Past(name, str(path), config, config)
    model = config["model"] | {"path": str(path), "weights": "load", "tokenizer": ""}
    return Past(name, "", {**config, "model": model}, None)


def _relocated(record: Mapping[str, Any], tell: bool) -> dict[str, Any]:
    """The sections of a record. Where its command was given in another folder, paths that lead to
    something from there alone are written out, which is said."""
    folder = record.get("folder")
    if folder is None or Path(folder) == Path.cwd():
        return record["config"]
    moved: list[str] = []

    def move(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: move(x, f"{key}.{name}".lstrip(".")) for name, x in value.items()}
        if isinstance(value, list):
            return [move(x, key) for x in value]
        if not isinstance(value, str) or (value in SHIPPED and key == "model.path"):
            return value
        found = PATH.match(value) or (key in PATHS and re.match(r"()([^:]+)()$", value))
        if not found or os.path.isabs(found[2]) or os.path.exists(found[2]):
            return value
        there = os.path.join(folder, found[2])
        if not os.path.exists(there):
            return value
        moved.append(key)
        return f"{found[1]}{there}{found[3]}"

    config = move(record["config"], "")
    if moved and tell:
        say(f"read from {folder}, where the run was started: {', '.join(moved)}")
    return config
