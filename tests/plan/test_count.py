"""FLOPs of a jaxpr equal formulas; collectives, loops and traffic are read from compiled
programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from model import models

from jaxdeep import programs
from jaxdeep.errors import ConfigError
from jaxdeep.model import attention, flops
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, count, hlo
from jaxdeep.train import optim
from jaxdeep.train import state as states


def traced(spec, B=2, T=64, **axes):
    devices = int(np.prod(list(axes.values()))) or 1
    mesh = meshes.make_mesh(meshes.MeshConfig(**{"data": 1} | axes), jax.devices()[:devices])
    return programs.gradients(spec, mesh, B, T)


def spec_of(cfg, adapter=tiny.SPEC):
    return states.Spec(cfg, adapter, optim.OptimConfig(lr=1e-3, steps=10))


def test_products_are_counted_as_often_as_loops_run_and_on_all_devices():
    mesh = meshes.make_mesh(meshes.MeshConfig(data=4, model=2), jax.devices()[:8])
    a, b = jnp.zeros((8, 16)), jnp.zeros((16, 16))
    one = 2 * 8 * 16 * 16

    def loops(a, b):
        a, _ = jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=5)
        a = jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ b, a)
        return jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: a)

    assert count.flops(jax.make_jaxpr(loops)(a, b), count.Assumptions(trips=7)).matmuls == 13 * one

    def unused(a, b):
        _, rest = jax.lax.scan(lambda x, _: (x, x @ b), a, None, length=5)
        return a, rest.sum() * 0

    closed = jax.make_jaxpr(lambda a, b: unused(a, b)[0])(a, b)
    assert count.flops(closed).matmuls == 0

    with meshes.use(mesh):
        local = jax.shard_map(
            jnp.matmul, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data")
        )
        closed = jax.make_jaxpr(local)(a, b)
    # two devices along `model` compute the same
    assert count.flops(closed).matmuls == 2 * one


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_step_counts_what_the_formula_counts_with_what_is_computed_again(name):
    cfg = dataclasses.replace(models.CONFIGS[name], remat="full", chunk=64)
    B, T = 2, 64
    spec = spec_of(cfg, models.LORA)
    found = count.flops(traced(spec, B, T).jaxpr, count.Assumptions(experts=cfg.E)).matmuls
    tokens = B * T
    linears, head = flops.per_token(cfg) - cfg.V * cfg.D, cfg.V * cfg.D
    adapter = flops.of_adapter(cfg, spec.lora)
    scores = 4 * cfg.L * cfg.N * cfg.H * T * tokens  # all pairs: the plain computation masks
    # layers: forward, recomputed, and the gradient of their input; factors: their own gradient too;
    # the head's gradient is computed in its forward pass
    expected = tokens * (6 * linears + 4 * head + 8 * adapter) + scores * 4
    assert found == pytest.approx(expected, rel=0.03)


def test_kernels_are_counted_by_formula():
    cfg = dataclasses.replace(tiny.CFG, H=128, attention="splash", remat="full", limit=4096)
    plain = dataclasses.replace(cfg, attention="plain")
    B, T, block = 1, 2048, 1024
    kernels = count.flops(traced(spec_of(cfg), B, T).jaxpr).kernels
    pairs = B * cfg.N * cfg.L * T * (T + block) / 2
    # forward twice, then both backward kernels
    assert kernels == pairs * cfg.H * (4 + 4 + 6 + 8)
    assert count.flops(traced(spec_of(plain), B, T).jaxpr).kernels == 0
    q = jnp.zeros((1, 256, 2, 128))
    closed = jax.make_jaxpr(
        lambda q: attention.attend(q, q, q, jnp.ones((1, 256), int), kind="splash")
    )(q)
    assert count.flops(closed).kernels == 4 * 2 * 256 * 256 * 128  # one block: all pairs


def test_an_unknown_kernel_is_refused():
    from jax.experimental import pallas as pl

    def kernel(x, out):
        out[...] = x[...]

    run = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), name="strange"
    )
    with pytest.raises(NotImplementedError, match="strange"):
        count.flops(jax.make_jaxpr(run)(jnp.zeros((8, 128))))


@pytest.fixture(scope="module")
def exchanging():
    """A program on 8 devices that exchanges in a loop of 5 rounds, and once before it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(x):
        x = x + jax.lax.all_gather(x, "model", axis=0, tiled=True).sum()

        def one(x, _):
            return jax.lax.psum(x, "data") * 0.5, None

        return jax.lax.scan(one, x, None, length=5)[0]

    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=jax.P("model"), out_specs=jax.P("model"), check_vma=False
        )
    )
    return run.lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text()


def test_exchange_is_read_with_its_trips_bytes_and_devices(exchanging):
    cost = hlo.cost(exchanging)
    found = {one.kind: one for one in cost.collectives}
    gather, psum = found["all-gather"], found["all-reduce"]
    assert (gather.trips, gather.size, gather.group) == (1, 64 * 32 * 4, (0, 1))
    assert gather.moved == 64 * 32 * 4 / 2
    assert (psum.trips, psum.size, psum.group) == (5, 32 * 32 * 4, (0, 2, 4, 6))
    assert psum.moved == 5 * 32 * 32 * 4 * 2 * 3 / 4
    lines = hlo.by_kind(cost.collectives, lambda one: one.moved / 1e3)
    assert sorted(line["trips"] for line in lines) == [1, 5]
    assert cost.memory > 0


TPU = """HloModule jit_f

%cond (p: (u32[], bf16[8,128])) -> pred[] {
  %p = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = u32[]{:T(128)} constant(9)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused (a: bf16[36,8,128], i: s32[]) -> bf16[8,128] {
  %a = bf16[36,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %ds = bf16[1,8,128]{2,1,0} dynamic-slice(%a, %j, %j, %j), dynamic_slice_sizes={1,8,128}
  ROOT %b = bf16[8,128]{1,0} bitcast(%ds)
}

%relaid (a: bf16[36,8,128]) -> bf16[36,8,128] {
  %a = bf16[36,8,128]{2,1,0} parameter(0)
  ROOT %c = bf16[36,8,128]{1,2,0} copy(%a)
}

%cast (a: bf16[8,128]) -> f32[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %c = f32[8,128]{1,0} convert(%a)
}

%around (a: bf16[36,8,128], i: s32[]) -> bf16[8,128] {
  %a = bf16[36,8,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %same = bf16[36,8,128]{2,1,0} bitcast(%a)
  %laid = bf16[36,8,128]{1,2,0} fusion(%same), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%relaid
  ROOT %f = bf16[8,128]{1,0} fusion(%laid, %j), kind=kLoop, calls=%fused
}

%compute (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %y = bf16[8,128]{1,0} negate(%x)
  ROOT %z = bf16[8,128]{1,0} negate(%y)
}

%pass (x: bf16[8,128]) -> bf16[8,128] {
  ROOT %x = bf16[8,128]{1,0} parameter(0)
}

%async_collective_fusion.1 (a: bf16[4,128]) -> bf16[8,128] {
  %a = bf16[4,128]{1,0} parameter(0)
  ROOT %g = bf16[8,128]{1,0} all-gather(%a), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

%body (p: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %p = (u32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,128]{1,0:S(1)} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %g.1 = bf16[8,128]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"100"}
  %g.2 = bf16[8,128]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %k = bf16[8,128]{1,0} custom-call(%g.2), custom_call_target="tpu_custom_call", frontend_attributes={meta={
"block": 1
}}, metadata={}
  ROOT %t = (u32[], bf16[8,128]{1,0}) tuple(%next, %k)
}

ENTRY %main (w: bf16[36,8,128], n: s32[]) -> bf16[8,128] {
  %w = bf16[36,8,128]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = u32[] constant(1)
  %layer = bf16[8,128]{1,0} fusion(%w, %n), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %next = bf16[8,128]{1,0} fusion(%w, %n), kind=kOutput, calls=%around
  %wide = f32[8,128]{1,0:S(1)} fusion(%next), kind=kLoop, calls=%cast
  %cut = bf16[8,128]{1,0} conditional(%n, %next, %next), branch_computations={%pass, %compute}
  %some = bf16[8,128]{1,0} conditional(%n, %cut, %cut), branch_computations={%pass, %compute}, metadata={op_name="jit(f)/live_block/cond"}
  %fetch = ((bf16[36,8,128]{2,1,0}), bf16[1,8,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:1], [0:8], [0:128]}
  %start = (u32[], bf16[8,128]{1,0}) tuple(%one, %some)
  %loop = (u32[], bf16[8,128]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_form_that_tpus_compile_to_is_read():
    cost = hlo.cost(TPU)
    # the loop counts 1, 3, 5, 7; its collective is in two parts, behind computation; S(1) is on
    # chip
    (gather,) = cost.collectives
    assert (gather.trips, gather.hidden, gather.group) == (4, True, (0, 2))
    array = 8 * 128 * 2
    counters = 2 * 4 + 4 * 12
    # of the stacked layers one is read, also by a fusion in a fusion; the cast reads its whole
    # operand; of conditionals the sampler's cut-off is not taken, the block of experts is
    assert cost.memory == 2 * 2 * array + array + 2 * 2 * array + array + 4 * array + counters
    assert hlo.cost(TPU, live_blocks=0.25).memory == cost.memory - 0.75 * 2 * 2 * array
    assert cost.cycles == 10 + 4 * 100
    assert hlo.array_bytes("(bf16[2,3]{1,0:T(8,128)}, s4[8], pred[])") == [12, 4, 1]


class Device:
    def __init__(self, coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def test_links_are_those_of_the_axes_along_which_devices_differ():
    chip = chips.CHIPS["v5e"]
    grid = [Device((x, y, 0)) for x in range(4) for y in range(16)]
    assert chips.speed(chip, grid, range(16)) == 2 * chip.link  # 16 close to a ring
    assert chips.speed(chip, grid, [0, 16, 32, 48]) == chip.link  # 4 do not
    assert chips.speed(chip, grid, [0, 1, 2, 3]) == chip.link  # nor 4 of 16
    assert chips.speed(chip, grid, range(64)) == 3 * chip.link
    assert chips.speed(chip, grid, [0, 1, 16, 17]) == 2 * chip.link
    assert chips.speed(chip, grid, [0, 4, 8, 12]) == 2 * chip.link / 4  # a link is that of 4 groups
    assert chips.speed(chip, grid, [0, 2, 4, 6]) == chip.link / 2
    assert chips.speed(chip, [Device((0, 0, 0))] * 2, [0, 1]) == chip.link
    two = [*grid, Device((0, 0, 0), 1)]
    assert chips.speed(chip, two, [0, len(grid)]) == chip.network
    # an all-to-all takes n / 8 of a device's bytes over a link's bytes/s on a ring of n, n / 4 on a
    # line
    for group, links in ((range(16), 2), ([0, 16, 32, 48], 1)):
        n = len(group)
        seconds = (n - 1) / n * chips.detour(chip, grid, group) / chips.speed(chip, grid, group)
        assert seconds == pytest.approx(n / 4 / links / chip.link)
    assert chips.detour(chip, grid, [0, 16]) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e-64", "v5e: 1x1 2x2 2x4 4x4"),
        ("v5e:8x9x10x11", "Chips and their usual shapes"),
        ("h100:8", "tpu7x: 2x2x1"),
        ("v5e:4x5*x", "v5e:16x16*2"),
        ("v5:8x8", 'Did you mean "v5e:8x8"'),
    ],
)
def test_an_unknown_topology_is_refused_with_the_list(name, says):
    with pytest.raises(ConfigError, match="none that can be described") as error:
        chips.topology(name)
    assert says in str(error.value)


def test_without_libtpu_the_line_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdeep\[tpu\]'"):
        chips.topology("v5e:2x2")


def test_every_chip_has_a_peak():
    assert all(chip.peak > 1e14 for chip in chips.CHIPS.values())


def test_published_configurations_have_the_published_counts(shared):
    from jaxdeep.plan import published

    checked = 0
    for path in shared("qwen3/configs").glob("*.json"):
        name = path.name.removesuffix("_config.json").split("Qwen3-")[1]
        ours = Config.from_hf(published.CONFIGS[f"Qwen/Qwen3-{name}"])
        assert ours == Config.from_hf(path)
        checked += 1
    assert checked >= 9
