"""The device mesh: four axes that are always there, one table of rules, and the one door for data.

    replica   across slices: pure data parallel
    data      rows of a batch, and with `context` the weights (FSDP)
    context   positions of a sequence
    model     weights, by heads, mlp width, experts and vocabulary. Sampling computes by them, too (tensor
              parallel); training spreads positions, and by heads only attends (`context.owned`)

Every weight names its dimensions (`heads`, `mlp`, ...); `RULES` maps names to axes. A model is run
under `with use(mesh):` so that `constrain` can name axes; without a mesh it does nothing.

Several processes, one a host, can be one run (`hosts.joined`): the mesh is over the devices of all, each
samples on a `local` part of it, `exchange` tells all what each has, and `bring` hands arrays of the whole
mesh to a part. Every process makes the same calls in the same order.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.errors import ConfigError
from jaxdeep.types import Batch

T = TypeVar("T")


AXES = ("replica", "data", "context", "model")
ROWS = ("replica", "data")
WHOLE_SLICE_CHIPS = (
    "TPU v5 lite",
    "TPU v5e",
    "TPU v6 lite",
    "TPU v6e",
)  # their compiler refuses a program on a part of a slice
LAYOUT = P(ROWS, "context")  # of a batch [B, T]
DISPATCH_LOCK = threading.RLock()
RULES = {
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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `data=-1` takes what the others leave."""

    replica: int = 1
    data: int = -1
    context: int = 1
    model: int = 1


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them); a size that does not fit is a ConfigError. Of several
    slices, `replica` goes across them and the other axes stay within one."""
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
    kinds = (AxisType.Auto,) * 4
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    split = dict(allow_split_physical_axes=True)  # such as 4 chips of the 16 along a side
    if devices[0].platform != "tpu" or slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
        return Mesh(grid, AXES, axis_types=kinds)
    if cfg.replica % slices:
        raise ConfigError(
            f"mesh.replica={cfg.replica} does not divide into {slices} slices: what lies on one axis "
            "other than replica must be in one slice"
        )
    inside = (cfg.replica // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices, **split)
    return Mesh(grid, AXES, axis_types=kinds)


def use(mesh: Mesh) -> AbstractContextManager:
    """The context under which jitted functions may name the axes of `mesh`. It is per thread."""
    return jax.set_mesh(mesh)


def dispatch_lock(mesh: Mesh) -> AbstractContextManager:
    """To be held while a program is started, where several threads start some: on several devices
    programs wait for each other's parts, and must begin everywhere in one order."""
    return DISPATCH_LOCK if mesh.size > 1 else nullcontext()


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with its dimensions laid over mesh axes, or `x` itself where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight from the names of its dimensions. A dimension that does not divide is
    refused, except `kv_heads`: fewer of those than devices are kept whole on each."""
    spec = []
    for name, size in zip(axes, shape, strict=True):
        axis = RULES[name]
        over = {a: mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())}
        if size % math.prod(over.values()):
            if name != "kv_heads":
                said = " ".join(f"{a}={n}" for a, n in over.items() if n > 1)
                raise ConfigError(
                    f"{name}={size} does not divide by {said} devices: choose a mesh that divides it"
                )
            axis = None
        spec.append(axis)
    return NamedSharding(mesh, P(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def put(mesh: Mesh, batch: Batch) -> Batch:
    """A numpy batch on the mesh, rows over `replica` and `data`, positions over `context`; one that is
    not what `Batch` promises is a ValueError. Every process has a batch of the whole size, and puts what
    its devices need: the rows that are `rows_here`."""
    check(batch)
    check_size(mesh, *batch.tokens_BT.shape)
    where = NamedSharding(mesh, LAYOUT)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, where, lambda at: x[at]), batch
    )


def rows_here(mesh: Mesh, B: int, T: int) -> frozenset[int]:
    """The rows of a batch [B, T] of which some position is on a device of this process."""
    check_size(mesh, B, T)
    parts = NamedSharding(mesh, LAYOUT).addressable_devices_indices_map((B, T)).values()
    return frozenset(b for rows, _ in parts for b in range(B)[rows])


def check_size(mesh: Mesh, B: int, T: int) -> None:
    """ConfigError where batches of B rows of T positions do not divide over the mesh."""
    rows = mesh.shape["replica"] * mesh.shape["data"]
    C = mesh.shape["context"]
    chunks = 2 * C if C > 1 else 1  # see model.context
    if B % rows or T % chunks:
        raise ConfigError(
            f"a batch of {B} rows x {T} positions does not divide over replica*data={rows} and "
            f"{chunks} chunks for context={C}: change the rows or the length of a batch"
        )


def check(batch: Batch) -> None:
    """ValueError with the first place where a batch breaks what `Batch` promises: a wrong mask or a
    sequence out of line would train, quietly, on something else."""
    _, segments_BT, positions_BT, learn_BT, logp_BT, advantage_BT = batch
    shapes = {name: part.shape for name, part in batch._asdict().items()}
    if len(set(shapes.values())) != 1 or segments_BT.ndim != 2:
        raise ValueError(f"the parts of a batch must have one shape [B, T]: {shapes}")
    left_BT, place_BT = (np.roll(x_BT, 1, axis=1) for x_BT in (segments_BT, positions_BT))
    left_BT[:, :1], place_BT[:, :1] = 0, -1
    learned_BT, used_BT, starts_BT = learn_BT != 0, segments_BT != 0, segments_BT != left_BT
    gap_BT = (left_BT == 0) & (np.arange(segments_BT.shape[1]) > 0)
    wrong = {
        "segments do not count 1, 2, ... up to the padding": used_BT
        & starts_BT
        & (gap_BT | (segments_BT != left_BT + 1)),
        "positions do not count up from 0 in each segment": used_BT
        & (positions_BT != np.where(starts_BT, 0, place_BT + 1)),
        "the mask is negative or no number": ~((learn_BT >= 0) & (learn_BT < np.inf)),
        "padding is learned": learned_BT & ~used_BT,
        "the first token of a segment is learned, which nothing predicts": learned_BT & starts_BT,
        "there is an advantage where nothing is learned": (advantage_BT != 0) & ~learned_BT,
        "an advantage is no number": ~np.isfinite(advantage_BT),
        "the log-probability of a learned token is none": learned_BT
        & ~((logp_BT <= 1e-3) & (logp_BT > -np.inf)),
    }
    for what, places_BT in wrong.items():
        if places_BT.any():
            b, t = np.argwhere(places_BT)[0].tolist()
            row = batch.__class__(*(part[b, t].item() for part in batch))
            raise ValueError(f"{what}: row {b}, position {t} of a batch, {row}")


def local(mesh: Mesh, heads: int) -> Mesh:
    """The devices that this process samples on: the whole mesh where it is alone, else its own ones. They
    lie as in the mesh where they hold all weights between them, so that nothing is copied; otherwise as
    many as divide `heads` are along `model`, which exchanges least.

    On chips of `BOUND` kinds a program is of the whole slice: there it is the devices of all its processes,
    those of each as said, one process after the other along `replica`.
    """
    if processes_of(mesh) == 1:
        return mesh
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
    here = [jax.process_index()]
    if mesh.devices.flat[0].device_kind in WHOLE_SLICE_CHIPS:
        slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
        here = np.unique(owner[slices == slices[owner == here[0]][0]])
    blocks = [_block(mesh.devices, owner == index, heads) for index in here]
    return Mesh(np.concatenate(blocks), AXES, axis_types=mesh.axis_types)


def _block(devices: np.ndarray, mine: np.ndarray, heads: int) -> np.ndarray:
    replicas = mine.any(axis=(1, 2, 3))
    if mine[replicas].all():
        return devices[replicas]
    found = np.array(sorted(devices[mine], key=lambda device: device.id))
    return found.reshape(1, -1, 1, math.gcd(heads, len(found)))


def processes_of(mesh: Mesh) -> int:
    """How many processes have devices of the mesh: they call its programs together."""
    return len({device.process_index for device in mesh.devices.flat})


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Arrays with a first dimension of rows, over `replica` and `data`, from the rows that are this
    process's."""
    where = NamedSharding(mesh, P(ROWS))
    if processes_of(mesh) == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), tree)


def fetch_rows(tree: Any) -> Any:
    """This process's rows of arrays, on the host: the way back of `spread`."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)

    def rows(x: jax.Array) -> np.ndarray:
        parts = {shard.index[0].start: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])

    return jax.tree.map(rows, tree)
