"""The programs of a training step, lowered from shapes: no weight, state or batch exists.

What the compiler says of them (memory, kernels, time) is measured by the files beside this one and
by tests. Devices may be described ones (`jax.experimental.topologies`) in the place of real ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxdeep import mesh as meshes
from jaxdeep.model import arch, lora
from jaxdeep.train import losses, optim
from jaxdeep.train import state as states
from jaxdeep.types import Batch

QWEN3_8B = dict(V=151_936, D=4096, F=12_288, L=36, N=32, K=8, H=128, theta=1e6, eps=1e-6, tie=False)
LONG = states.Spec(  # one layer, for many tokens
    arch.Config(
        **dict(V=32, D=64, F=128, L=1, N=4, K=1, H=16, theta=1e4, eps=1e-6, tie=True),
        **dict(limit=1 << 17, dtype="float32", remat="full", chunk=1024),
    ),
    lora.LoraConfig(rank=4, alpha=8.0),
    optim.OptimConfig(lr=1e-3, steps=100),
)


def placed(shapes: Any, where: Any) -> Any:
    """Shapes with the shardings that belong to them."""
    return jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, where
    )


def state(spec: states.Spec, mesh: jax.sharding.Mesh) -> states.State:
    """All that training changes."""
    shapes = jax.eval_shape(lambda: states.init(jax.random.key(0), spec, mesh))
    return placed(shapes, states.shardings(spec, mesh))


def params(cfg: arch.Config, mesh: jax.sharding.Mesh) -> dict:
    """The frozen weights."""
    shapes = jax.eval_shape(lambda: arch.init(jax.random.key(0), cfg))
    return placed(shapes, arch.shardings(cfg, mesh))


def batch(mesh: jax.sharding.Mesh, B: int, T: int) -> Batch:
    """B packed rows of T positions."""
    where = jax.sharding.NamedSharding(mesh, jax.P(meshes.ROWS, "context"))
    types = [jnp.int32] * 3 + [jnp.float32] * 3
    return Batch(*(jax.ShapeDtypeStruct((B, T), kind, sharding=where) for kind in types))


def gradients(spec: states.Spec, mesh: jax.sharding.Mesh, B: int, T: int) -> jax.stages.Lowered:
    """The program that adds a microbatch's gradients."""
    trained = state(spec, mesh).trained
    with meshes.use(mesh):
        return states.Step(spec, mesh)._accumulate.lower(
            grads=trained,
            trained=trained,
            params=None if spec.full else params(spec.model, mesh),
            batch=batch(mesh, B, T),
            before=losses.NOTHING,
            weight=jax.ShapeDtypeStruct((), jnp.float32, sharding=meshes.replicated(mesh)),
        )


def update(spec: states.Spec, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The optimizer's program."""
    before = state(spec, mesh)
    with meshes.use(mesh):
        return states.Step(spec, mesh)._update.lower(state=before, grads=before.trained)
