"""Sections of a configuration that several verbs share, and the door from a configuration to a
typed run."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.rollout import Limits
from jaxdeep.chat.format import Thinking
from jaxdeep.errors import ConfigError
from jaxdeep.sample.sizes import EngineConfig, EngineSettings
from jaxdeep.setup.tasksets import EnvConfig

T = TypeVar("T")

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
SHIPPED = {"tiny": ASSETS / "tiny", "maze": ASSETS / "maze"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model: `path` is a folder in the Hugging Face layout, a config.json (with random
    weights), a hub id, "tiny" for the base that comes with the package, or "maze" for a model of
    mazes, which has no weights yet."""

    path: str
    dtype: str = "bfloat16"
    weights: Literal["load", "random"] = "load"
    tokenizer: str = ""  # folder, tokenizer.json or hub id; empty: the model's own
    thinking: Thinking = "write"
    tools_in_prompt: bool = True  # False: for a model that was taught its tools, to save tokens
    # what the backward pass recomputes: all but linears and attention (dots), all but attention, or
    # everything (full); the longer the rows, the more it costs to recompute attention
    remat: str = "full"
    attention: str = "auto"  # the kernel: auto, plain, splash (TPU), cudnn (GPU)
    quant: str = ""  # "int8" holds the frozen linears in one byte a weight
    chunk: int = 256  # positions whose logits exist at one time

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"model.dtype={self.dtype!r} is float32 or bfloat16")

    @property
    def location(self) -> str:
        """The folder, file or hub id, with the names of shipped models resolved to their
        folders."""
        return str(SHIPPED.get(self.path, self.path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(EngineSettings):
    """The limits of a conversation, and the engine that samples it. With `exact` a run repeats
    itself to the last bit on CPUs, after an interruption too."""

    limits: Limits

    def engine(self, adapters: int = 1) -> EngineConfig:
        """The engine's sizes, with room for this many adapters."""
        fields = dataclasses.fields(EngineSettings)
        settings = {field.name: getattr(self, field.name) for field in fields}
        return EngineConfig(**settings, length=self.limits.max_tokens, adapters=adapters)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """A microbatch: rows of packed sequences, and positions in each."""

    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Which policy: `start` is a run's folder (or gs://...) or a PEFT adapter's; empty: the
    base."""

    start: str = ""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, what to keep, and what to start from: a run's folder, or a PEFT adapter's.
    `checkpoints` is a folder for the checkpoints, local or in a bucket (gs://...); empty: the
    workdir."""

    steps: int
    save_every: int = 10
    keep: int = 2
    checkpoints: str = ""
    start: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1 or self.keep < 1:
            raise ConfigError(
                f"train.steps={self.steps}, train.save_every={self.save_every} and "
                f"train.keep={self.keep} must be at least 1"
            )


def load_run(cls: type[T], config: ConfigDict) -> T:
    """The frozen dataclass `cls` of a run, one field a section. ConfigError for an unknown section,
    a missing one, or a value in one that cannot be used."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in config:
        if name not in fields:
            raise ConfigError(f"config.{name} is not a section.{configs.suggest(name, fields)}")
    missing = [n for n, f in fields.items() if n not in config and _required(f)]
    if missing:
        raise ConfigError(f"the configuration lacks the sections {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _section(hints[name], config[name], name) for name in config})


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _section(hint: Any, section: ConfigDict, name: str) -> Any:
    (cls,) = [c for c in typing.get_args(hint) or (hint,) if c is not type(None)]
    return cls.build(section, name) if cls is EnvConfig else configs.build(cls, section, name)
