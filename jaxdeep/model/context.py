"""The mesh axis `context`: one sequence over several devices, balanced for causal attention.

A sequence of T tokens is cut into 2C chunks and device i of C holds chunks i and 2C-1-i, so that all
devices have the same number of keys to look at. Inside the model, sequences are in this order; it is
applied to token ids, positions, segments and targets, and taken back from log-probabilities, so
callers see natural order. Where no mesh is in use, or C is 1, all of this changes nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.errors import ConfigError
from jaxdeep.parallel import mesh as meshes


def shards() -> int:
    """How many devices share a sequence on the mesh in use."""
    used = jax.sharding.get_abstract_mesh()
    return 1 if used.empty else used.shape["context"]


def sequence_parallel(T: int) -> bool:
    """Whether devices along `model`, too, have positions of their own: where it divides them. What is kept
    of each layer for the backward pass then shrinks with that axis (arXiv 2205.05198), and linears are
    gathered; in attention it has the heads (arXiv 2309.14509), in a mixture the experts."""
    used = jax.sharding.get_abstract_mesh()
    if used.empty or used.shape["model"] == 1:
        return False
    return T % (used.shape["context"] * used.shape["model"]) == 0


def constrain_activations(x: jax.Array) -> jax.Array:
    """Rows and positions, [B, T, ...], spread as between layers."""
    over = ("context", "model") if sequence_parallel(x.shape[1]) else "context"
    return meshes.constrain(x, meshes.ROWS, over)


def order(T: int) -> np.ndarray:
    """The natural index of the token at each place, [T] int32. A length that cannot be cut is a
    ConfigError."""
    C = shards()
    if C == 1:
        return np.arange(T, dtype=np.int32)
    if T % (2 * C):
        raise ConfigError(
            f"{T} positions do not divide into 2*context={2 * C} chunks: change the length of a batch "
            "or the mesh's context axis"
        )
    chunks = np.arange(T, dtype=np.int32).reshape(2, C, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def to_context_order(x_BT: jax.Array) -> jax.Array:
    """From natural order to the model's, a shard on each device."""
    if shards() == 1:
        return x_BT
    x_BT = meshes.constrain(x_BT, meshes.ROWS, None)[:, order(x_BT.shape[1])]
    return meshes.constrain(x_BT, meshes.ROWS, "context")


def to_natural_order(x_BT: jax.Array) -> jax.Array:
    """From the model's order back to natural, whole on each device of the axis."""
    if shards() == 1:
        return x_BT
    return meshes.constrain(x_BT, meshes.ROWS, None)[:, np.argsort(order(x_BT.shape[1]))]


def gather(x_Bt: jax.Array) -> jax.Array:
    """All of a sequence in natural order from the shard held here, inside shard_map; any number of
    dimensions may follow the second."""
    C = shards()
    if C == 1:
        return x_Bt
    B, t, *rest = x_Bt.shape
    pairs = jax.lax.all_gather(x_Bt, "context", axis=1).reshape(B, C, 2, t // 2, *rest)
    chunks = jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1)
    return chunks.reshape(B, C * t, *rest)
