"""The optimizer: from its settings to an optax transformation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
import optax.contrib

from jaxdeep.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon for the linears and AdamW for the rest. The rate rises linearly for `warmup`
    steps and falls by `decay` to `end * lr` at step `steps`."""

    lr: float
    steps: int
    warmup: int = 0
    decay: str = "linear"  # or "cosine", "constant"
    end: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0  # the largest global norm of the gradients
    name: str = "adamw"  # or "muon"
    muon_lr: float = 0.02  # Muon's updates have a norm of their own, and so a rate of their own

    def __post_init__(self) -> None:
        if self.decay not in ("linear", "cosine", "constant") or self.name not in ("adamw", "muon"):
            raise ConfigError(
                f"optim.decay={self.decay!r} is one of linear, cosine, constant and "
                f"optim.name={self.name!r} one of adamw, muon"
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
    adamw = optax.adamw(schedule(cfg, cfg.lr), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay)
    if cfg.name == "adamw":
        return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw)

    def matrices(tree: Any) -> Any:
        # stacked linears [L, in, out]: each layer is orthogonalized by itself
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        return jax.tree.map(lambda leaf: numbers if leaf.ndim == 3 else None, tree)

    muon = optax.contrib.muon(
        schedule(cfg, cfg.muon_lr),
        weight_decay=cfg.weight_decay,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_weight_decay=cfg.weight_decay,
        adam_learning_rate=schedule(cfg, cfg.lr),
        muon_weight_dimension_numbers=matrices,  # leaves without any are AdamW's
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip), muon)
