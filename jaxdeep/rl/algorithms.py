"""What a GRPO run learns by: one word, `grpo.algorithm`, and every setting that it stands for.

An algorithm is a preset of settings of `GrpoConfig`; whatever a configuration sets itself goes over it.
A preset is what its paper states; "default" is what this package uses: the mean of the group without
its deviation, all tokens counting the same, an asymmetric clip, groups of equal rewards left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.rollout import Limits
from jaxdeep.errors import ConfigError
from jaxdeep.rl.advantages import Norm, Part, Rules
from jaxdeep.rl.curriculum import SolveRateFilter
from jaxdeep.rl.objective import Clip, Correction, Kl, Objective
from jaxdeep.rl.shaping import Shaping

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
    "rloo": dict(  # 2402.14740: REINFORCE, the log-probability of a sequence is the sum of its tokens'
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


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """`prompts` tasks a step, `group` rollouts a task. `tolerance` is how far trainer and sampler may be
    apart at the first step, in nats, at the token where they differ most. `eval_every` steps `dev` is
    evaluated (0: never). `ahead` updates may be made between the begin of a step's rollouts and its own
    (0: none, all are of the present policy): see jaxdeep.setup.explore. The rest has the defaults of
    `algorithm`."""

    prompts: int
    group: int
    tolerance: float
    algorithm: str = "default"
    eval_every: int = 0
    ahead: int = 0
    # advantages: see jaxdeep.rl.advantages and shaping
    norm: Norm = dataclasses.field(default_factory=Norm)
    flat: Literal["drop", "keep", "resample"] = "drop"
    tries: int = 3  # times that tasks are drawn for a step, where flat="resample"
    truncated: Part = "keep"
    failed: Part = "drop"
    shaping: Shaping = dataclasses.field(default_factory=Shaping)
    solved: float = 1.0  # a rollout with at least this reward solved its task
    curriculum: SolveRateFilter | None = None  # see jaxdeep.rl.curriculum
    # the loss: see jaxdeep.train.losses
    objective: Literal["clip", "gspo", "cispo", "binary_tv"] = "clip"
    clip: Clip = dataclasses.field(default_factory=Clip)
    aggregate: Literal["token", "sequence", "constant"] = "token"
    length: int = 0  # of "constant", in tokens; 0: rollout.limits.max_tokens
    kl: Kl = dataclasses.field(default_factory=Kl)
    entropy: float = 0.0  # what an entropy bonus counts
    correction: Correction = dataclasses.field(default_factory=Correction)
    passes: int = 1  # updates of the optimizer with the rollouts of a step

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.group < 2:
            raise ConfigError(
                f"grpo.prompts={self.prompts} must be at least 1 and grpo.group={self.group} at least 2: "
                "the baseline is the mean of the group"
            )
        if self.passes < 1 or self.tries < 1 or min(self.length, self.eval_every, self.ahead) < 0:
            raise ConfigError(
                f"grpo.passes={self.passes} and grpo.tries={self.tries} must be at least 1, "
                f"grpo.length={self.length}, grpo.eval_every={self.eval_every} and "
                f"grpo.ahead={self.ahead} not below 0"
            )

    def rules(self, limits: Limits) -> Rules:
        """How rollouts become advantages."""
        return Rules(
            norm=self.norm,
            flat=self.flat,
            truncated=self.truncated,
            failed=self.failed,
            shaping=self.shaping,
            limit=limits.max_tokens,
            solved=self.solved,
        )

    def loss(self, limits: Limits) -> Objective:
        """What a step minimises."""
        return Objective(
            kind=self.objective,
            clip=self.clip,
            aggregate=self.aggregate,
            length=self.length or limits.max_tokens,
            kl=self.kl,
            entropy=self.entropy,
            correction=self.correction,
        )


def expand(config: ConfigDict) -> ConfigDict:
    """The configuration with the settings of its algorithm written out in the section `grpo`, those
    that are set already over them."""
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
        out.grpo = ConfigDict(over(PRESETS[name], section.to_dict()))
    return out


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one, the second over the first."""
    out = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = over(out[key], value) if nested else value
    return out
