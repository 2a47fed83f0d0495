"""The updates of one GRPO step: one optimizer pass over its microbatches, or several."""

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
    sequences: int | None = None,
) -> tuple[states.State | None, dict[str, float], str]:
    """Make `passes` updates on the same batches. Returns the new state, metrics, and '' or what is
    wrong.

    An update is not made if its loss or gradient is not finite. The state returned then is the one
    before the step, to be saved; it is None after an earlier update, which has overwritten it.
    MismatchError if before the first update trainer and sampler differ by more than `tolerance`
    nats at any token (None: not compared).

    The metrics are those of the last pass, but those that compare with the sampler are of the
    first: later passes have moved away from it. So are the log-probabilities of each microbatch,
    [B, T], which are appended to `logps`. `sequences` is the number of rollouts in the batches, as
    `losses.denominator` wants it.
    """
    references = step.reference_logps(state, frozen, batches, old=passes > 1)
    at_first_pass: dict[str, float] = {}
    for number in range(passes):
        grads, metrics = step.gradients(
            state, frozen, batches, references, logps if number == 0 else None, sequences
        )
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
            trouble = blame(step, state, frozen, batches, references, metrics)
            return (None if number else state), metrics, trouble
        if number == 0:
            difference = metrics["max_logp_diff"]
            # not `>`: a difference that is NaN must not pass
            if tolerance is not None and not difference <= tolerance:
                raise MismatchError(
                    "the log-probabilities of trainer and sampler differ by up to "
                    f"{difference:.3g}, more than grpo.tolerance={tolerance:g}: the gradient would "
                    "be of another policy"
                )
            at_first_pass = {name: metrics[name] for name in losses.MISMATCH}
        state, update_metrics = step.update(state, grads)
        metrics |= {k: float(v) for k, v in jax.device_get(update_metrics).items()}
    metrics["flops"] = step.flops(batches, passes)
    return state, metrics | at_first_pass, ""


def blame(
    step: states.Step,
    state: states.State,
    frozen: states.Frozen,
    batches: list[Batch],
    references: list[losses.ReferenceLogps],
    metrics: dict[str, float],
) -> str:
    """A message that names the microbatches whose own loss or gradient is not finite."""
    wrong = []
    for i, (batch, reference) in enumerate(zip(batches, references, strict=True), 1):
        if batch.learn_BT.any():
            _, alone = step.gradients(state, frozen, [batch], [reference])
            if not np.isfinite([float(alone["loss"]), float(alone["grad_norm"])]).all():
                wrong.append(f"{i} (tokens {int(alone['tokens'])})")
    return (
        f"the loss is {metrics['loss']:.4g} and the norm of its gradient "
        f"{metrics['grad_norm']:.4g}, in microbatch {', '.join(wrong) or 'none alone'} of "
        f"{len(batches)}; what was saved before it is kept. Lower optim.lr, or look at the "
        "rollouts of this step"
    )
