"""From the section `data` of a configuration to what builds a data set.

`data.builder` names a frozen dataclass with `build(workdir) -> Built`: one of `BUILT_IN`, or one of
your own as "FILE.py:NAME" or "module:NAME". The other keys of the section are its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.data.build import Builder
from jaxdeep.errors import ConfigError
from jaxdeep.setup.tasksets import frozen_class

BUILT_IN = {"textbook": "jaxdeep.envs.textbook.build:Textbook"}


@dataclasses.dataclass(frozen=True)
class BuilderConfig:
    """`settings` is the builder's own dataclass, built from all other keys of the section."""

    builder: str
    settings: Builder

    @classmethod
    def build(cls, section: Mapping[str, Any] | ConfigDict, key: str = "data") -> BuilderConfig:
        """The section as written in a configuration; ConfigError names `key.NAME` for what is
        wrong."""
        values = dict(section.items())
        name = values.pop("builder", None)
        if not isinstance(name, str):
            raise ConfigError(
                f"{key}.builder is {name!r}; it names what builds: {', '.join(BUILT_IN)}, or "
                "FILE.py:NAME"
            )
        return cls(name, configs.build(builder_class(name), values, key))

    def section(self) -> dict[str, Any]:
        """The section with all of its settings, as a record of a run holds it."""
        fields = dataclasses.fields(self.settings)
        return {"builder": self.builder} | {
            field.name: getattr(self.settings, field.name) for field in fields if field.init
        }


def load_builder(config: ConfigDict) -> BuilderConfig:
    """The configuration's only section, `data`, as what it names; ConfigError for what is wrong in
    it."""
    others = [name for name in config if name != "data"]
    if others or "data" not in config:
        what = f"config.{others[0]} is not a section" if others else "the section data is missing"
        raise ConfigError(f"{what}: a configuration of the verb data has the section data alone")
    return BuilderConfig.build(config.data)


def builder_class(name: str) -> type:
    """The dataclass that `data.builder` names; ConfigError where there is none."""
    does = "build(workdir) that writes the data set"
    return frozen_class(name, "data.builder", BUILT_IN, "build", does)
