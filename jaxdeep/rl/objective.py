"""What a GRPO or SFT step minimises, as settings: the loss of a token and how tokens are averaged.

`jaxdeep.train.losses` computes it; nothing here needs jax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxdeep.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Clip:
    """The range of the ratio outside which a token no longer pushes: [1 - low, 1 + high], None for no
    bound on that side. `binary_tv` reads both as differences of probabilities. `dual` bounds the ratio
    of tokens with a negative advantage, which `high` does not (arXiv 1912.09729)."""

    low: float | None = 0.2
    high: float | None = 0.28
    dual: float | None = None

    def __post_init__(self) -> None:
        low, high = 0.5 if self.low is None else self.low, 1.0 if self.high is None else self.high
        if not (0 < low < 1 and high > 0):
            raise ConfigError(f"clip low={low} must be in (0, 1) and high={high} above 0")
        if self.dual is not None and not self.dual > 1 + (self.high or 0.0):
            raise ConfigError(
                f"clip dual={self.dual} must be above 1 + high={1 + (self.high or 0.0)}"
            )


@dataclasses.dataclass(frozen=True)
class Kl:
    """KL to the base in the loss, estimated at the sampled token from d = log p - log p of the base
    (Schulman, 2020): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. On policy the gradient of k2 is that of
    the KL itself, that of k3 near it while d is small, and that of k1 zero on average: k1 only measures."""

    kind: Literal["k1", "k2", "k3"] = "k3"
    coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.coef < float("inf"):
            raise ConfigError(f"kl coef={self.coef} must be a number from 0 up")


@dataclasses.dataclass(frozen=True)
class Correction:
    """For a sampler that is not the trainer: tokens are weighed by p of the trainer before the step over
    p of the sampler, held within [low, high] ("truncate") or 0 outside it ("mask")."""

    kind: Literal["none", "truncate", "mask"] = "none"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1 < self.high:
            raise ConfigError(
                f"correction low={self.low} must be in [0, 1) and high={self.high} above 1"
            )


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a token and how tokens are added up.

    `aggregate`: the mean over all tokens ("token"), over sequences of the mean over their tokens
    ("sequence"), or the sum over tokens divided by sequences x `length` ("constant").

    The ratio is against the sampler, unless there is a correction for it, or `loss` is given the
    trainer's own log-probabilities of before: then it is against those. `binary_tv` stays with the sampler.
    """

    kind: Literal["likelihood", "clip", "gspo", "cispo", "binary_tv"] = "clip"
    clip: Clip = Clip()
    aggregate: Literal["token", "sequence", "constant"] = "token"
    length: int = 1
    kl: Kl = Kl()
    entropy: float = 0.0
    correction: Correction = Correction()

    def __post_init__(self) -> None:
        if self.length < 1 or not math.isfinite(self.entropy):
            raise ConfigError(
                f"length={self.length} must be at least 1 and entropy={self.entropy} a number"
            )
        if self.kind == "binary_tv" and self.correction.kind != "none":
            raise ConfigError(
                f"correction={self.correction.kind!r} does nothing for binary_tv, whose ratio is against "
                "the sampler: use none"
            )
        if self.kind == "cispo" and self.clip.dual is not None:
            raise ConfigError(f"clip dual={self.clip.dual} does nothing for cispo: use None")

    @property
    def ratio_to_sampler(self) -> bool:
        """Whether the ratio is always to the sampler's log-probabilities, also in later passes: the
        total variation that `binary_tv` bounds is the distance to the policy that sampled."""
        return self.kind == "binary_tv"

    def needs_old(self, passes: int) -> bool:
        """Whether a step of so many updates needs the trainer's log-probabilities of before it."""
        return passes > 1 and not self.ratio_to_sampler


SFT = Objective("likelihood")
