"""From the section `env` of a configuration to a task set.

`env.taskset` names a frozen dataclass with `load() -> Taskset`: one of `BUILT_IN`, or one of your
own as "FILE.py:NAME" or "module:NAME". The other keys of the section are its fields. Four keys are
the same for every task set: see `EnvConfig`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.base import Env, Reward, Taskset, named_right
from jaxdeep.agent.remote import FROM_FILE
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.rl import algorithms
from jaxdeep.settings import AtLeast, Finite, convert, section
from jaxdeep.types import Message, Task
from jaxdeep.workdir import home

BUILT_IN = {
    "search": "jaxdeep.envs.search.tasks:Search",
    "facts": "jaxdeep.envs.toy.facts:Facts",
    "maze": "jaxdeep.envs.toy.maze:Mazes",
}


@section
class OwnReward:
    """A reward of your own."""

    function: Annotated[str, "FILE.py:NAME or module:NAME"]
    weight: Annotated[float, Finite(), "what it counts; 0: it is only measured"] = 1.0


@section(kw_only=True)
class SharedSettings:
    """The keys that are the same for every task set."""

    taskset: Annotated[
        str, f"{', '.join(BUILT_IN)}, or one of your own: FILE.py:NAME or module:NAME"
    ] = "search"
    rewards: Annotated[
        Mapping[str, Annotated[float | OwnReward | None, Finite()]],
        "changes to its rewards: what one counts (0: it is only measured), None to leave it out, or "
        "a function of your own",
    ] = dataclasses.field(default_factory=dict)
    first: Annotated[int, AtLeast(0), "tasks that are skipped at the beginning"] = 0
    count: Annotated[int, AtLeast(0), "tasks that are used after these; 0: all"] = 0


SHARED = tuple(field.name for field in dataclasses.fields(SharedSettings))


@section(kw_only=True)
class EnvConfig(SharedSettings):
    """A task set and which of its tasks and rewards are used."""

    settings: Annotated[Any, "the task set's own dataclass, from all other keys of the section"]

    @classmethod
    def build(cls, section: Mapping[str, Any] | ConfigDict, key: str = "env") -> EnvConfig:
        """The section as written in a configuration; ConfigError names `key.NAME` for what is
        wrong."""
        values = dict(section.items())
        common = {name: values.pop(name) for name in SHARED if name in values}
        shared = configs.build(SharedSettings, common, key)
        settings = configs.build(settings_class(shared.taskset, f"{key}.taskset"), values, key)
        return cls(settings=settings, **vars(shared))

    def section(self) -> dict[str, Any]:
        """The section as a configuration would write it, every setting with its value."""
        fields = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.settings)}
        return {name: getattr(self, name) for name in SHARED} | fields

    def load(self) -> Taskset:
        """The tasks, environments and rewards that the section asks for."""
        taskset = self._loaded()
        check_shape(taskset, f"env.taskset={self.taskset}")
        total = len(taskset)
        end = self.first + self.count if self.count else total
        indices = range(total)[self.first : end]
        if not indices:
            raise ConfigError(
                f"env.first={self.first} is beyond the {total} tasks of {self.settings}: lower it"
            )
        rewards = reweighted(taskset.rewards, self.rewards)
        for name, (_, judge) in rewards.items():
            check_reward(name, judge)
        if (right := named_right(taskset)) and right not in rewards:
            raise ConfigError(
                f"the reward {right!r} says which rollouts are right, and this task set has only "
                f"{', '.join(rewards)}: with env.rewards.{right}=0 it is only measured"
            )
        if hasattr(taskset, "check_rewards"):
            taskset.check_rewards({name: weight for name, (weight, _) in rewards.items()})
        if rewards == dict(taskset.rewards) and len(indices) == total:
            return taskset
        return Chosen(taskset, indices, rewards)

    def _loaded(self) -> Taskset:
        try:
            return self.settings.load()
        except JaxdeepError:
            raise
        except Exception as error:
            said = f"env.taskset={self.taskset}: load() raised {_located(error)}"
            raise ConfigError(said) from error


GOLD = (
    "write def gold(self, task) that returns the messages of a perfect episode, such as "
    '[Message("assistant", task.answers[0])], or None where none is known'
)


def check_shape(taskset: Any, name: str) -> None:
    """ConfigError with one sentence that says how to write it where something is not a task set:
    what its parts are, not what they do."""
    for part, write in {
        "__len__": "write def __len__(self) that returns how many tasks there are",
        "__getitem__": "write def __getitem__(self, index) that returns a Task",
        "env": "write def env(self, task) that returns a fresh environment for every rollout",
        "gold": GOLD,
    }.items():
        if not callable(getattr(taskset, part, None)):
            what = "nothing" if taskset is None else f"a {type(taskset).__name__}"
            raise ConfigError(f"{name}: load() gave {what}, which has no {part}: {write}")
    rewards = getattr(taskset, "rewards", None)
    write = 'write rewards = {"NAME": (1.0, function)}, each a weight and a function'
    if not isinstance(rewards, Mapping) or not rewards:
        raise ConfigError(f"{name}: its rewards are {named(rewards)}: {write}")
    for reward, pair in rewards.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
            raise ConfigError(f"{name}: its reward {reward!r} is {named(pair)}: {write}")
        convert(pair[0], Annotated[float, Finite()], f"{name}: the weight of {reward!r}")
    if not len(taskset):
        raise ConfigError(f"{name}: it has no tasks, len(taskset) is 0")


def named(value: Any) -> str:
    """A value as a message shows it, with its type."""
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) < 80 else text[:77] + '...'}, a {type(value).__name__}"


class Chosen:
    """Some tasks of a task set, with rewards of their own."""

    def __init__(
        self, taskset: Taskset, indices: range, rewards: Mapping[str, tuple[float, Reward]]
    ) -> None:
        self.taskset, self.indices, self.rewards = taskset, indices, rewards
        self.right = named_right(taskset)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Task:
        return self.taskset[self.indices[index]]

    def env(self, task: Task) -> Env:
        return self.taskset.env(task)

    def gold(self, task: Task) -> list[Message] | None:
        return self.taskset.gold(task)


def load_config(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """`configs.load`, where an override may name another task set than the file: then the settings
    of the file's own that the new one does not have, and its rewards, are left out, which is said
    on stderr. Over a run's own configuration, which has every setting, another `grpo.algorithm`
    takes the place of what the old one set."""
    on_change = ON_CHANGE | ({"algorithm": algorithms.leave} if configs.is_run(path) else {})
    return configs.load(path, overrides, on_change)


def override(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """As `load_config`, for a configuration that is there already."""
    return configs.override(config, overrides, ON_CHANGE)


def _keep_fields(section: ConfigDict, taskset: str) -> None:
    fields = {field.name for field in dataclasses.fields(settings_class(taskset, "env.taskset"))}
    kept = fields | set(SHARED) - {"rewards"}
    dropped = [name for name in section if name not in kept]
    for name in dropped:
        del section[name]
    if dropped:
        print(
            f"env.taskset={taskset}: {', '.join(dropped)} of the configuration's own task set left out",
            file=sys.stderr,
        )


ON_CHANGE = {"taskset": _keep_fields}


def settings_class(name: str, key: str) -> type:
    """The dataclass that `env.taskset` names; ConfigError where there is none."""
    does = "load() that returns the task set"
    return frozen_class(name, key, BUILT_IN, "load", does, " See jaxdeep/README.md")


def frozen_class(
    name: str, key: str, built_in: Mapping[str, str], method: str, does: str, more: str = ""
) -> type:
    """The frozen dataclass with this method that the setting `key` names: one of `built_in`, or
    FILE.py:NAME, or module:NAME. ConfigError where there is none."""
    if ":" not in name and name not in built_in:
        raise ConfigError(
            f"{key}={name!r} is none of {', '.join(built_in)}, nor FILE.py:NAME of your own."
            f"{configs.suggest(name, built_in)}"
        )
    cls = imported(built_in.get(name, name), key)
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    if not (inspect.isclass(cls) and frozen and hasattr(cls, method)):
        raise ConfigError(
            f"{key}={name!r} must be a frozen dataclass with a method {does}; "
            f"its fields are the settings of the section.{more}"
        )
    return cls


def reweighted(
    rewards: Mapping[str, tuple[float, Reward]],
    changes: Mapping[str, float | OwnReward | None],
) -> dict[str, tuple[float, Reward]]:
    """The rewards of a task set with the changes of a configuration."""
    out = dict(rewards)
    for name, change in changes.items():
        if isinstance(change, OwnReward):
            out[name] = (change.weight, imported(change.function, f"env.rewards.{name}.function"))
        elif name not in rewards:
            raise ConfigError(
                f"env.rewards.{name} is not a reward of this task set, which has {', '.join(rewards)}; "
                f'one of your own is {{"function": "FILE.py:NAME", "weight": 1.0}}.'
                f"{configs.suggest(name, rewards)}"
            )
        elif change is None:
            del out[name]
        else:
            out[name] = (change, rewards[name][1])
    if not out:
        raise ConfigError("env.rewards leaves no reward: nothing could be learned")
    return out


def check_reward(name: str, judge: Any) -> None:
    """ConfigError where a reward cannot be called as one: otherwise every rollout would be without
    a reward, as if its world had failed."""
    right = f"def {getattr(judge, '__name__', name)}(task, trajectory): ... gives a number or None"
    if not callable(judge):
        raise ConfigError(f"the reward {name!r} is {judge!r:.80}, not a function: {right}")
    try:
        signature = inspect.signature(judge)
    except ValueError:  # of a function written in C
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"the reward {name!r} is called with a task and a trajectory, and takes {signature} "
            f"({error}): {right}"
        ) from error


def imported(name: str, key: str) -> Any:
    """What "FILE.py:NAME" or "module:NAME" names; ConfigError with the configuration's `key` if it
    cannot be imported."""
    place, colon, attribute = (str(home(name)) if name.startswith("~") else name).rpartition(":")
    if not (colon and place and attribute):
        raise ConfigError(f"{key}={name!r} is not like FILE.py:NAME or module:NAME")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"{key}={name!r}: there is no file {place} in {Path.cwd()}")
    try:
        module = _module(place)
    except JaxdeepError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}={name!r} cannot be imported: {_located(error)}") from error
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(
            f"{key}={name!r}: {place} has no {attribute!r}.{configs.suggest(attribute, names)}"
        )
    return getattr(module, attribute)


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    # a name that no other module has: dataclasses look their module up by it
    unique = f"{FROM_FILE}{Path(place).stem}_{zlib.crc32(place.encode()):08x}"
    spec = importlib.util.spec_from_file_location(unique, place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    spec.loader.exec_module(module)
    return module


def _located(error: Exception) -> str:
    """An error of somebody's code with its file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename] or frames
    return f"{type(error).__name__}: {error}, at {own[-1].filename}:{own[-1].lineno}"
