"""The programs of a run, traced from shapes: no weight, state, batch or page exists. Devices may be
described ones (`chips.topology`) in the place of real ones. On real ones `ready` compiles them all before
a run begins, which then finds them.

    gradients   adds those of a microbatch           } a step of training: `states.Step`
    before      what GRPO's loss compares with       }
    update      the optimizer                        }
    prefill     prompts enter pages                  } the engine: `sampler.compiled`
    decode      all rows draw a few tokens           }
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdeep.console import progress
from jaxdeep.model import lora, paged
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.sample import sampler, sizes
from jaxdeep.train import losses
from jaxdeep.train import state as states
from jaxdeep.types import Batch


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a configuration asks devices for: `passes` over `microbatches` of `rows` x `length` tokens a
    step, none where it does not train; and where it samples, an engine and so many `rollouts` a step."""

    name: str
    spec: states.Spec
    rows: int = 0
    length: int = 0
    microbatches: int = 1
    passes: int = 1
    engine: sizes.EngineConfig | None = None
    rollouts: int = 0

    @property
    def own(self) -> bool:
        """Whether a step compares with the trainer of before it, as `Step.before` does."""
        return self.passes > 1 and self.spec.objective.kind != "binary_tv"

    @property
    def forwards(self) -> int:
        """Forward passes of a microbatch beside its gradients."""
        return self.own + bool(self.spec.objective.kl.coef)


def placed(shapes: Any, where: Any) -> Any:
    """Shapes with the shardings that belong to them."""
    return jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, where
    )


def state(spec: states.Spec, mesh: jax.sharding.Mesh) -> states.State:
    """All that training changes."""
    shapes = jax.eval_shape(lambda: states.init(jax.random.key(0), spec, mesh))
    return placed(shapes, states.shardings(spec, mesh))


def params(cfg: Config, mesh: jax.sharding.Mesh) -> dict:
    """The frozen weights."""
    shapes = jax.eval_shape(lambda: model_weights.init(jax.random.key(0), cfg))
    return placed(shapes, model_weights.shardings(cfg, mesh))


def frozen(spec: states.Spec, mesh: jax.sharding.Mesh) -> dict | None:
    """The weights that a step reads and does not change; None where they are what is trained."""
    return None if spec.full else params(spec.model, mesh)


def batch(mesh: jax.sharding.Mesh, B: int, T: int) -> Batch:
    """B packed rows of T positions. ConfigError where they do not divide over the mesh."""
    meshes.check_size(mesh, B, T)
    where = jax.sharding.NamedSharding(mesh, meshes.LAYOUT)
    types = [jnp.int32] * 3 + [jnp.float32] * 3
    return Batch(*(jax.ShapeDtypeStruct((B, T), kind, sharding=where) for kind in types))


def reference_logps(work: Workload, mesh: jax.sharding.Mesh) -> losses.ReferenceLogps:
    """What the loss compares with."""
    where = jax.sharding.NamedSharding(mesh, meshes.LAYOUT)
    logp_BT = jax.ShapeDtypeStruct((work.rows, work.length), jnp.float32, sharding=where)
    kl = work.spec.objective.kl.coef
    return losses.ReferenceLogps(logp_BT if work.own else None, logp_BT if kl else None)


def gradients(
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    B: int,
    T: int,
    before: losses.ReferenceLogps = losses.NO_REFERENCE,
) -> jax.stages.Traced:
    """The program that adds a microbatch's gradients."""
    trained = state(spec, mesh).trained
    with meshes.use(mesh):
        return states.compiled(spec, mesh).accumulate.trace(
            grads=trained,
            trained=trained,
            params=frozen(spec, mesh),
            batch=batch(mesh, B, T),
            before=before,
            weight=jax.ShapeDtypeStruct((), jnp.float32),
        )


def comparison(work: Workload, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """The program that computes what the loss compares with."""
    spec = work.spec
    rows = batch(mesh, work.rows, work.length)
    with meshes.use(mesh):
        return states.compiled(spec, mesh).before.trace(
            state(spec, mesh).trained, frozen(spec, mesh), rows, own=work.own
        )


def update(spec: states.Spec, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """The optimizer's program."""
    before = state(spec, mesh)
    with meshes.use(mesh):
        return states.compiled(spec, mesh).update.trace(state=before, grads=before.trained)


def pages(work: Workload, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """All keys and values that the engine holds."""
    cfg, engine = work.spec.model, work.engine
    count = sizes.pages(engine, cfg, mesh) * meshes.processes_of(mesh)
    return paged.shape(cfg, mesh, count, engine.page)


def bank(work: Workload, mesh: jax.sharding.Mesh) -> dict | None:
    """The adapters that the engine holds."""
    spec = work.spec
    if spec.full:
        return None
    tree = lora.leaves(spec.model, spec.lora, adapters=work.engine.adapters)
    where = model_weights.shardings(spec.model, mesh, tree)
    return jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=to),
        tree,
        where,
        is_leaf=model_weights.is_leaf,
    )


def calls(
    work: Workload, mesh: jax.sharding.Mesh, parts: Sequence[int] = (1,)
) -> dict[str, jax.stages.Traced]:
    """The engine's programs with as many rows as they can have; and with other `parts` (`sizes.PARTS`) of
    them."""
    cfg, engine, shards = work.spec.model, work.engine, sizes.shards_of(mesh)
    rows = jax.sharding.NamedSharding(mesh, jax.P(meshes.ROWS))
    weights, held, kv = params(cfg, mesh), bank(work, mesh), pages(work, mesh)

    def like(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (shape[0] * meshes.processes_of(mesh), *shape[1:]), dtype, sharding=rows
        )

    def call(program: Any, B: int, *new: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        adapters = held and lora.Bank(held, like(B, engine.adapters, dtype=jnp.float32))
        how = jax.tree.map(
            lambda x: like(*x.shape, dtype=x.dtype), sampler.idle(B, sizes.STOPS, sizes.WIDTH)
        )
        table_BX, held_B = like(B, engine.table), like(B)
        return program.trace(weights, adapters, kv, table_BX, held_B, *new, how)

    prefill, decode = sampler.compiled(cfg, engine.steps)
    found = {}
    with meshes.use(mesh):
        for B in sorted({engine.rows(engine.tiles, part, shards) for part in parts}, reverse=True):
            name = f"prefill {B}" if found else "prefill"
            found[name] = call(prefill, B, like(B, engine.tile), like(B))
        for B in sorted({engine.rows(engine.slots, part, shards) for part in parts}, reverse=True):
            name = f"decode {B}" if "decode" in found else "decode"
            found[name] = call(decode, B, like(B))
    return found


def listed(
    work: Workload,
    mesh: jax.sharding.Mesh,
    own: jax.sharding.Mesh | None,
    *,
    whole: bool = True,
    parts: Sequence[int] = (1,),
) -> list[tuple[str, jax.stages.Traced, jax.sharding.Mesh]]:
    """The programs of a run with their names and devices, `own` being the engine's: its calls as in `calls`.
    Without `whole` only those that decide whether a run fits."""
    spec, found = work.spec, []
    if work.rows:
        known_ = reference_logps(work, mesh)
        found.append(("gradients", gradients(spec, mesh, work.rows, work.length, known_), mesh))
        if whole and work.forwards:
            found.append(("before", comparison(work, mesh), mesh))
        if whole:
            found.append(("update", update(spec, mesh), mesh))
    if own is not None:
        found += [(name, traced, own) for name, traced in calls(work, own, parts).items()]
    return found


def compile_all(
    work: Workload, mesh: jax.sharding.Mesh, own: jax.sharding.Mesh | None = None
) -> None:
    """Compile the programs of a run, several at a time. Its first calls then wait for nothing, and no
    conversation's time goes by meanwhile."""
    programs = listed(work, mesh, own, parts=sizes.CALL_FRACTIONS)
    with (
        progress(len(programs), "compile", "program") as bar,
        concurrent.futures.ThreadPoolExecutor(len(programs)) as pool,
    ):
        begun = {pool.submit(compiled, traced, where): name for name, traced, where in programs}
        for done in concurrent.futures.as_completed(begun):
            done.result()
            bar.set_postfix_str(begun[done], refresh=False)
            bar.update()


def compiled(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """A program of these devices; kernels ask which they are."""
    with meshes.use(mesh):
        return traced.lower().compile()


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
