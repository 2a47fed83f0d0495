"""One training step as compiled programs: `accumulate` for each microbatch, `update` once.

What is trained is an adapter over frozen weights, or (rank 0) the weights themselves. What is
frozen is an argument of every step: it is never in the optimizer's state, never copied and never
donated. Any number of microbatches of one shape runs through the same two programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxdeep.errors import ConfigError
from jaxdeep.model import flops, lora
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl.objective import SFT, Objective
from jaxdeep.train import losses, optim
from jaxdeep.types import Batch


@struct.dataclass
class State:
    """All that training changes: the trained tree (float32), the optimizer's state, the step."""

    trained: Any
    opt: Any
    step: jax.Array


@struct.dataclass
class Frozen:
    """All that a step reads and never changes: the base's weights (None if they are what is
    trained), and the adapters that lie between the base and the trained one (`lora.place`d on the
    mesh).

    The reference policy of a KL term is this alone, without what is trained.
    """

    params: dict | None
    under: tuple[lora.Adapter, ...] = ()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the programs of a step are compiled from; hashable, a static argument of them all."""

    model: Config
    lora: lora.LoraConfig
    optim: optim.OptimConfig | None = None  # None: nothing is trained
    objective: Objective = SFT

    def __post_init__(self) -> None:
        if self.objective.kl.coef and self.full:
            raise ConfigError(
                f"grpo.kl.coef or sft.kl.coef={self.objective.kl.coef} is towards the frozen base, "
                "and lora.rank=0 trains it: set the coefficient to 0, or train an adapter"
            )

    @property
    def full(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.lora.rank == 0


def trained_leaves(spec: Spec) -> Any:
    """The tree of what is trained, a `weights.Leaf` in place of each array."""
    if spec.full:
        return model_weights.leaves(spec.model)
    return lora.leaves(spec.model, spec.lora)


def trained_shapes(spec: Spec, mesh: jax.sharding.Mesh) -> Any:
    """The arrays of what is trained, as shapes with shardings."""
    return model_weights.shapes(spec.model, mesh, trained_leaves(spec), "float32")


def shardings(spec: Spec, mesh: jax.sharding.Mesh) -> State:
    """The sharding of each array of the state: moments lie with the parameter they belong to."""
    shapes = trained_shapes(spec, mesh)
    replicated = meshes.replicated(mesh)
    parameters = {path: (x.shape, x.sharding) for path, x in jax.tree.leaves_with_path(shapes)}

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        # The path of a moment in the optimizer's tree ends in the path of its parameter. The shape
        # is compared, too: Muon keeps a scalar in place of the moments it does not need.
        tails = (parameters.get(path[i:]) for i in range(len(path)))
        return next((tail[1] for tail in tails if tail and tail[0] == leaf.shape), replicated)

    opt = jax.eval_shape(optim.chain(spec.optim).init, shapes)
    return State(
        trained=jax.tree.map(lambda x: x.sharding, shapes),
        opt=jax.tree.map_with_path(sharding, opt),
        step=replicated,
    )


def init(key: jax.Array, spec: Spec, mesh: jax.sharding.Mesh, trained: Any = None) -> State:
    """A fresh state on the mesh, around `trained` (default: a new adapter, or new weights)."""

    def build(key: jax.Array, trained: Any) -> State:
        if trained is None and spec.full:
            trained = model_weights.init(key, spec.model)
        elif trained is None:
            trained = lora.init(key, spec.model, spec.lora)
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        return State(trained, optim.chain(spec.optim).init(trained), jnp.zeros((), jnp.int32))

    return jax.jit(build, out_shardings=shardings(spec, mesh))(key, trained)


def policy(
    spec: Spec, params: dict | None, trained: Any, under: tuple[lora.Adapter, ...] = ()
) -> tuple[dict, lora.Adapter | tuple[lora.Adapter, ...] | None]:
    """The weights and the adapter that `trained` stands for: what the model and the engine take.

    The adapter has the scale of `spec.lora`, a constant inside jit. It is None where the weights
    are what is trained, which are cast to the model's dtype; with `under` it is those adapters and
    the trained one, whose effects add up.
    """
    if spec.full:
        dtype = jnp.dtype(spec.model.dtype)
        return jax.tree.map(lambda x: x.astype(dtype), trained), None
    adapter = lora.Adapter(trained, spec.lora.scale)
    return params, (*under, adapter) if under else adapter


class Programs(NamedTuple):
    """The jitted functions of a step. `start` makes the zeros that `accumulate` adds to."""

    start: Any
    accumulate: Any
    reference_logps: Any
    norm: Any
    update: Any


@functools.lru_cache(maxsize=16)
def compiled(spec: Spec, mesh: jax.sharding.Mesh) -> Programs:
    """The programs of every step with this spec on this mesh. They are kept, so that nothing is
    compiled twice by a second `Step`, or after `programs.compile_all`."""
    state, replicated = shardings(spec, mesh), meshes.replicated(mesh)
    return Programs(
        start=jax.jit(
            lambda trained: jax.tree.map(jnp.zeros_like, trained), out_shardings=state.trained
        ),
        accumulate=jax.jit(
            functools.partial(accumulate, spec=spec),
            donate_argnames="grads",
            out_shardings=(state.trained, replicated, replicated),
        ),
        reference_logps=jax.jit(
            functools.partial(reference_logps, spec=spec), static_argnames="old"
        ),
        norm=jax.jit(optax.tree_utils.tree_norm),
        # apart from the gradients, so that another length of rows does not compile the optimizer
        # again
        update=jax.jit(
            functools.partial(update, spec=spec),
            donate_argnames="state",
            out_shardings=(state, replicated),
        ),
    )


class Step:
    """The compiled step. Its methods take the state, what is frozen, and numpy microbatches."""

    def __init__(self, spec: Spec, mesh: jax.sharding.Mesh) -> None:
        self.spec, self.mesh, self._programs = spec, mesh, compiled(spec, mesh)

    def reference_logps(
        self, state: State, frozen: Frozen, batches: Sequence[Batch], *, old: bool = False
    ) -> list[losses.ReferenceLogps]:
        """The log-probabilities that the loss compares each microbatch with: those of the reference
        policy if the objective has a KL term, and with `old` those of the state as it is now (for
        several updates with the same batches), unless the objective's ratio is to the sampler."""
        old = old and not self.spec.objective.ratio_to_sampler
        if not (old or self.spec.objective.kl.coef):
            return [losses.NO_REFERENCE for _ in batches]
        with meshes.use(self.mesh), meshes.dispatch_lock(self.mesh):
            return [
                self._programs.reference_logps(
                    state.trained, frozen, meshes.put(self.mesh, batch), old=old
                )
                for batch in batches
            ]

    def gradients(
        self,
        state: State,
        frozen: Frozen,
        batches: Sequence[Batch],
        references: Sequence[losses.ReferenceLogps] | None = None,
        logps: list[jax.Array] | None = None,
        sequences: int | None = None,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Gradients and metrics of all microbatches together; the state stays as it is.

        `references` are from `reference_logps` (default: computed here). To a list `logps` each
        microbatch's log-probabilities [B, T] are appended. `sequences` as in `losses.denominator`.
        ConfigError if no token is learned.
        """
        count = losses.denominator(batches, self.spec.objective, sequences)
        if not count:
            raise ConfigError("a batch without a single token to learn from")
        if references is None:
            references = self.reference_logps(state, frozen, batches)
        with meshes.use(self.mesh), meshes.dispatch_lock(self.mesh):
            grads, totals = self._programs.start(state.trained), None
            for batch, reference in zip(batches, references, strict=True):
                grads, metrics, logp_BT = self._programs.accumulate(
                    grads=grads,
                    trained=state.trained,
                    frozen=frozen,
                    batch=meshes.put(self.mesh, batch),
                    reference=reference,
                    # one count for all microbatches: how tokens are cut into them changes nothing
                    weight=np.float32(1 / count),
                )
                totals = metrics if totals is None else add(totals, metrics)
                if logps is not None:
                    logps.append(logp_BT)
            norm = self._programs.norm(grads)
        # counted, not the sum of the mask: data may weigh its tokens
        tokens = sum(float(np.count_nonzero(batch.learn_BT)) for batch in batches)
        return grads, losses.summary(totals, count) | {"grad_norm": norm, "tokens": tokens}

    def flops(self, batches: Sequence[Batch], passes: int = 1) -> float:
        """Model FLOPs of `passes` calls of `gradients`, and of `reference_logps` for them."""
        spec, objective = self.spec, self.spec.objective
        forwards = objective.needs_old(passes) + bool(objective.kl.coef)
        return flops.of_step(spec.model, spec.lora, batches, passes=passes, forwards=forwards)

    def update(self, state: State, grads: Any) -> tuple[State, dict[str, jax.Array]]:
        """The next state and the learning rate; `state` is donated."""
        with meshes.use(self.mesh), meshes.dispatch_lock(self.mesh):
            return self._programs.update(state=state, grads=grads)


def add(a: dict, b: dict) -> dict:
    """Metrics of two microbatches together."""
    return {
        "sum": {name: a["sum"][name] + b["sum"][name] for name in a["sum"]},
        "max": {name: jnp.maximum(a["max"][name], b["max"][name]) for name in a["max"]},
    }


def accumulate(
    *,
    grads: Any,
    trained: Any,
    frozen: Frozen,
    batch: Batch,
    reference: losses.ReferenceLogps,
    weight: jax.Array,
    spec: Spec,
) -> tuple[Any, dict, jax.Array]:
    """`grads` plus `weight` times the gradient of this microbatch's summed loss, the microbatch's
    metrics, and its log-probabilities [B, T]."""

    def total(trained: Any) -> tuple[jax.Array, tuple[dict, jax.Array]]:
        params, adapter = policy(spec, frozen.params, trained, frozen.under)
        logp_BT, entropy_BT = losses.score(params, adapter, batch, cfg=spec.model)
        loss, metrics = losses.loss(logp_BT, entropy_BT, batch, reference, objective=spec.objective)
        return loss * weight, (metrics, logp_BT)

    with model_weights.matmul_precision(spec.model):
        new, (metrics, logp_BT) = jax.grad(total, has_aux=True)(trained)
    return jax.tree.map(jnp.add, grads, new), metrics, logp_BT


def reference_logps(
    trained: Any, frozen: Frozen, batch: Batch, *, old: bool, spec: Spec
) -> losses.ReferenceLogps:
    """Log-probabilities of a microbatch under what is trained (if `old`) and, for a KL term, under
    what is frozen alone: the base with the adapters under the trained one."""

    def logps(params: dict, adapter: Any) -> jax.Array:
        logp_BT, _ = losses.score(params, adapter, batch, cfg=spec.model)
        return meshes.constrain(logp_BT, meshes.ROWS, "context")

    with model_weights.matmul_precision(spec.model):
        return losses.ReferenceLogps(
            logps(*policy(spec, frozen.params, trained, frozen.under)) if old else None,
            logps(frozen.params, frozen.under) if spec.objective.kl.coef else None,
        )


def update(*, state: State, grads: Any, spec: Spec) -> tuple[State, dict]:
    """One optimizer update."""
    updates, opt = optim.chain(spec.optim).update(grads, state.opt, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    lr = optim.schedule(spec.optim, spec.optim.lr)(state.step)
    return State(trained, opt, state.step + 1), {"lr": lr}
