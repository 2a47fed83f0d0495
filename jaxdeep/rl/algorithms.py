"""Algorithms by name: `grpo.algorithm` is one word for a set of values of `GrpoConfig`.

Such a preset is what the algorithm's paper states, and whatever a configuration sets itself
overrides it. "default" is what this package uses: the mean of the group without its standard
deviation, all tokens counting the same, an asymmetric clip, groups of equal rewards left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.rollout import Limits
from jaxdeep.errors import ConfigError
from jaxdeep.rl.advantages import AdvantageSettings, Rules
from jaxdeep.rl.curriculum import SolveRateFilter
from jaxdeep.rl.objective import LossTerms, Objective
from jaxdeep.settings import AtLeast, section

DEVIATION = dict(mean="group", std="group")

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "grpo": dict(  # arXiv 2402.03300
        norm=DEVIATION,
        clip=dict(low=0.2, high=0.2),
        aggregate="sequence",
        kl=dict(kind="k3", coef=0.04),
        flat="keep",
    ),
    "dr_grpo": dict(clip=dict(low=0.2, high=0.2), aggregate="constant", flat="keep"),  # 2503.20783
    "dapo": dict(norm=DEVIATION, flat="resample", shaping=dict(overlong=1.0)),  # 2503.14476
    # 2402.14740, REINFORCE over sequences: the log-probability of one is the sum over its tokens,
    # which aggregate="constant" with length 1 gives
    "rloo": dict(
        norm=dict(leave_one_out=True),
        clip=dict(low=None, high=None),
        aggregate="constant",
        length=1,
        flat="keep",
    ),
    "gspo": dict(  # 2507.18071
        norm=DEVIATION,
        objective="gspo",
        clip=dict(low=3e-4, high=4e-4),
        aggregate="sequence",
        flat="keep",
    ),
    "cispo": dict(  # 2506.13585; the bound as in ScaleRL, 2510.13786
        norm=DEVIATION, objective="cispo", clip=dict(low=None, high=4.0), flat="keep"
    ),
    "binary_tv": dict(objective="binary_tv", clip=dict(low=0.2, high=0.2)),  # DPPO, 2602.04879
    "reinforce_pp": dict(  # REINFORCE++, 2501.03262, without its KL
        norm=dict(mean="batch", std="batch"), clip=dict(low=0.2, high=0.2), flat="keep"
    ),
}


@section(kw_only=True)
class GrpoConfig(AdvantageSettings, LossTerms):
    """The section `grpo`: the settings of advantages and of the loss, and how a step is made of
    rollouts. What is not set here has the value that `algorithm` gives it."""

    prompts: Annotated[int, AtLeast(1), "tasks of a step"]
    group: Annotated[int, AtLeast(2), "rollouts of a task; the baseline is their mean"]
    tolerance: Annotated[
        float,
        AtLeast(0),
        "nats by which trainer and sampler may differ at the first step, in any token",
    ]
    algorithm: Annotated[Literal[*PRESETS], "a set of values for this section"] = "default"
    eval_every: Annotated[int, AtLeast(0), "steps between evaluations of `dev`; 0: never"] = 0
    ahead: Annotated[
        int,
        AtLeast(0),
        "updates made between the begin of a step's rollouts and its own update, at most",
    ] = 0
    tries: Annotated[int, AtLeast(1), "times that a step draws tasks, where flat=resample"] = 3
    curriculum: SolveRateFilter | None = None
    objective: Annotated[
        Literal["clip", "gspo", "cispo", "binary_tv"], "the loss of a token (jaxdeep.train.losses)"
    ] = "clip"
    length: Annotated[
        int, AtLeast(0), "tokens, of aggregate=constant; 0: rollout.limits.max_tokens"
    ] = 0
    passes: Annotated[int, AtLeast(1), "updates with the rollouts of a step"] = 1

    def rules(self, limits: Limits) -> Rules:
        """How rollouts become advantages."""
        return Rules(**self._settings_of(AdvantageSettings), limit=limits.max_tokens)

    def loss(self, limits: Limits) -> Objective:
        """What a step minimises."""
        terms = self._settings_of(LossTerms) | {"length": self.length or limits.max_tokens}
        return Objective(self.objective, **terms)

    def _settings_of(self, base: type) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(base)}


def expand(config: ConfigDict) -> ConfigDict:
    """The configuration with the settings of its algorithm written out in the section `grpo`, under
    those that are set there. ConfigError for an unknown algorithm."""
    section = config.get("grpo")
    if section is None:
        return config
    name = section.get("algorithm", "default")
    if name not in PRESETS:
        raise ConfigError(
            f"grpo.algorithm={name!r} is none of {', '.join(PRESETS)}."
            f"{configs.suggest(str(name), PRESETS)}"
        )
    out = config.copy_and_resolve_references()
    with out.unlocked():
        out.grpo = ConfigDict(merged(PRESETS[name], section.to_dict()))
    return out


def leave(section: ConfigDict, algorithm: str) -> None:
    """Take out of a section `grpo` that has every setting those that are as its algorithm, or
    nobody, has set them: for another one, which has its own."""
    old = section.get("algorithm", "default")
    if old not in PRESETS:
        return
    fields = dataclasses.fields(GrpoConfig)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    own = {name: section[name] for name in needed if name in section}
    usual = configs.plain(configs.build(GrpoConfig, merged(PRESETS[old], own), "grpo"))
    _remove(section, {name: value for name, value in usual.items() if name not in needed})


def _remove(section: ConfigDict, usual: Mapping[str, Any]) -> None:
    for name, value in usual.items():
        mine = section.get(name)
        if isinstance(mine, ConfigDict) and isinstance(value, Mapping):
            _remove(mine, value)
        elif name in section and configs.plain(mine) == value and name != "algorithm":
            del section[name]


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, `override`'s."""
    out = dict(base)
    for key, value in override.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if nested else value
    return out
