"""The settings of what a GRPO or SFT step minimises: the loss of a token and how tokens are
averaged.

`jaxdeep.train.losses` computes it. Nothing here needs jax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxdeep.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Clip:
    """The range [1 - low, 1 + high] of the probability ratio; outside it a token has no gradient in
    the direction that leads further out. None: no bound on that side. `binary_tv` reads both as
    bounds on the difference of probabilities instead. `dual` bounds the ratio of tokens with a
    negative advantage from above, which `high` does not do (arXiv 1912.09729)."""

    low: float | None = 0.2
    high: float | None = 0.28
    dual: float | None = None

    def __post_init__(self) -> None:
        low, high = 0.5 if self.low is None else self.low, 1.0 if self.high is None else self.high
        if not (0 < low < 1 and high > 0):
            raise ConfigError(
                f"grpo.clip.low={low} must be in (0, 1) and grpo.clip.high={high} above 0"
            )
        if self.dual is not None and not self.dual > 1 + (self.high or 0.0):
            raise ConfigError(
                f"grpo.clip.dual={self.dual} must be above 1 + grpo.clip.high="
                f"{1 + (self.high or 0.0)}"
            )


@dataclasses.dataclass(frozen=True)
class Kl:
    """A penalty `coef` x KL(policy | base), estimated at the sampled token from d = log p - log p
    of the base (Schulman, 2020): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. On policy, the
    gradient of k2 is that of the KL itself and k3's is close to it while d is small. The expected
    gradient of k1 is zero: it measures the KL without reducing it."""

    kind: Literal["k1", "k2", "k3"] = "k3"
    coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.coef < float("inf"):
            raise ConfigError(
                f"grpo.kl.coef or sft.kl.coef={self.coef} must be a finite number, 0 or more"
            )


@dataclasses.dataclass(frozen=True)
class Correction:
    """Importance weights for a sampler that differs from the trainer: a token's loss is multiplied
    by p(trainer, before the step) / p(sampler). The weight is clipped to [low, high] ("truncate"),
    or set to 0 outside that range ("mask")."""

    kind: Literal["none", "truncate", "mask"] = "none"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1 < self.high:
            raise ConfigError(
                f"grpo.correction.low={self.low} must be in [0, 1) and "
                f"grpo.correction.high={self.high} above 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What the loss of a step is made of, whatever its objective.

    `aggregate` averages tokens: over all tokens ("token"), within each sequence and then over
    sequences ("sequence"), or as their sum divided by sequences x `length` ("constant"). `entropy`
    is the weight of an entropy bonus.
    """

    clip: Clip = Clip()
    aggregate: Literal["token", "sequence", "constant"] = "token"
    length: int = 1  # of "constant", in tokens
    kl: Kl = Kl()
    entropy: float = 0.0
    correction: Correction = Correction()


@dataclasses.dataclass(frozen=True)
class Objective(LossTerms):
    """The loss of a step. It is hashed and compared by its settings: steps are compiled for it.

    The ratio is to the sampler's log-probabilities. It is to the trainer's own of before the step
    where there is a correction for the sampler, or where `loss` is given those; `binary_tv` always
    stays with the sampler's.
    """

    kind: Literal["likelihood", "clip", "gspo", "cispo", "binary_tv"] = "clip"

    def __post_init__(self) -> None:
        if self.length < 1 or not math.isfinite(self.entropy):
            raise ConfigError(
                f"grpo.length={self.length} must be at least 1, grpo.entropy={self.entropy} finite"
            )
        if self.kind == "binary_tv" and self.correction.kind != "none":
            raise ConfigError(
                f"grpo.correction.kind={self.correction.kind!r} does nothing for binary_tv, whose "
                "ratio is to the sampler: use none"
            )
        if self.kind == "cispo" and self.clip.dual is not None:
            raise ConfigError(f"grpo.clip.dual={self.clip.dual} does nothing for cispo: use None")

    @property
    def ratio_to_sampler(self) -> bool:
        """Whether the ratio is always to the sampler's log-probabilities, also in later passes: the
        total variation that `binary_tv` bounds is the distance to the policy that sampled."""
        return self.kind == "binary_tv"

    def needs_old(self, passes: int) -> bool:
        """Whether a step of so many updates needs the trainer's log-probabilities of before it."""
        return passes > 1 and not self.ratio_to_sampler


SFT = Objective("likelihood")
