"""The loss on rows that are not trained on: a forward pass and two sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxdeep.model import weights as model_weights
from jaxdeep.parallel import mesh as meshes
from jaxdeep.train import losses
from jaxdeep.train import state as states
from jaxdeep.types import Batch


class Measure:
    """One compiled program, for the state, what is frozen, and numpy batches of one shape."""

    def __init__(self, spec: states.Spec, mesh: jax.sharding.Mesh) -> None:
        def sums(trained: Any, frozen: states.Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
            params, adapter = states.policy(spec, frozen.params, trained, frozen.under)
            with model_weights.matmul_precision(spec.model):
                logp_BT, _ = losses.score(params, adapter, batch, cfg=spec.model)
            return -(logp_BT * batch.learn_BT).sum(), batch.learn_BT.sum()

        self._sums = jax.jit(sums, out_shardings=meshes.replicated(mesh))
        self._mesh = mesh

    def __call__(
        self, state: states.State, frozen: states.Frozen, batches: Sequence[Batch]
    ) -> dict[str, float]:
        """The mean of -log p over the learned tokens, weighted by the mask, in nats ("loss"), and
        the number of learned tokens ("tokens")."""
        with meshes.use(self._mesh):
            sums = [
                self._sums(state.trained, frozen, meshes.put(self._mesh, batch))
                for batch in batches
            ]
        total, weight = (sum(map(float, column)) for column in zip(*sums, strict=True))
        learned = sum(int((batch.learn_BT > 0).sum()) for batch in batches)
        return {"loss": total / weight, "tokens": learned}
