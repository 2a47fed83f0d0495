"""GRPO in one file to read: the loop of `grpo.py` on one process, on the same parts.

    python -m jaxdeep.run.grpo_minimal --config=configs/search/grpo.py --workdir=runs/minimal

What is left is the algorithm: sample a group of rollouts for each task, score them, compare each
with its group, update the adapter, hand it to the sampler. Left out: resuming, the guard, boards
and traces, records of rollouts, evaluation on `dev`, a curriculum, tasks drawn again
(`flat=resample`), rollouts ahead, several processes. The last state is saved, so that
`train.start` and `export` take it. The tests run it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdeep.agent.base import Taskset
from jaxdeep.agent.rollout import group, score
from jaxdeep.chat.format import ChatFormat
from jaxdeep.data.pack import pack
from jaxdeep.errors import DataError, DivergedError, JaxdeepError
from jaxdeep.metrics import Metrics
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl import algorithms, summary
from jaxdeep.rl.advantages import assign_advantages, learned, to_rows
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import weights
from jaxdeep.setup.runs import GrpoRun
from jaxdeep.setup.sections import load_run
from jaxdeep.setup.tasksets import load_config
from jaxdeep.train import checkpoint, passes
from jaxdeep.train import state as states
from jaxdeep.types import Sampling, Trajectory
from jaxdeep.workdir import Workdir

Groups = list[list[Trajectory]]


def train(run: GrpoRun, workdir: Path) -> states.State:
    """Takes `run.train.steps` steps, writes metrics and the last checkpoint to the workdir, and
    returns the final state. DataError where another run has written there."""
    if Workdir(workdir).metrics.exists():
        raise DataError(f"{workdir} holds a run: choose another --workdir, this one cannot resume")

    # what is talked about, and in which format
    taskset, chat = run.env.load(), weights.chat_of(run.model)

    # frozen weights and a trainable adapter, sharded over the mesh; nothing is copied for sampling
    mesh, spec = meshes.make_mesh(run.mesh), run.spec()
    frozen, state = weights.load_or_init(run.train, run.model, spec, mesh)
    step = states.Step(spec, mesh)
    params, adapter = weights.sampled_policy(spec, frozen, state.trained, mesh)
    engine = Engine(params, spec.model, mesh, run.rollout.engine())

    order = list(range(len(taskset)))
    random.Random(run.train.seed).shuffle(order)
    rules, tolerance = run.grpo.rules(run.rollout.limits), run.grpo.tolerance
    try:
        with Metrics(workdir, step=0) as metrics:
            for n in range(1, run.train.steps + 1):
                # the policy of this step samples every token of this step: on-policy, ratio 1
                engine.follow(params, adapter, n - 1)
                tasks = [order[i % len(order)] for i in places(n, run.grpo.prompts)]
                groups = asyncio.run(sample(taskset, tasks, engine, chat, run, seed=n))

                # advantage = reward less the mean of its group; groups of equal rewards drop out
                rewards = assign_advantages(groups, rules)
                rows = to_rows(groups, run.grpo.aggregate)
                row = summary.summarize(groups)
                row |= summary.advantage_metrics(groups, rewards, rules)

                if rows:
                    batches = pack(rows, B=run.batch.rows, T=run.batch.length)
                    count = len(learned(groups))
                    state, found, trouble = passes.learn(
                        step, state, frozen, batches, tolerance, run.grpo.passes, sequences=count
                    )
                    if trouble:
                        raise DivergedError(f"step {n}: {trouble}")
                    row |= {f"train/{name}": value for name, value in found.items()}
                    tolerance = None  # trainer and sampler agreed once
                    params, adapter = weights.sampled_policy(spec, frozen, state.trained, mesh)
                metrics.write(n, row)
                print(f"step {n}: reward {row['reward/mean']:.3f}")
        base = weights.base_of(run.model, spec, frozen)
        with contextlib.closing(checkpoint.Checkpoints(workdir, spec, base=base)) as saved:
            saved.save(run.train.steps, state, {})
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


def main(argv: Sequence[str]) -> None:
    """`--config=FILE.py`, overrides such as `--config.optim.lr=1e-4`, and `--workdir=DIR`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    flags, overrides = parser.parse_known_args(argv)
    config = algorithms.expand(load_config(flags.config, overrides))
    try:
        train(load_run(GrpoRun, config), flags.workdir)
    except JaxdeepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
