"""The optimizer: from its settings to an optax transformation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import optax
import optax.contrib

from jaxdeep.errors import ConfigError
from jaxdeep.settings import Above, AtLeast, AtMost, Below, section


@section
class OptimConfig:
    """The optimizer and its learning rate: it rises linearly for `warmup` steps and falls by
    `decay` to `end * lr` at step `steps`."""

    lr: Annotated[float, Above(0), "the peak of the learning rate"]
    steps: Annotated[
        int, AtLeast(1), "the step at which the rate has fallen; train.steps as a rule"
    ]
    warmup: Annotated[int, AtLeast(0), "steps for which the rate rises, at most `steps`"] = 0
    decay: Annotated[Literal["linear", "cosine", "constant"], "how the rate falls"] = "linear"
    end: Annotated[float, AtLeast(0), AtMost(1), "the last rate, as a share of the peak"] = 0.0
    b1: Annotated[float, AtLeast(0), Below(1), "decay of the mean of the gradients"] = 0.9
    b2: Annotated[float, AtLeast(0), Below(1), "decay of the mean of their squares"] = 0.95
    weight_decay: Annotated[
        float,
        AtLeast(0),
        "decoupled decay, times the rate, of linears, the head and "
        "an adapter's factors; norms, biases and the embedding stay as they are",
    ] = 0.0
    clip: Annotated[
        float, AtLeast(0), "the largest global norm of the gradients; 0: they are not clipped"
    ] = 1.0
    name: Annotated[
        Literal["adamw", "muon"], "AdamW, or Muon for the linears and AdamW for the rest"
    ] = "adamw"
    muon_lr: Annotated[
        float, Above(0), "the peak rate of Muon, whose updates have a norm of their own"
    ] = 0.02

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise ConfigError(
                f"optim.warmup={self.warmup} must not be above optim.steps={self.steps}: the rate "
                "would never reach optim.lr"
            )

    def in_updates(self, passes: int) -> OptimConfig:
        """The same schedule counted in updates, for a run of `passes` updates a step."""
        return dataclasses.replace(self, steps=self.steps * passes, warmup=self.warmup * passes)


def schedule(cfg: OptimConfig, lr: float) -> optax.Schedule:
    """The learning rate by update, counted from 0; `lr` is its peak."""
    rest = max(cfg.steps - cfg.warmup, 1)
    after = {
        "linear": optax.linear_schedule(lr, lr * cfg.end, rest),
        "cosine": optax.cosine_decay_schedule(lr, rest, cfg.end),
        "constant": optax.constant_schedule(lr),
    }[cfg.decay]
    # not from 0, which would waste the first update: update i has the rate lr * (i + 1) / warmup
    ramp = optax.linear_schedule(lr / max(cfg.warmup, 1), lr, max(cfg.warmup - 1, 1))
    return optax.join_schedules([ramp, after], [cfg.warmup])


def chain(cfg: OptimConfig) -> optax.GradientTransformation:
    """The optax transformation that `cfg` describes. It is built inside the jitted functions: as a
    static argument it would compile them again each time, as no two transformations are equal."""
    mask = decayed if cfg.weight_decay else None
    adamw = optax.adamw(
        schedule(cfg, cfg.lr), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=mask
    )
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
    if cfg.name == "adamw":
        return optax.chain(clip, adamw)

    # stacked linears [L, in, out]: each layer is orthogonalized by itself
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    muon = optax.contrib.muon(
        schedule(cfg, cfg.muon_lr),
        weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: numbers, tree),
    )
    both = optax.partition(
        {"muon": muon, "adamw": adamw},
        lambda tree: jax.tree.map(lambda leaf: "muon" if leaf.ndim == 3 else "adamw", tree),
    )
    return optax.chain(clip, both)


def decayed(tree: Any) -> Any:
    """Whether weight decay applies to each leaf of what is trained: to matrices that multiply. A
    norm or a bias has no direction to forget, and a row of the embedding that a batch does not hold
    would only shrink."""

    def one(path: tuple, leaf: Any) -> bool:
        # stacked by layer, a linear has three dimensions and a norm two
        return leaf.ndim >= 3 or path[-1].key == "head"

    return jax.tree.map_with_path(one, tree)
