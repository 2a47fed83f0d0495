"""GRPO in one file to read: the loop of `grpo.py` on one process, on the same parts.

    python -m jaxdeep.run.grpo_minimal --config=configs/search/grpo.py --workdir=runs/minimal

No resume, guard, boards, trace or several processes. What is left is the algorithm: sample a group
of rollouts for each task, score them, compare each with its group, take one optimizer step, hand
the new adapter to the sampler. The tests run it."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxdeep.agent.base import Taskset
from jaxdeep.agent.rollout import group, score
from jaxdeep.chat.format import ChatFormat
from jaxdeep.data.pack import pack
from jaxdeep.metrics import Metrics
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl import algorithms, summary
from jaxdeep.rl.advantages import assign_advantages, to_rows
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import weights
from jaxdeep.setup.runs import GrpoRun
from jaxdeep.setup.sections import load_run
from jaxdeep.setup.tasksets import load_config
from jaxdeep.train import state as states
from jaxdeep.types import Batch, Sampling, Trajectory

Groups = list[list[Trajectory]]


def train(run: GrpoRun, workdir: Path) -> states.State:
    """Takes `run.train.steps` steps, writes their metrics to the workdir and returns the final
    state."""
    # what is talked about, and in which format
    taskset, chat = run.env.load(), weights.chat_of(run.model)

    # frozen weights and a trainable adapter, sharded over the mesh; nothing is copied for the
    # sampler
    mesh, spec = meshes.make_mesh(run.mesh), run.spec()
    frozen, state = weights.load_or_init(run.train, run.model, spec, mesh)
    step = states.Step(spec, mesh)
    params, _ = weights.sampled_policy(spec, frozen, state.trained, mesh)
    engine = Engine(params, spec.model, mesh, run.rollout.engine())

    order = list(range(len(taskset)))
    random.Random(run.train.seed).shuffle(order)
    try:
        with Metrics(workdir, step=0) as metrics:
            for n in range(1, run.train.steps + 1):
                # the policy of this step samples every token of this step: on-policy, ratio 1
                params, adapter = weights.sampled_policy(spec, frozen, state.trained, mesh)
                engine.follow(params, adapter, n - 1)

                tasks = [order[i % len(order)] for i in places(n, run.grpo.prompts)]
                groups = asyncio.run(sample(taskset, tasks, engine, chat, run, seed=n))

                # advantage = reward less the mean of its group; groups of equal rewards drop out
                rules = run.grpo.rules(run.rollout.limits)
                rewards = assign_advantages(groups, rules)
                rows = to_rows(groups)
                row = summary.summarize(groups)
                row |= summary.advantage_metrics(groups, rewards, rules)
                if rows:
                    batches = pack(rows, B=run.batch.rows, T=run.batch.length)
                    state, learned = update(step, state, frozen, batches)
                    row |= {f"train/{name}": value for name, value in learned.items()}
                metrics.write(n, row)
                print(f"step {n}: reward {row['reward/mean']:.3f}")
    finally:
        engine.close()
    return state


def places(n: int, count: int) -> range:
    """Positions in the shuffled tasks that step n takes."""
    return range((n - 1) * count, n * count)


async def sample(
    taskset: Taskset,
    tasks: Sequence[int],
    engine: Engine,
    chat: ChatFormat,
    run: GrpoRun,
    seed: int,
) -> Groups:
    """`grpo.group` scored rollouts of each task, all at once. Temperature 1: any other would sample
    from another density than the one the loss compares with."""

    async def one(index: int) -> list[Trajectory]:
        trajectories = await group(
            taskset,
            taskset[index],
            engine,
            chat,
            size=run.grpo.group,
            limits=run.rollout.limits,
            seed=seed,
            sampling=Sampling(1.0),
        )
        for trajectory in trajectories:
            await score(taskset, trajectory, run.rollout.limits.seconds)
        return trajectories

    return await asyncio.gather(*(one(index) for index in tasks))


def update(
    step: states.Step, state: states.State, frozen: states.Frozen, batches: Sequence[Batch]
) -> tuple[states.State, dict[str, float]]:
    """One optimizer step over all microbatches, and its metrics. AssertionError where the trainer's
    log-probabilities are far from the sampler's: the gradient would be of another policy."""
    grads, metrics = step.gradients(state, frozen, batches)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    assert np.isfinite(metrics["loss"]), metrics
    state, _ = step.update(state, grads)
    return state, metrics


def main(argv: Sequence[str]) -> None:
    """`--config=FILE.py`, overrides and `--workdir=DIR`, as for every verb."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in argv)
    path, workdir = flags.pop("config"), Path(flags.pop("workdir"))
    config = load_config(path, [f"--{key}={value}" for key, value in flags.items()])
    train(load_run(GrpoRun, algorithms.expand(config)), workdir)


if __name__ == "__main__":
    main(sys.argv[1:])
