"""The device mesh: four axes that always exist, and one table that maps weights onto them.

    replica   across slices: pure data parallelism
    data      rows of a batch; together with `context` also the weights (FSDP)
    context   positions of a sequence
    model     weights, by heads, mlp width, experts and vocabulary (tensor parallelism). Sampling
              computes that way, too; training splits positions instead, and only attends by heads
              (`model.context`)

Every weight names its dimensions (`heads`, `mlp`, ...) and `AXIS_RULES` maps the names to axes. A
model runs under `with use(mesh):`, so that `constrain` can name axes; without a mesh it does
nothing.

Several processes, one per host, can be one run (`hosts.joined`). The mesh then covers the devices
of all; each process samples on its own `sampling_mesh`, and `exchange` moves objects and arrays
between processes. Every process makes the same calls in the same order, because any of them may be
collective.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.data.pack import check_batch
from jaxdeep.errors import ConfigError
from jaxdeep.settings import AtLeast, Or, section
from jaxdeep.types import Batch

AXES = ("replica", "data", "context", "model")
ROWS = ("replica", "data")  # the axes over which the rows of a batch are split
BATCH_SPEC = P(ROWS, "context")  # of an array [B, T]
AXIS_RULES = {
    "embed": ("data", "context"),
    "embed_table": "data",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": "model",
    "vocab": "model",
    "layers": None,
    "rank": None,
    None: None,
}
# The compiler for these chips refuses a program that runs on a part of a slice.
WHOLE_SLICE_CHIPS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
# Reentrant, because a function that holds it may call another one that takes it.
DISPATCH_LOCK = threading.RLock()


@section
class MeshConfig:
    """The number of devices along each axis of the mesh; their product is the number of devices."""

    replica: Annotated[int, AtLeast(1), "copies of the weights, across slices"] = 1
    data: Annotated[
        int, AtLeast(1), Or(-1), "shards of rows and weights; -1: all that the other axes leave"
    ] = -1
    context: Annotated[int, AtLeast(1), "shards of the positions of a row"] = 1
    model: Annotated[int, AtLeast(1), "shards of heads, mlp width, experts and vocabulary"] = 1


EVERYTHING_TO_DATA = MeshConfig()


def make_mesh(
    cfg: MeshConfig = EVERYTHING_TO_DATA, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices` (default: all devices); ConfigError where the sizes do not fit. With
    several slices, `replica` goes across them and the other axes stay within a slice, because the
    network between slices is much slower than the links inside one."""
    devices = list(jax.devices()) if devices is None else list(devices)
    others = cfg.replica * cfg.context * cfg.model
    data = cfg.data if cfg.data != -1 else max(len(devices) // others, 1)
    sizes = (cfg.replica, data, cfg.context, cfg.model)
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        shape = dict(zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh {shape} needs {np.prod(sizes)} devices, there are {len(devices)}: "
            "the product of its axes must be the number of devices"
        )
    # jax's default is Explicit, under which ambiguous operations demand an output sharding.
    kinds = (AxisType.Auto,) * 4
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Lets an axis take a part of a physical side of the TPU, such as 4 of its 16 chips.
    split = dict(allow_split_physical_axes=True)
    if devices[0].platform != "tpu" or slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
        return Mesh(grid, AXES, axis_types=kinds)
    if cfg.replica % slices:
        raise ConfigError(
            f"mesh.replica={cfg.replica} is not a multiple of the {slices} slices: axes other than "
            f"replica must stay within a slice. Set mesh.replica to a multiple of {slices}"
        )
    per_slice = (cfg.replica // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(per_slice, (slices, 1, 1, 1), devices, **split)
    return Mesh(grid, AXES, axis_types=kinds)


def use(mesh: Mesh) -> AbstractContextManager:
    """A context in which jitted functions may name the axes of `mesh`. It holds for this thread
    only."""
    return jax.set_mesh(mesh)


def dispatch_lock(mesh: Mesh) -> AbstractContextManager:
    """A lock to hold while a program is dispatched. Each device runs programs in the order in which
    they arrive: two threads that dispatch collective programs in different orders on different
    devices deadlock. On a single device there is nothing to lock."""
    return DISPATCH_LOCK if mesh.size > 1 else nullcontext()


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with its dimensions sharded over these mesh axes; `x` itself where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def weight_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight of this shape, from the names of its dimensions. ConfigError for a
    dimension that its axes do not divide, except `kv_heads`: these are replicated then, as models
    have fewer kv heads than tensor parallelism often has devices."""
    spec = []
    for name, size in zip(axes, shape, strict=True):
        axis = AXIS_RULES[name]
        devices = {a: mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())}
        if size % math.prod(devices.values()):
            if name != "kv_heads":
                used = " ".join(f"{a}={n}" for a, n in devices.items() if n > 1)
                raise ConfigError(
                    f"{name}={size} does not divide by {used} devices: "
                    "choose a mesh that divides it"
                )
            axis = None
        spec.append(axis)
    return NamedSharding(mesh, P(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


def put(mesh: Mesh, batch: Batch) -> Batch:
    """A numpy batch as arrays on the mesh: rows over `replica` and `data`, positions over
    `context`. ValueError where it breaks what `Batch` promises, ConfigError where it does not
    divide.

    Each process passes a batch [B, T] of the whole run, of which only its `rows_here` need tokens:
    its devices take nothing from the rest.
    """
    check_batch(batch)
    check_size(mesh, *batch.tokens_BT.shape)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def rows_here(mesh: Mesh, B: int, T: int) -> frozenset[int]:
    """The rows of a batch [B, T] of which this process's devices hold at least some positions."""
    check_size(mesh, B, T)
    shards = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((B, T)).values()
    return frozenset(b for rows, _ in shards for b in range(B)[rows])


def check_size(mesh: Mesh, B: int, T: int) -> None:
    """ConfigError where a batch of B rows of T positions cannot be split evenly over the mesh."""
    rows = mesh.shape["replica"] * mesh.shape["data"]
    C = mesh.shape["context"]
    # Each device along `context` takes an early and a late chunk of the positions, so that causal
    # attention costs all of them the same.
    chunks = 2 * C if C > 1 else 1
    if B % rows or T % chunks:
        raise ConfigError(
            f"a batch of {B} rows x {T} positions does not divide over replica*data={rows} and "
            f"{chunks} chunks for context={C}: change batch.rows, batch.length or the mesh"
        )


def sampling_mesh(mesh: Mesh, heads: int) -> Mesh:
    """The devices that this process samples on: the whole mesh for a single process, otherwise its
    own devices, so that no process waits for another's tools.

    Where its devices hold all weights between them they keep their order in the mesh, so that
    nothing is copied. Otherwise as many of them as divide `heads` lie along `model`, the split that
    exchanges least.

    On chips of WHOLE_SLICE_CHIPS a program must run on the whole slice. There the mesh has the
    devices of all processes of the slice, arranged as above for each process, and one process after
    the other along `replica`.
    """
    if process_count(mesh) == 1:
        return mesh
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
    processes = [jax.process_index()]
    if mesh.devices.flat[0].device_kind in WHOLE_SLICE_CHIPS:
        slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
        processes = np.unique(owner[slices == slices[owner == processes[0]][0]])
    blocks = [_block(mesh.devices, owner == index, heads) for index in processes]
    return Mesh(np.concatenate(blocks), AXES, axis_types=mesh.axis_types)


def _block(devices: np.ndarray, owned: np.ndarray, heads: int) -> np.ndarray:
    """The devices that a process owns, as an array with the four axes of a mesh."""
    replicas = owned.any(axis=(1, 2, 3))
    if owned[replicas].all():  # whole replicas, each with all weights
        return devices[replicas]
    own = np.array(sorted(devices[owned], key=lambda device: device.id))
    return own.reshape(1, -1, 1, math.gcd(heads, len(own)))


def process_count(mesh: Mesh) -> int:
    """The number of processes with devices in the mesh: they call its programs together."""
    return len({device.process_index for device in mesh.devices.flat})


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Arrays over `replica` and `data` by their first dimension, rows. Each process passes its own
    rows only; the result has those of all."""
    sharding = NamedSharding(mesh, P(ROWS))
    if process_count(mesh) == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def fetch_rows(tree: Any) -> Any:
    """This process's rows of such arrays as numpy arrays: the inverse of `put_rows`."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)

    def fetch(x: jax.Array) -> np.ndarray:
        # by the first row of each shard: shards that are copies of each other count once
        shards = {shard.index[0].start: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(fetch, tree)
