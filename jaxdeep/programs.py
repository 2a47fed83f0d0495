"""The compiled programs of a run, traced from shapes alone: no weights, state or batches are
allocated.

    gradients   adds the gradients of a microbatch                 } a training step: `states.Step`
    before      log-probabilities that GRPO's loss compares with   }
    update      the optimizer's update                             }
    prefill     writes prompts into the paged KV cache             } the engine: `sampler.compiled`
    decode      samples a few tokens for every row                 }

The devices are this machine's, and `compile_all` compiles the programs before a run begins. Or they
are described by a topology (`plan.chips.topology`), and `plan` reports what the programs would take
there.
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
    """What a configuration asks the devices to do: train (`rows` is not 0), sample (`engine` is not
    None), or both."""

    name: str
    spec: states.Spec
    rows: int = 0  # rows of a microbatch, over all devices
    length: int = 0  # positions of a row
    microbatches: int = 1  # of a training step
    passes: int = 1  # optimizer updates of a training step, each over all microbatches
    engine: sizes.EngineConfig | None = None
    rollouts: int = 0  # of a training step
    under: tuple[lora.LoraConfig, ...] = ()  # of the frozen adapters under the trained one

    @property
    def old(self) -> bool:
        """Whether the loss compares with the trainer's log-probabilities from before the step."""
        return self.spec.objective.needs_old(self.passes)

    @property
    def forwards(self) -> int:
        """Forward passes over a microbatch that are not part of its gradients."""
        return self.old + bool(self.spec.objective.kl.coef)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes, each with its sharding from the second tree."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def state_shapes(spec: states.Spec, mesh: jax.sharding.Mesh) -> states.State:
    """The training state: trained weights, optimizer state and step."""
    shapes = jax.eval_shape(lambda: states.init(jax.random.key(0), spec, mesh))
    return with_shardings(shapes, states.shardings(spec, mesh))


def param_shapes(cfg: Config, mesh: jax.sharding.Mesh) -> dict:
    """The weights of the base."""
    shapes = jax.eval_shape(lambda: model_weights.init(jax.random.key(0), cfg))
    return with_shardings(shapes, model_weights.shardings(cfg, mesh))


def frozen_shapes(
    spec: states.Spec, mesh: jax.sharding.Mesh, under: Sequence[lora.LoraConfig] = ()
) -> states.Frozen:
    """What a training step reads and never changes: the weights, unless all of them are trained,
    and the adapters under the trained one."""
    params = None if spec.full else param_shapes(spec.model, mesh)
    return states.Frozen(
        params, tuple(lora.placed_shapes(spec.model, adapter, mesh) for adapter in under)
    )


def batch_shapes(mesh: jax.sharding.Mesh, B: int, T: int) -> Batch:
    """B packed rows of T positions. ConfigError if they do not divide over the mesh."""
    meshes.check_size(mesh, B, T)
    sharding = jax.sharding.NamedSharding(mesh, meshes.BATCH_SPEC)
    types = [jnp.int32] * 3 + [jnp.float32] * 3
    return Batch(*(jax.ShapeDtypeStruct((B, T), kind, sharding=sharding) for kind in types))


def reference_shapes(work: Workload, mesh: jax.sharding.Mesh) -> losses.ReferenceLogps:
    """The reference log-probabilities that the loss of a microbatch reads."""
    sharding = jax.sharding.NamedSharding(mesh, meshes.BATCH_SPEC)
    logp_BT = jax.ShapeDtypeStruct((work.rows, work.length), jnp.float32, sharding=sharding)
    kl = work.spec.objective.kl.coef
    return losses.ReferenceLogps(logp_BT if work.old else None, logp_BT if kl else None)


def page_shapes(work: Workload, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """The paged KV cache of all engines of the mesh."""
    cfg, engine = work.spec.model, work.engine
    count = sizes.pages(engine, cfg, mesh) * meshes.process_count(mesh)
    return paged.shape(cfg, mesh, count, engine.page)


def bank_shapes(work: Workload, mesh: jax.sharding.Mesh) -> dict | None:
    """The engine's bank of adapters, stacked along an axis of each leaf; None if all weights are
    trained. Each of them is the trained adapter joined with those under it."""
    spec = work.spec
    if spec.full:
        return None
    adapter = lora.concatenated((*work.under, spec.lora))
    tree = lora.leaves(spec.model, adapter, adapters=work.engine.adapters)
    shardings = model_weights.shardings(spec.model, mesh, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding),
        tree,
        shardings,
        is_leaf=model_weights.is_leaf,
    )


def gradients(
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    B: int,
    T: int,
    reference: losses.ReferenceLogps = losses.NO_REFERENCE,
    under: Sequence[lora.LoraConfig] = (),
) -> jax.stages.Traced:
    """The program that adds a microbatch's gradients to the sum so far."""
    trained = state_shapes(spec, mesh).trained
    with meshes.use(mesh):
        return states.compiled(spec, mesh).accumulate.trace(
            grads=trained,
            trained=trained,
            frozen=frozen_shapes(spec, mesh, under),
            batch=batch_shapes(mesh, B, T),
            reference=reference,
            weight=jax.ShapeDtypeStruct((), jnp.float32),
        )


def reference(work: Workload, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """The program that computes a microbatch's reference log-probabilities."""
    spec = work.spec
    rows = batch_shapes(mesh, work.rows, work.length)
    with meshes.use(mesh):
        return states.compiled(spec, mesh).reference_logps.trace(
            state_shapes(spec, mesh).trained,
            frozen_shapes(spec, mesh, work.under),
            rows,
            old=work.old,
        )


def update(spec: states.Spec, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """The optimizer's program."""
    state = state_shapes(spec, mesh)
    with meshes.use(mesh):
        return states.compiled(spec, mesh).update.trace(state=state, grads=state.trained)


def engine_calls(
    work: Workload, mesh: jax.sharding.Mesh, fractions: Sequence[int] = (1,)
) -> dict[str, jax.stages.Traced]:
    """The engine's programs by name, largest first: one prefill and one decode for each of its
    batch sizes, the maximum divided by each of `fractions` (a run has those in
    `sizes.CALL_FRACTIONS`)."""
    cfg, engine, shards = work.spec.model, work.engine, sizes.shards_of(mesh)
    row_sharding = jax.sharding.NamedSharding(mesh, jax.P(meshes.ROWS))
    weights, bank = param_shapes(cfg, mesh), bank_shapes(work, mesh)
    kv = page_shapes(work, mesh)

    def rows_of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array of [B, ...] in each process, as the global array that the program sees."""
        return jax.ShapeDtypeStruct(
            (shape[0] * meshes.process_count(mesh), *shape[1:]), dtype, sharding=row_sharding
        )

    def call(program: Any, B: int, *inputs: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        adapters = bank and lora.Bank(bank, rows_of(B, engine.adapters, dtype=jnp.float32))
        params = jax.tree.map(
            lambda x: rows_of(*x.shape, dtype=x.dtype), sampler.idle(B, sizes.STOPS, sizes.WIDTH)
        )
        table_BX, held_B = rows_of(B, engine.table), rows_of(B)
        return program.trace(weights, adapters, kv, table_BX, held_B, *inputs, params)

    prefill, decode = sampler.compiled(cfg, engine.steps)
    traced = {}
    with meshes.use(mesh):
        # different fractions may round to the same number of rows
        for B in sorted({engine.rows(engine.tiles, n, shards) for n in fractions}, reverse=True):
            name = f"prefill {B}" if traced else "prefill"
            traced[name] = call(prefill, B, rows_of(B, engine.tile), rows_of(B))
        for B in sorted({engine.rows(engine.slots, n, shards) for n in fractions}, reverse=True):
            name = f"decode {B}" if "decode" in traced else "decode"
            traced[name] = call(decode, B, rows_of(B))
    return traced


def trace_all(
    work: Workload,
    mesh: jax.sharding.Mesh,
    sampler_mesh: jax.sharding.Mesh | None,
    *,
    largest_only: bool = False,
    fractions: Sequence[int] = (1,),
) -> list[tuple[str, jax.stages.Traced, jax.sharding.Mesh]]:
    """The name, trace and mesh of each program of a run that trains on `mesh` and samples on
    `sampler_mesh` (None: it does not sample); `fractions` as in `engine_calls`. With `largest_only`
    the programs are left out that need less memory than another one does."""
    spec, traced = work.spec, []
    if work.rows:
        shapes = (work.rows, work.length, reference_shapes(work, mesh), work.under)
        traced.append(("gradients", gradients(spec, mesh, *shapes), mesh))
        if work.forwards and not largest_only:
            traced.append(("before", reference(work, mesh), mesh))
        if not largest_only:
            traced.append(("update", update(spec, mesh), mesh))
    if sampler_mesh is not None:
        calls = engine_calls(work, sampler_mesh, fractions)
        traced += [(name, call, sampler_mesh) for name, call in calls.items()]
    return traced


def compile_all(
    work: Workload, mesh: jax.sharding.Mesh, sampler_mesh: jax.sharding.Mesh | None = None
) -> None:
    """Compile every program of a run, several at a time. JAX caches them, so that the run's own
    calls find them compiled.

    Without this a rollout would wait minutes for the first call of each program, and that time
    would count against the limits of its conversation.
    """
    traced = trace_all(work, mesh, sampler_mesh, fractions=sizes.CALL_FRACTIONS)
    with (
        progress(len(traced), "compile", "program") as bar,
        concurrent.futures.ThreadPoolExecutor(len(traced)) as pool,
    ):
        names = {
            pool.submit(compile_traced, program, place): name for name, program, place in traced
        }
        for done in concurrent.futures.as_completed(names):
            done.result()
            bar.set_postfix_str(names[done], refresh=False)
            bar.update()


def compile_traced(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Compile a program for the devices of the mesh."""
    # JAX's own Pallas kernels ask for the current mesh, to know which chip they are compiled for
    with meshes.use(mesh):
        return traced.lower().compile()


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
