"""The settings of what a GRPO or SFT step minimises: the loss of a token and how tokens are
averaged.

`jaxdeep.train.losses` computes it. Nothing here needs jax.
"""

from __future__ import annotations

from typing import Annotated, Literal

from jaxdeep.errors import ConfigError
from jaxdeep.settings import Above, AtLeast, Below, Finite, section

Aggregate = Literal["token", "sequence", "constant"]


@section
class Clip:
    """The range [1 - low, 1 + high] of the probability ratio; outside it a token has no gradient in
    the direction that leads further out. `binary_tv` reads both as bounds on the difference of
    probabilities instead."""

    low: Annotated[float | None, Above(0), Below(1), "how far below 1; None: any"] = 0.2
    high: Annotated[float | None, Above(0), "how far above 1; None: any"] = 0.28
    dual: Annotated[
        float | None,
        Above(1),
        "the largest ratio of tokens with a negative advantage, which `high` does not bound "
        "(arXiv 1912.09729); None: any",
    ] = None

    def __post_init__(self) -> None:
        if self.dual is not None and not self.dual > 1 + (self.high or 0.0):
            raise ConfigError(
                f"grpo.clip.dual={self.dual} must be above 1 + grpo.clip.high="
                f"{1 + (self.high or 0.0)}"
            )


@section
class Kl:
    """A penalty `coef` x KL(policy | base), estimated at the sampled token from d = log p - log p
    of the base (Schulman, 2020): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. On policy, the
    gradient of k2 is that of the KL itself and k3's is close to it while d is small. The expected
    gradient of k1 is zero: it measures the KL without reducing it."""

    kind: Annotated[Literal["k1", "k2", "k3"], "the estimate"] = "k3"
    coef: Annotated[float, AtLeast(0), "its weight; 0: no penalty, and the base is not run"] = 0.0


@section
class Correction:
    """Importance weights for a sampler that differs from the trainer: a token's loss is multiplied
    by p(trainer, before the step) / p(sampler)."""

    kind: Annotated[
        Literal["none", "truncate", "mask"],
        "no weights, or weights clipped to [low, high], or set to 0 outside that range",
    ] = "none"
    low: Annotated[float, AtLeast(0), Below(1), "the smallest weight"] = 0.0
    high: Annotated[float, Above(1), "the largest weight"] = 2.0


@section(kw_only=True)
class LossTerms:
    """What the loss of a step is made of, whatever its objective."""

    clip: Clip = Clip()
    aggregate: Annotated[
        Aggregate,
        "the loss is the mean over all tokens, or within each rollout and then over rollouts, or "
        "the sum divided by rollouts x length",
    ] = "token"
    length: Annotated[int, AtLeast(1), "tokens, of aggregate=constant"] = 1
    kl: Kl = Kl()
    entropy: Annotated[float, Finite(), "the weight of an entropy bonus"] = 0.0
    correction: Correction = Correction()


@section
class Objective(LossTerms):
    """The loss of a step. It is hashed and compared by its settings: steps are compiled for it.

    The ratio is to the sampler's log-probabilities. It is to the trainer's own of before the step
    where there is a correction for the sampler, or where `loss` is given those; `binary_tv` always
    stays with the sampler's.
    """

    kind: Annotated[
        Literal["likelihood", "clip", "gspo", "cispo", "binary_tv"], "the loss of a token"
    ] = "clip"

    def __post_init__(self) -> None:
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
