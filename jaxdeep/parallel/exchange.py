"""What processes tell each other: objects on the host, and arrays of the whole mesh on a part of it.

Every process makes the same calls in the same order. With one process nothing is sent or copied.
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


PARCEL = 2**20  # bytes that each process sends to all others at a time


def my_items(items: Sequence[T]) -> Sequence[T]:
    """The items that this process takes care of."""
    return items[jax.process_index() :: jax.process_count()]


def all_gather_objects(shared: Sequence[T]) -> list[T]:
    """All items in order, from what each process made of its `share` of them."""
    count = jax.process_count()
    if count == 1:
        return list(shared)
    sent = np.frombuffer(pickle.dumps(list(shared)), np.uint8)
    sizes = all_gather(np.uint32(len(sent))).tolist()
    received = []
    # in parcels of one shape: nothing is compiled for a new size, and devices hold little
    for at in range(0, max(sizes), PARCEL):
        parcel = np.zeros(PARCEL, np.uint8)
        part = sent[at : at + PARCEL]
        parcel[: len(part)] = part
        received.append(all_gather(parcel))
    received = np.concatenate(received, axis=1)
    parts = [pickle.loads(received[i, :size].tobytes()) for i, size in enumerate(sizes)]
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


def all_gather(x: Any, *, tiled: bool = False) -> np.ndarray:
    """What all processes have of `x`, on each: one after the other, or with `tiled` the array that their
    parts are of."""
    with DISPATCH_LOCK:
        return multihost_utils.process_allgather(x, tiled=tiled)


def broadcast(value: T) -> T:
    """What the first process has: for what must not differ."""
    return all_gather_objects([value])[0]


def reuse_shards(tree: Any, where: Any) -> Any:
    """Arrays of the whole mesh as arrays with the shardings `where`, nothing copied; None where this
    process's devices hold other parts."""
    if jax.process_count() == 1:
        return tree
    leaves, form = jax.tree.flatten(tree)
    out = []
    for x, to in zip(leaves, jax.tree.leaves(where), strict=True):
        parts = x.sharding.addressable_devices_indices_map(x.shape)
        if parts != to.addressable_devices_indices_map(x.shape):
            return None
        shards = [shard.data for shard in x.addressable_shards]
        out.append(jax.make_array_from_single_device_arrays(x.shape, to, shards))
    return jax.tree.unflatten(form, out)


def reshard(tree: Any, where: Any) -> Any:
    """As `held`; what the devices of this process lack comes from the others."""
    if (found := reuse_shards(tree, where)) is not None:
        return found
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    with dispatch_lock(mesh):
        whole = jax.jit(_itself, out_shardings=replicated(mesh))(tree)

    def placed(x: jax.Array, to: NamedSharding) -> jax.Array:
        here = np.asarray(x.addressable_data(0))
        return jax.make_array_from_callback(x.shape, to, here.__getitem__)

    return jax.tree.map(placed, whole, where)


def _itself(tree: Any) -> Any:
    return tree
