"""What two processes hand to each other, on meshes of two devices each."""

from run.several import finish, identities, start

PROGRAM = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxdeep.parallel import hosts
from jaxdeep.parallel import exchange, mesh as meshes
from jaxdeep.types import Batch

hosts.connect()
me = jax.process_index()
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
exchange.CHUNK_BYTES = 1000
items = [(i, "word " * 100 * i) for i in range(7)]
mine = exchange.my_items(items)
assert [i for i, _ in mine] == list(range(me, 7, 2))
assert exchange.all_gather_objects(mine) == items and exchange.all_gather_objects([]) == []
x = np.arange(64.0).reshape(8, 8)
places = np.tile(np.arange(8), (8, 1))
batch = Batch(x, places * 0 + 1, places, x * 0, x * 0, x * 0)
for shape, reused, own_shape in (
    (dict(replica=2, data=2), True, (1, 2, 1, 1)),
    (dict(data=4), False, (1, 1, 1, 2)),
    (dict(replica=2, data=1, model=2), True, (1, 1, 1, 2)),
    (dict(data=1, model=4), False, (1, 1, 1, 2)),
    (dict(data=2, context=2), False, (1, 1, 1, 2)),
):
    mesh = meshes.make_mesh(meshes.MeshConfig(**shape))
    whole = meshes.put(mesh, batch).tokens_BT
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
    here = meshes.rows_here(mesh, 8, 8)
    assert len(here) == (8 if shape["data"] == 1 and "replica" not in shape else 4), shape
    blank = np.where(np.isin(np.arange(8), list(here))[:, None], x, 0)
    for shard in meshes.put(mesh, batch._replace(tokens_BT=blank)).tokens_BT.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
    spec = P("data", "model")
    y = jax.device_put(x, NamedSharding(mesh, spec))
    for whole_slice_chips in ((), ("cpu",)):
        meshes.WHOLE_SLICE_CHIPS = whole_slice_chips
        own = meshes.sampling_mesh(mesh, 6)
        processes = meshes.process_count(own)
        here = [device for device in own.devices.flat if device.process_index == me]
        assert sorted(here, key=lambda device: device.id) == jax.local_devices()
        assert own.size == (4 if whole_slice_chips else 2) and processes == own.size // 2
        assert own.devices.shape == (own_shape[0] * processes, *own_shape[1:])
        to = dict(y=NamedSharding(own, spec))
        assert (exchange.reuse_shards(dict(y=y), to) is not None) == reused, shape
        z = exchange.reshard(dict(y=y), to)["y"]
        assert z.sharding == to["y"] and z.is_fully_addressable == (not whole_slice_chips)
        for shard in z.addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index])
        rows = dict(a=np.arange(12).reshape(4, 3) + me, b=np.arange(4.0) * me)
        back = meshes.fetch_rows(meshes.put_rows(own, rows))
        for name, part in rows.items():
            np.testing.assert_array_equal(back[name], part)
mesh = meshes.make_mesh(meshes.MeshConfig(data=4))
assert meshes.sampling_mesh(mesh, 3).devices.shape == (2, 2, 1, 1)
"""


def test_what_processes_hand_to_each_other_is_whole():
    finish([start(PROGRAM, identity=identity, devices=2) for identity in identities(2)])
