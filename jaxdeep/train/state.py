"""One training step as two compiled programs: `accumulate` for each microbatch, `update` once.

What is trained is an adapter over frozen weights, or (rank 0) the weights themselves. The frozen
weights are an argument, never in the state, never copied. Any number of microbatches of one shape
runs through the same two programs.
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


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a step is compiled from: hashable, the static argument of everything."""

    model: Config
    lora: lora.LoraConfig
    optim: optim.OptimConfig
    objective: Objective = SFT

    def __post_init__(self) -> None:
        if self.objective.kl.coef and self.full:
            raise ConfigError(
                f"kl coef={self.objective.kl.coef} is towards the frozen base, and lora.rank=0 trains "
                "it: set the coefficient to 0, or train an adapter"
            )

    @property
    def full(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.lora.rank == 0


def shardings(spec: Spec, mesh: jax.sharding.Mesh) -> State:
    """Where each leaf of the state lives: moments beside the parameter they belong to."""
    tree = model_weights.leaves(spec.model) if spec.full else lora.leaves(spec.model, spec.lora)
    trained = model_weights.shardings(spec.model, mesh, tree)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
        tree,
        is_leaf=model_weights.is_leaf,
    )
    whole = meshes.replicated(mesh)
    beside = {
        path: (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree.leaves_with_path(shapes), jax.tree.leaves(trained), strict=True
        )
    }

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        # an optimizer's tree ends in the path of the parameter that a moment belongs to
        tails = (beside.get(path[i:]) for i in range(len(path)))
        return next((tail[1] for tail in tails if tail and tail[0] == leaf.shape), whole)

    opt = jax.eval_shape(optim.chain(spec.optim).init, shapes)
    opt = jax.tree.map_with_path(place, opt)
    return State(trained, opt, whole)


def init(key: jax.Array, spec: Spec, mesh: jax.sharding.Mesh, trained: Any = None) -> State:
    """A fresh state on the mesh, around `trained` if given, else around a new adapter or new weights."""

    def build(key: jax.Array, trained: Any) -> State:
        if trained is None and spec.full:
            trained = model_weights.init(key, spec.model)
        elif trained is None:
            trained = lora.init(key, spec.model, spec.lora)
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        return State(trained, optim.chain(spec.optim).init(trained), jnp.zeros((), jnp.int32))

    return jax.jit(build, out_shardings=shardings(spec, mesh))(key, trained)


def policy(spec: Spec, params: dict | None, trained: Any) -> tuple[dict, dict | None]:
    """The (weights, adapter) that `trained` stands for, in the model's dtype."""
    if not spec.full:
        return params, trained
    dtype = jnp.dtype(spec.model.dtype)
    return jax.tree.map(lambda x: x.astype(dtype), trained), None


class Programs(NamedTuple):
    """The jitted functions of a step: `start` makes zeros for gradients, which `accumulate` adds to."""

    start: Any
    accumulate: Any
    before: Any
    norm: Any
    update: Any


@functools.lru_cache(maxsize=16)
def compiled(spec: Spec, mesh: jax.sharding.Mesh) -> Programs:
    """The programs of all steps with these: one that was compiled is compiled for all."""
    where, whole = shardings(spec, mesh), meshes.replicated(mesh)
    return Programs(
        start=jax.jit(
            lambda trained: jax.tree.map(jnp.zeros_like, trained), out_shardings=where.trained
        ),
        accumulate=jax.jit(
            functools.partial(accumulate, spec=spec),
            donate_argnames="grads",
            out_shardings=(where.trained, whole, whole),
        ),
        before=jax.jit(functools.partial(before, spec=spec), static_argnames="own"),
        norm=jax.jit(optax.tree_utils.tree_norm),
        update=jax.jit(
            functools.partial(update, spec=spec),
            donate_argnames="state",
            out_shardings=(where, whole),
        ),
    )


class Step:
    """The compiled step. Call it with the state, the frozen weights and numpy microbatches."""

    def __init__(self, spec: Spec, mesh: jax.sharding.Mesh) -> None:
        self.spec, self.mesh, self._programs = spec, mesh, compiled(spec, mesh)

    def before(
        self, state: State, params: dict | None, batches: Sequence[Batch], *, own: bool = False
    ) -> list[losses.ReferenceLogps]:
        """What the loss compares each microbatch with: log-probabilities of the base where the objective
        has a KL term, and those of the state itself where several updates are to follow (`own`; but
        `binary_tv` stays with the sampler's)."""
        own = own and self.spec.objective.kind != "binary_tv"
        if not (own or self.spec.objective.kl.coef):
            return [losses.NO_REFERENCE for _ in batches]
        with meshes.use(self.mesh), meshes.dispatch_lock(self.mesh):
            return [
                self._programs.before(state.trained, params, meshes.put(self.mesh, batch), own=own)
                for batch in batches
            ]

    def gradients(
        self,
        state: State,
        params: dict | None,
        batches: Sequence[Batch],
        befores: Sequence[losses.ReferenceLogps] | None = None,
        logps: list[jax.Array] | None = None,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Gradients and metrics of all microbatches together; the state is left as it is. `befores` is
        from `before`, and is asked for here where it was not given. A list `logps` is given each
        microbatch's log-probabilities, [B, T]."""
        count = losses.count(batches, self.spec.objective)
        if not count:
            raise ConfigError("a batch without a single token to learn from")
        if befores is None:
            befores = self.before(state, params, batches)
        with meshes.use(self.mesh), meshes.dispatch_lock(self.mesh):
            grads, totals = self._programs.start(state.trained), None
            for batch, known in zip(batches, befores, strict=True):
                grads, metrics, logp_BT = self._programs.accumulate(
                    grads=grads,
                    trained=state.trained,
                    params=params,
                    batch=meshes.put(self.mesh, batch),
                    before=known,
                    weight=np.float32(1 / count),
                )
                totals = metrics if totals is None else add(totals, metrics)
                if logps is not None:
                    logps.append(logp_BT)
            norm = self._programs.norm(grads)
        # not the sum of the mask, which data may weigh
        tokens = sum(float(np.count_nonzero(batch.learn_BT)) for batch in batches)
        return grads, losses.summary(totals, count) | {"grad_norm": norm, "tokens": tokens}

    def flops(self, batches: Sequence[Batch], passes: int = 1) -> float:
        """Model FLOPs of `passes` calls of `gradients` with what `before` computes for them."""
        objective = self.spec.objective
        own = passes > 1 and objective.kind != "binary_tv"
        forwards = own + bool(objective.kl.coef)
        spec = self.spec
        return flops.of_step(spec.model, spec.lora, batches, passes=passes, forwards=forwards)

    def update(self, state: State, grads: Any) -> tuple[State, dict[str, jax.Array]]:
        """The next state; `state` is used up."""
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
    params: dict | None,
    batch: Batch,
    before: losses.ReferenceLogps,
    weight: jax.Array,
    spec: Spec,
) -> tuple[Any, dict, jax.Array]:
    """`grads` plus `weight` times the gradient of this microbatch's summed loss, its metrics, and the
    log-probabilities it is of, [B, T]."""

    def total(trained: Any) -> tuple[jax.Array, tuple[dict, jax.Array]]:
        weights, adapter = policy(spec, params, trained)
        logp_BT, entropy_BT = losses.score(weights, adapter, batch, cfg=spec.model)
        loss, metrics = losses.loss(logp_BT, entropy_BT, batch, before, objective=spec.objective)
        return loss * weight, (metrics, logp_BT)

    with model_weights.matmul_precision(spec.model):
        new, (metrics, logp_BT) = jax.grad(total, has_aux=True)(trained)
    return jax.tree.map(jnp.add, grads, new), metrics, logp_BT


def before(
    trained: Any, params: dict | None, batch: Batch, *, own: bool, spec: Spec
) -> losses.ReferenceLogps:
    """Log-probabilities of a microbatch under what is trained (`own`) and, for KL, under the base: the
    same weights with no adapter."""

    def logps(weights: dict, adapter: dict | None) -> jax.Array:
        logp_BT, _ = losses.score(weights, adapter, batch, cfg=spec.model)
        return meshes.constrain(logp_BT, meshes.ROWS, "context")

    with model_weights.matmul_precision(spec.model):
        return losses.ReferenceLogps(
            logps(*policy(spec, params, trained)) if own else None,
            logps(params, None) if spec.objective.kl.coef else None,
        )


def update(*, state: State, grads: Any, spec: Spec) -> tuple[State, dict]:
    """One optimizer update."""
    updates, opt = optim.chain(spec.optim).update(grads, state.opt, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    lr = optim.schedule(spec.optim, spec.optim.lr)(state.step)
    return State(trained, opt, state.step + 1), {"lr": lr}
