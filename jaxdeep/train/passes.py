"""One GRPO step's updates: one optimizer pass over its microbatches, or several."""

from __future__ import annotations

import jax
import numpy as np

from jaxdeep.errors import MismatchError
from jaxdeep.train import losses
from jaxdeep.train import state as states
from jaxdeep.types import Batch


def learn(
    step: states.Step,
    state: states.State,
    frozen: states.Frozen,
    batches: list[Batch],
    tolerance: float | None,
    passes: int,
    logps: list[jax.Array] | None = None,
) -> tuple[states.State | None, dict[str, float], str]:
    """`passes` updates with the same batches: the new state, metrics, and what is wrong, or
    nothing.

    Before the first update trainer and sampler must agree to `tolerance` (None: they were compared
    before). An update whose loss or gradient is no number is not made: the state before the first
    of them is returned, None where an update has used it up. Metrics are those of the last pass;
    what compares with the sampler, `logps` too, is of the first.
    """
    befores = step.reference_logps(state, frozen, batches, old=passes > 1)
    first: dict[str, float] = {}
    for number in range(passes):
        kept = logps if number == 0 else None
        grads, found = step.gradients(state, frozen, batches, befores, kept)
        found = {k: float(v) for k, v in jax.device_get(found).items()}
        if not np.isfinite(found["loss"]) or not np.isfinite(found["grad_norm"]):
            why = blame(step, state, frozen, batches, befores, found)
            return (None if number else state), found, why
        apart = found["max_logp_diff"]
        if tolerance is not None and number == 0 and not apart <= tolerance:
            raise MismatchError(
                f"the log-probabilities of trainer and sampler differ by up to {apart:.3g}, "
                f"more than grpo.tolerance={tolerance:g}: the gradient would be of another policy"
            )
        first = first or {name: found[name] for name in losses.MISMATCH}
        state, moved = step.update(state, grads)
        found |= {k: float(v) for k, v in jax.device_get(moved).items()}
    found["flops"] = step.flops(batches, passes)
    return state, found | first, ""


def blame(
    step: states.Step,
    state: states.State,
    frozen: states.Frozen,
    batches: list[Batch],
    befores: list[losses.ReferenceLogps],
    found: dict[str, float],
) -> str:
    """Which microbatches have a loss or a gradient that is no number."""
    wrong = []
    for i, (batch, before) in enumerate(zip(batches, befores, strict=True), 1):
        if batch.learn_BT.any():
            _, each = step.gradients(state, frozen, [batch], [before])
            if not np.isfinite([float(each["loss"]), float(each["grad_norm"])]).all():
                wrong.append(f"{i} (tokens {int(each['tokens'])})")
    return (
        f"the loss is {found['loss']:.4g} and the norm of its gradient {found['grad_norm']:.4g}, in "
        f"microbatch {', '.join(wrong) or 'none alone'} of {len(batches)}; what was saved before it is kept. "
        "Lower optim.lr, or look at the rollouts of this step"
    )
