"""Improve a policy by GRPO on its own tool-using rollouts.

    P tasks -> P x G rollouts through the tool loop -> rewards -> group advantages -> packed batches
    -> one optimizer pass -> the new adapter to the sampler, and again

At the first step of every run the trainer's log-probabilities must equal the sampler's, or the run
stops with both numbers. Each step writes a row of `metrics.jsonl` and its rollouts to `rollouts/`; the
same command goes on where it was stopped.

Several processes (see `mesh.join`) share out the tasks of a step. Each has an engine and tool loops of
its own; then all know all rollouts and take the same step together, as one process would.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import log
from jaxdeep import mesh as meshes
from jaxdeep.agent import record
from jaxdeep.agent.base import Taskset
from jaxdeep.agent.rollout import group, score
from jaxdeep.data.chat import Chat
from jaxdeep.data.pack import pack
from jaxdeep.errors import ConfigError, MismatchError
from jaxdeep.eval import harness
from jaxdeep.model import lora
from jaxdeep.rewards import advantages
from jaxdeep.run import setup
from jaxdeep.sample.engine import Engine
from jaxdeep.train import checkpoint, losses, optim
from jaxdeep.train import state as states
from jaxdeep.types import Sampling, Stop, Trajectory

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep grpo --config=configs/grpo_search.py --config.env.corpus=docs/ "
    "--config.env.questions=questions.jsonl --workdir=runs/grpo"
)


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Prompts a step, rollouts a prompt, the clip, and how far trainer and sampler may be apart (nats,
    the largest difference of any token) at the first step."""

    prompts: int
    group: int
    tolerance: float
    clip: losses.Clip = dataclasses.field(default_factory=losses.Clip)
    eval_every: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.group < 2:
            raise ConfigError(
                f"grpo.prompts={self.prompts} must be at least 1 and grpo.group={self.group} at least 2: "
                "the baseline is the mean of the group"
            )


def parts(config: ConfigDict) -> dict[str, Any]:
    """The sections of the configuration, checked."""
    return setup.sections(
        config,
        {
            "model": setup.ModelConfig,
            "lora": lora.LoraConfig,
            "optim": optim.OptimConfig,
            "mesh": meshes.MeshConfig,
            "env": setup.EnvConfig,
            "rollout": setup.RolloutConfig,
            "grpo": GrpoConfig,
            "batch": setup.BatchConfig,
            "train": setup.TrainConfig,
        },
        {"dev": setup.EnvConfig},
    )


def main(config: ConfigDict, workdir: Path) -> int:
    """Train for `config.train.steps` steps in `workdir`."""
    part = parts(config)
    meshes.join()
    train, batch, settings, limits = (
        part["train"],
        part["batch"],
        part["grpo"],
        part["rollout"].limits,
    )
    if batch.length < limits.max_tokens:
        raise ConfigError(
            f"batch.length={batch.length} must hold a whole rollout: "
            f"rollout.limits.max_tokens={limits.max_tokens}"
        )
    chat = setup.chat_of(part["model"])
    taskset = setup.taskset_of(part["env"])
    dev = part["dev"] and setup.taskset_of(part["dev"])
    if settings.prompts > len(taskset):
        raise ConfigError(
            f"grpo.prompts={settings.prompts}, but there are {len(taskset)} questions"
        )
    mesh = meshes.make_mesh(part["mesh"])
    own, place = meshes.local(mesh), setup.folder_of(workdir)
    spec = setup.spec_of(part["model"], part["lora"], part["optim"], settings.clip)
    setup.check_vocabulary(chat, spec.model)
    with log.lock(place):
        configs.save(config, place, sys.argv)
        params, state = setup.start_of(train, part["model"], spec, mesh)
        step = states.Step(spec, mesh)
        name = setup.base_of(part["model"], spec, params)
        saved = checkpoint.Checkpoints(workdir, spec, keep=train.keep, base=name)
        done = 0
        if saved.latest() is not None:
            done, state, _ = saved.restore(state)
        base = setup.sampled_of(part["model"], spec, params, own, train.seed)
        weights, adapter = sampled(spec, base, state, own)
        engine = setup.engine_of(part["rollout"], weights, spec, own)
        engine.set_adapter(adapter)
        timer, first = log.Timer(), True
        try:
            with log.Metrics(place, step=done) as metrics:
                bar = log.progress(train.steps, "grpo", "step", done=done)
                for n in range(done + 1, train.steps + 1):
                    tasks = draw(len(taskset), settings.prompts, n - 1, train.seed)
                    with timer("rollout"):
                        groups = asyncio.run(
                            collect(
                                taskset,
                                meshes.share(tasks),
                                engine,
                                chat,
                                size=settings.group,
                                rollout=part["rollout"],
                                seed=train.seed * 1_000_003 + n,
                            )
                        )
                    record.write(
                        rollouts_of(place, n), [t for g in groups for t in g], chat.tokenizer
                    )
                    with timer("exchange"):
                        groups = meshes.exchange(groups)
                    found = summarize(groups) | engine_counts(engine)
                    rows, more = advantages.rows(groups)
                    found |= more
                    if rows:
                        with timer("train"):
                            tolerance = settings.tolerance if first else None
                            batches = pack(rows, B=batch.rows, T=batch.length)
                            state, losses_ = learn(step, state, params, batches, tolerance)
                        found |= {f"train/{name}": value for name, value in losses_.items()}
                        first = False
                        weights, adapter = sampled(spec, base, state, own)
                        engine.set_base(weights)
                        engine.set_adapter(adapter)
                    if dev and settings.eval_every and n % settings.eval_every == 0:
                        with timer("eval"):
                            some = meshes.share(range(len(dev)))
                            seen = asyncio.run(greedy(dev, engine, chat, part["rollout"], some))
                        found["dev/em"] = harness.summarize(meshes.exchange(seen))["em"]
                    metrics.write(n, found | timer.take())
                    bar.set_postfix(reward=f"{found['reward/mean']:.3f}", refresh=False)
                    bar.update()
                    if n % train.save_every == 0 or n == train.steps:
                        saved.save(n, state, {})
                bar.close()
        finally:
            engine.close()
        saved.close()
    return 0


def draw(count: int, size: int, step: int, seed: int) -> list[int]:
    """The `size` tasks of a step: the set is walked again and again, shuffled anew each time."""
    out = []
    for index in range(step * size, (step + 1) * size):
        epoch, place = divmod(index, count)
        order = list(range(count))
        random.Random(f"tasks {seed} {epoch}").shuffle(order)
        out.append(order[place])
    return out


def sampled(
    spec: states.Spec, base: Any, state: states.State, mesh: jax.sharding.Mesh
) -> tuple[dict, dict | None]:
    """The weights and the adapter for a sampler on its own mesh: of all that a step changes, what it
    trained is the only thing that crosses from process to process."""
    trained = meshes.bring(state.trained, states.shardings(spec, mesh).trained)
    return states.policy(spec, base, trained)


async def collect(
    taskset: Taskset,
    tasks: Sequence[int],
    engine: Engine,
    chat: Chat,
    *,
    size: int,
    rollout: setup.RolloutConfig,
    seed: int,
) -> list[list[Trajectory]]:
    """`size` scored rollouts of each task, at temperature 1: any other would sample another density
    than the one the loss compares with."""
    groups = await asyncio.gather(
        *(
            group(
                taskset,
                taskset[index],
                engine,
                chat,
                size=size,
                limits=rollout.limits,
                seed=seed,
                sampling=Sampling(1.0),
            )
            for index in tasks
        )
    )
    await asyncio.gather(*(score(taskset, t) for g in groups for t in g))
    return list(groups)


async def greedy(
    taskset: Taskset,
    engine: Engine,
    chat: Chat,
    rollout: setup.RolloutConfig,
    indices: Sequence[int],
    on_done: Any = None,
) -> list[Trajectory]:
    """One rollout of each task of `indices` that always takes the most likely token."""
    return await harness.evaluate(
        taskset,
        engine,
        chat,
        limits=rollout.limits,
        sampling=Sampling(0.0),
        seed=0,
        indices=indices,
        concurrency=rollout.slots,
        on_done=on_done,
    )


def learn(
    step: states.Step, state: states.State, params: Any, batches: list, tolerance: float | None
) -> tuple[states.State, dict[str, float]]:
    """One update. `state` is used up only once trainer and sampler are known to agree to `tolerance`
    (None: they were compared before) and the loss to be a number."""
    grads, found = step.gradients(state, params, batches)
    found = {k: float(v) for k, v in jax.device_get(found).items()}
    if not np.isfinite(found["loss"]):
        raise ConfigError(
            f"the loss of step {int(state.step) + 1} is {found['loss']}: lower optim.lr"
        )
    apart = found["max_logp_diff"]
    if tolerance is not None and not apart <= tolerance:
        raise MismatchError(
            f"the log-probabilities of trainer and sampler differ by up to {apart:.3g}, "
            f"more than grpo.tolerance={tolerance:g}: the gradient would be of another policy"
        )
    state, moved = step.update(state, grads)
    return state, found | {k: float(v) for k, v in jax.device_get(moved).items()}


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """What the rollouts of a step have in common."""
    every = [t for g in groups for t in g]
    judged = [t for t in every if t.reward is not None]
    out = {"reward/mean": float(np.mean([t.reward for t in judged])) if judged else float("nan")}
    for name in every[0].rewards:
        values = [t.rewards[name] for t in judged]
        out[f"reward/{name}"] = float(np.mean(values)) if values else float("nan")
    for name in ("turns", "calls", "bad_calls", "sampled_tokens", "tool_seconds"):
        out[f"rollout/{name}"] = float(np.mean([t.metrics.get(name, 0.0) for t in every]))
    for stop in Stop:
        out[f"rollout/stop/{stop.value}"] = sum(t.stop is stop for t in every) / len(every)
    return out


def engine_counts(engine: Engine) -> dict[str, float]:
    """What the engine has done so far."""
    names = ("sampled", "prefilled", "reused", "hit_rate", "paused", "compilations")
    found = engine.metrics()
    return {f"engine/{name}": found[name] for name in names}


def rollouts_of(workdir: Path, step: int) -> Path:
    """Where the rollouts of a step are."""
    return workdir / "rollouts" / f"{step:06d}.jsonl"
