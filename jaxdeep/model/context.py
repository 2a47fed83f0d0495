"""The mesh axis `context`: one sequence sharded over several devices, balanced for causal
attention.

A sequence of T tokens is cut into 2C chunks, and device i of C holds chunks i and 2C-1-i: in causal
attention a late chunk has many keys and an early one few, and each device gets one of both. Inside
the model sequences are in this order. It is applied to token ids, positions, segments and targets,
and undone on log-probabilities, so callers see natural order. Without a mesh, or where C is 1,
nothing changes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import ConfigError
from jaxdeep.parallel import mesh as meshes


def shards() -> int:
    """The number of devices that share a sequence on the mesh in use, C."""
    used = jax.sharding.get_abstract_mesh()
    return 1 if used.empty else used.shape["context"]


def sequence_parallel(T: int) -> bool:
    """Whether training shards positions over the axis `model`, too: if it divides T.

    What is saved of each layer for the backward pass then shrinks with that axis (sequence
    parallelism, arXiv 2205.05198). Linears are all-gathered, and each device applies them to its
    own positions; only in attention the axis shards heads (arXiv 2309.14509), and in a mixture
    experts.
    """
    used = jax.sharding.get_abstract_mesh()
    if used.empty or used.shape["model"] == 1:
        return False
    return T % (used.shape["context"] * used.shape["model"]) == 0


def constrain_activations(x: jax.Array) -> jax.Array:
    """`x` [B, T, ...] in the sharding that activations have between layers."""
    over = ("context", "model") if sequence_parallel(x.shape[1]) else "context"
    return meshes.constrain(x, meshes.ROWS, over)


def order(T: int) -> np.ndarray:
    """The natural index of the token at each place of the model's order, [T] int32. ConfigError if
    T is not a multiple of 2C."""
    C = shards()
    if C == 1:
        return np.arange(T, dtype=np.int32)
    if T % (2 * C):
        raise ConfigError(
            f"{T} positions do not divide into 2*context={2 * C} chunks: change batch.length or "
            "mesh.context"
        )
    chunks = np.arange(T, dtype=np.int32).reshape(2, C, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def to_context_order(x_BT: jax.Array) -> jax.Array:
    """From natural order to the model's, sharded over `context`."""
    if shards() == 1:
        return x_BT
    x_BT = meshes.constrain(x_BT, meshes.ROWS, None)[:, order(x_BT.shape[1])]
    return meshes.constrain(x_BT, meshes.ROWS, "context")


def to_natural_order(x_BT: jax.Array) -> jax.Array:
    """From the model's order back to natural order, whole on each device of the axis."""
    if shards() == 1:
        return x_BT
    return meshes.constrain(x_BT, meshes.ROWS, None)[:, np.argsort(order(x_BT.shape[1]))]


def gather(x: jax.Array) -> jax.Array:
    """Inside shard_map: a whole sequence in natural order, all-gathered from the shards [B, t, ...]
    of the axis."""
    C = shards()
    if C == 1:
        return x
    B, t, *rest = x.shape
    pairs = jax.lax.all_gather(x, "context", axis=1).reshape(B, C, 2, t // 2, *rest)
    # first chunks count up with the device, second ones down
    chunks = jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1)
    return chunks.reshape(B, C * t, *rest)
