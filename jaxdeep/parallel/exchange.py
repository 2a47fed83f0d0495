"""What processes exchange: Python objects between hosts, and arrays between meshes.

Every process makes the same calls in the same order. In a run of one process nothing is sent or
copied.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxdeep.parallel.mesh import DISPATCH_LOCK, dispatch_lock, replicated

T = TypeVar("T")

CHUNK_BYTES = 2**20  # of pickled objects that each process sends in one all-gather


def my_items(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on: every N-th of them, for N processes."""
    return items[jax.process_index() :: jax.process_count()]


def all_gather_objects(objects: Sequence[T]) -> list[T]:
    """The objects of all processes on each process. They are interleaved, so that what processes
    made of their `my_items` comes in the order of the items."""
    count = jax.process_count()
    if count == 1:
        return list(objects)
    sent = np.frombuffer(pickle.dumps(list(objects)), np.uint8)
    sizes = all_gather(np.uint32(len(sent))).tolist()
    chunks = []
    # One shape for all chunks: a new size compiles nothing, and devices hold at most this much.
    for start in range(0, max(sizes), CHUNK_BYTES):
        chunk = np.zeros(CHUNK_BYTES, np.uint8)
        part = sent[start : start + CHUNK_BYTES]
        chunk[: len(part)] = part
        chunks.append(all_gather(chunk))
    received = np.concatenate(chunks, axis=1)
    lists = [pickle.loads(received[i, :size].tobytes()) for i, size in enumerate(sizes)]
    return [lists[i % count][i // count] for i in range(sum(map(len, lists)))]


def all_gather(x: Any, *, tiled: bool = False) -> np.ndarray:
    """The values of `x` of all processes on each process, stacked by process. With `tiled`, `x` is
    an array of the mesh, and the result is that array whole."""
    with DISPATCH_LOCK:
        return multihost_utils.process_allgather(x, tiled=tiled)


def broadcast(value: T) -> T:
    """The value of process 0 on each process, for what must not differ between them."""
    # An all-gather of all values: they are small, and no second mechanism is needed.
    return all_gather_objects([value])[0]


def reuse_shards(tree: Any, shardings: Any) -> Any:
    """Arrays of the whole mesh as arrays with other shardings, such as those of a `sampling_mesh`,
    from the same buffers. None where this process's devices hold other shards than those need."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    out = []
    for x, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        held = x.sharding.addressable_devices_indices_map(x.shape)
        if held != sharding.addressable_devices_indices_map(x.shape):
            return None
        buffers = [shard.data for shard in x.addressable_shards]
        out.append(jax.make_array_from_single_device_arrays(x.shape, sharding, buffers))
    return jax.tree.unflatten(structure, out)


def reshard(tree: Any, shardings: Any) -> Any:
    """As `reuse_shards`, but what this process's devices lack comes from the other processes. Each
    array is then whole on every device for a moment, and passes through the host: meant for
    adapters."""
    if (reused := reuse_shards(tree, shardings)) is not None:
        return reused
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    with dispatch_lock(mesh):
        whole = jax.jit(_identity, out_shardings=replicated(mesh))(tree)

    # By way of the host, because a program's inputs and outputs must be on the same devices, and
    # the new shardings may be of fewer.
    def place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        value = np.asarray(x.addressable_data(0))
        return jax.make_array_from_callback(x.shape, sharding, value.__getitem__)

    return jax.tree.map(place, whole, shardings)


def _identity(tree: Any) -> Any:
    # at module level, because jit caches by function: a lambda would compile at every call
    return tree
