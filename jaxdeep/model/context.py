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

from jaxdeep import mesh
from jaxdeep.errors import ConfigError


def shards() -> int:
    """How many devices share a sequence on the mesh in use."""
    used = jax.sharding.get_abstract_mesh()
    return 1 if used.empty else used.shape["context"]


def resting(T: int) -> str | tuple[str, str]:
    """The mesh axes that positions are spread over between layers: `model` too where it divides them, so
    that what is kept of each layer for the backward pass shrinks with it (arXiv 2205.05198). Inside a
    layer that axis has the heads."""
    used = jax.sharding.get_abstract_mesh()
    shares = 1 if used.empty else used.shape["context"] * used.shape["model"]
    return ("context", "model") if T % shares == 0 else "context"


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


def spread(x_BT: jax.Array) -> jax.Array:
    """From natural order to the model's, a shard on each device."""
    if shards() == 1:
        return x_BT
    x_BT = mesh.constrain(x_BT, mesh.ROWS, None)[:, order(x_BT.shape[1])]
    return mesh.constrain(x_BT, mesh.ROWS, "context")


def restore(x_BT: jax.Array) -> jax.Array:
    """From the model's order back to natural, whole on each device of the axis."""
    if shards() == 1:
        return x_BT
    return mesh.constrain(x_BT, mesh.ROWS, None)[:, np.argsort(order(x_BT.shape[1]))]


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
