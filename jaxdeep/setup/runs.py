"""What each verb is given: a configuration as a frozen dataclass, one field a section.

`load_run(GrpoRun, config)` builds one. What follows from several sections together, the
specification that programs are compiled from and the sizes they are compiled for, is computed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdeep.errors import ConfigError
from jaxdeep.model import lora
from jaxdeep.parallel import mesh as meshes
from jaxdeep.programs import Workload
from jaxdeep.rl.algorithms import GrpoConfig
from jaxdeep.rl.objective import SFT, Kl
from jaxdeep.setup import weights
from jaxdeep.setup.monitor import LogConfig, ProfileConfig
from jaxdeep.setup.sections import (
    BatchConfig,
    ModelConfig,
    RolloutConfig,
    StartConfig,
    TrainConfig,
)
from jaxdeep.setup.sources import DataConfig
from jaxdeep.setup.tasksets import EnvConfig
from jaxdeep.train.guard import GuardConfig
from jaxdeep.train.optim import OptimConfig
from jaxdeep.train.state import Spec


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """What the likelihood is held back by: `kl` to the base, the adapter off, at the learned
    tokens. They are the data's and not sampled from the policy: k2 and k3 are distances there, 0
    where both agree."""

    kl: Kl = dataclasses.field(default_factory=Kl)

    def __post_init__(self) -> None:
        if self.kl.kind == "k1" and self.kl.coef:
            raise ConfigError(
                "sft.kl.kind='k1' has the gradient of the likelihood itself, only smaller: use k2 or k3"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRun:
    """Supervised fine-tuning on the rows of `data`; `env` is for rows that are made from a task
    set."""

    model: ModelConfig
    lora: lora.LoraConfig
    optim: OptimConfig
    mesh: meshes.MeshConfig
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    env: EnvConfig | None = None
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def spec(self, hf: Mapping[str, Any] | None = None) -> Spec:
        """What the steps are compiled from; `hf` as in `weights.spec_of`."""
        objective = dataclasses.replace(SFT, kl=self.sft.kl)
        return weights.spec_of(self.model, self.lora, self.optim, objective, hf=hf)

    def workload(self, spec: Spec, under: tuple[lora.LoraConfig, ...] = ()) -> Workload:
        """The shapes of a step, over frozen adapters of these shapes."""
        rows, length = self.batch.rows, self.batch.length
        return Workload("sft", spec, rows, length, self.data.accumulate, under=under)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoRun:
    """GRPO on rollouts of the task set `env`; `dev` is evaluated now and then."""

    model: ModelConfig
    lora: lora.LoraConfig
    optim: OptimConfig
    mesh: meshes.MeshConfig
    env: EnvConfig
    rollout: RolloutConfig
    grpo: GrpoConfig
    batch: BatchConfig
    train: TrainConfig
    dev: EnvConfig | None = None
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        length, longest = self.batch.length, self.rollout.limits.max_tokens
        if length < longest:
            raise ConfigError(
                f"batch.length={length} must hold a whole rollout: rollout.limits.max_tokens={longest}"
            )
        if self.grpo.eval_every and self.dev is None:
            raise ConfigError(
                f"grpo.eval_every={self.grpo.eval_every} needs a section dev, the task set that is "
                "evaluated: --config.dev.taskset=... and its settings, as in env"
            )
        if self.grpo.ahead and not self.lora.rank:
            raise ConfigError(
                f"grpo.ahead={self.grpo.ahead} needs an adapter: with lora.rank=0 an update changes the "
                "weights under the conversations that are in progress"
            )
        objective = self.grpo.loss(self.rollout.limits)
        stale = self.grpo.ahead and objective.needs_old(self.grpo.passes)
        if stale and self.grpo.correction.kind == "none":
            raise ConfigError(
                f"grpo.ahead={self.grpo.ahead} with grpo.passes={self.grpo.passes} needs "
                "grpo.correction.kind=truncate or mask: the ratio of several passes is to the policy before "
                "the first of them, and nothing would weigh how far that is from the one that sampled"
            )

    def spec(self, rate: float = 1.0, hf: Mapping[str, Any] | None = None) -> Spec:
        """What the steps are compiled from, with `rate` times the configured learning rate; `hf` as
        in `weights.spec_of`."""
        optimizer = self.optim.in_updates(self.grpo.passes)
        optimizer = dataclasses.replace(
            optimizer, lr=optimizer.lr * rate, muon_lr=optimizer.muon_lr * rate
        )
        objective = self.grpo.loss(self.rollout.limits)
        return weights.spec_of(self.model, self.lora, optimizer, objective, hf=hf)

    def workload(self, spec: Spec, under: tuple[lora.LoraConfig, ...] = ()) -> Workload:
        """The shapes of a step and of the engine, over frozen adapters of these shapes, each
        rollout one row as long as its limits allow. Where an environment starts branches
        (`Env.fork`) a rollout has several rows, and a step more microbatches of the same shape than
        these: how many is not known before it is sampled, and nothing compiles for them."""
        rollouts = self.grpo.prompts * self.grpo.group
        rows = -(-rollouts // (self.batch.length // self.rollout.limits.max_tokens))
        return Workload(
            "grpo",
            spec,
            self.batch.rows,
            self.batch.length,
            microbatches=-(-rows // self.batch.rows),
            passes=self.grpo.passes,
            engine=self.rollout.engine(1 + self.grpo.ahead),
            rollouts=rollouts,
            under=under,
        )

    def check_sizes(self, tasks: int, mesh: Any) -> None:
        """ConfigError where the batch does not divide over the mesh, or a step needs more tasks
        than there are."""
        meshes.check_size(mesh, self.batch.rows, self.batch.length)
        if self.grpo.prompts > tasks:
            raise ConfigError(f"grpo.prompts={self.grpo.prompts}, but there are {tasks} questions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
    """A policy and what it is asked: a task set with its limits. Nothing is trained."""

    model: ModelConfig
    lora: lora.LoraConfig
    mesh: meshes.MeshConfig
    env: EnvConfig
    rollout: RolloutConfig
    train: StartConfig = dataclasses.field(default_factory=StartConfig)
