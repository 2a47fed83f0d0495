"""Sections of a configuration that several verbs share, and the door from a configuration to a
typed run."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import typing
from typing import Annotated, Any, Literal, TypeVar

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.rollout import Limits
from jaxdeep.chat.families import FAMILIES
from jaxdeep.chat.format import Thinking
from jaxdeep.errors import ConfigError
from jaxdeep.sample.sizes import EngineConfig, EngineSettings
from jaxdeep.settings import SECTIONS, SEED, AtLeast, section
from jaxdeep.setup.tasksets import EnvConfig
from jaxdeep.workdir import home

T = TypeVar("T")

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
SHIPPED = {"tiny": ASSETS / "tiny", "maze": ASSETS / "maze"}


@section
class ModelConfig:
    """Which model, and how it is computed."""

    path: Annotated[
        str,
        "a folder in the Hugging Face layout, a config.json (with random weights), a hub id, "
        '"tiny" for the base that comes with the package, or "maze" for a model of mazes, which '
        "has no weights yet",
    ]
    dtype: Annotated[Literal["float32", "bfloat16"], "of weights and activations"] = "bfloat16"
    weights: Annotated[Literal["load", "random"], "where they come from"] = "load"
    tokenizer: Annotated[str, "a folder, tokenizer.json or hub id; empty: the model's own"] = ""
    chat: Annotated[
        str,
        f"the chat format, one of {', '.join(FAMILIES)}; empty: told by the tokenizer and its "
        "chat template",
    ] = ""
    thinking: Annotated[
        Thinking, "turns begin with reasoning, with an empty block of it, or without one"
    ] = "write"
    tools_in_prompt: Annotated[
        bool, "False: for a model that was taught its tools, to save tokens"
    ] = True
    remat: Annotated[
        Literal["dots", "attention", "full"],
        "what the backward pass recomputes: all but linears and attention, all but attention, or "
        "everything; the longer the rows, the more attention costs",
    ] = "full"
    attention: Annotated[
        Literal["auto", "plain", "splash", "cudnn"], "the kernel; splash is TPUs', cudnn GPUs'"
    ] = "auto"
    quant: Annotated[Literal["", "int8"], "int8 holds the frozen linears in one byte a weight"] = ""
    chunk: Annotated[int, AtLeast(1), "positions whose logits exist at one time"] = 256

    @property
    def location(self) -> str:
        """The folder, file or hub id, with the names of shipped models resolved to their
        folders."""
        path = str(home(self.path)) if self.path.startswith("~") else self.path
        return str(SHIPPED.get(path, path))


@section(kw_only=True)
class RolloutConfig(EngineSettings):
    """The limits of a conversation, and the engine that samples it."""

    limits: Limits

    def engine(self, adapters: int = 1) -> EngineConfig:
        """The engine's sizes, with room for this many adapters."""
        fields = dataclasses.fields(EngineSettings)
        settings = {field.name: getattr(self, field.name) for field in fields}
        return EngineConfig(**settings, length=self.limits.max_tokens, adapters=adapters)


@section
class BatchConfig:
    """A microbatch."""

    rows: Annotated[int, AtLeast(1), "rows of packed sequences"]
    length: Annotated[int, AtLeast(2), "positions of a row: a token is learned from those before"]


@section
class StartConfig:
    """Which policy."""

    start: Annotated[str, "a run's folder (or gs://...), or a PEFT adapter's; empty: the base"] = ""
    best: Annotated[bool, "of a run the checkpoint with the best score, not the newest"] = False
    seed: Annotated[int, *SEED, "of weights that are drawn"] = 0


@section
class TrainConfig:
    """How long to train, what to keep, and what to start from."""

    steps: Annotated[int, AtLeast(1), "steps of the whole run"]
    save_every: Annotated[
        int, AtLeast(1), "steps between checkpoints; each evaluation (dev, data.eval) makes one too"
    ] = 10
    keep: Annotated[int, AtLeast(1), "checkpoints that are kept: the newest ones"] = 2
    checkpoints: Annotated[
        str, "a folder for them, local or in a bucket (gs://...); empty: the workdir"
    ] = ""
    start: Annotated[str, "a run's folder (or gs://...), or a PEFT adapter's; empty: the base"] = ""
    best: Annotated[bool, "start from the checkpoint with the best score, not the newest"] = False
    seed: Annotated[int, *SEED, "of everything that is drawn"] = 0


def check_extras(run: Any) -> None:
    """ConfigError for a package that a run needs and that is not installed: told before anything
    is loaded."""
    train, log = run.train, getattr(run, "log", None)
    paths = {"train.start": train.start, "train.checkpoints": getattr(train, "checkpoints", "")}
    needs = [("gcsfs", "'jaxdeep[gs]'", f"{k}={p}") for k, p in paths.items() if p[:5] == "gs://"]
    if log is not None and log.wandb:
        needs.append(("wandb", "wandb", f"log.wandb={log.wandb}"))
    for module, package, key in needs:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{key} needs a package that is not installed: pip install {package}")


def load_run(cls: type[T], config: ConfigDict, prefix: str = "") -> T:
    """The frozen dataclass `cls` of a run, one field a section; one that is None is as if it were
    not there. ConfigError for an unknown section, a missing one, or a value in one that cannot be
    used; `prefix` is what its keys begin with where the run is a part of a configuration."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    config = {name: section for name, section in config.items() if section is not None}
    for name in config:
        if name not in fields:
            raise ConfigError(
                f"config.{prefix}{name} is not a section."
                f"{configs.suggest(f'{prefix}{name}', [f'{prefix}{field}' for field in fields])}"
            )
    missing = [n for n, f in fields.items() if n not in config and _required(f)]
    if missing:
        raise ConfigError(
            f"the configuration lacks the sections {', '.join(prefix + name for name in missing)}"
        )
    wrong = [name for name in config if not isinstance(config[name], SECTIONS)]
    if wrong:
        raise ConfigError(f"config.{prefix}{wrong[0]} is {config[wrong[0]]!r}; expected a section")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _section(hints[name], config[name], f"{prefix}{name}") for name in config})


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _section(hint: Any, section: ConfigDict, name: str) -> Any:
    (cls,) = [c for c in typing.get_args(hint) or (hint,) if c is not type(None)]
    return cls.build(section, name) if cls is EnvConfig else configs.build(cls, section, name)
