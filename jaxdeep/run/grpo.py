"""Improve a policy by GRPO on its own tool-using rollouts.

    P tasks -> P x G rollouts through the tool loop -> rewards -> group advantages -> packed batches
    -> one optimizer pass, or several -> the new adapter to the sampler, and again

`grpo.algorithm` says by which rules (`run.algorithms`). At the first step of every run the trainer's
log-probabilities must equal the sampler's, or the run stops with both numbers. Each step writes a row
of `metrics.jsonl` and its rollouts to `rollouts/`; the same command goes on where it was stopped. With
`grpo.ahead` rollouts of the next steps are under way while the trainer updates (`run.explore`).

Several processes (`hosts.joined`) share out the tasks of a step: each has an engine and tool loops of its
own. Then all know all rollouts, and take the step together that one process would take.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import programs, trace
from jaxdeep.agent import record
from jaxdeep.agent.base import Taskset
from jaxdeep.chat import tokenizer
from jaxdeep.chat.qwen3 import Chat
from jaxdeep.console import progress
from jaxdeep.data.pack import pack
from jaxdeep.errors import ConfigError, DivergedError
from jaxdeep.eval import harness
from jaxdeep.metrics import read_metrics
from jaxdeep.model import lora, tensors
from jaxdeep.parallel import exchange, hosts
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl import advantages, algorithms, summary
from jaxdeep.sample import sizes
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import monitor
from jaxdeep.setup import sections as setup
from jaxdeep.setup.explore import Explorer
from jaxdeep.signals import ENDED, Termination
from jaxdeep.train import checkpoint, guard, optim, passes
from jaxdeep.train import state as states
from jaxdeep.types import Batch, Row, Sampling, Trajectory
from jaxdeep.workdir import lock_workdir, write_atomic

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep grpo --config=configs/grpo_search.py --config.env.corpus=docs/ "
    "--config.env.questions=questions.jsonl --workdir=runs/grpo"
)
FLAGS = {
    "coordinator": "host:port of the first of several processes, where no launcher says so",
    "processes": "how many there are; 1: this one is a run of its own",
    "process": "which of them this is, from 0",
}


def parts(config: ConfigDict) -> dict[str, Any]:
    """The sections of the configuration, checked."""
    return setup.sections(
        algorithms.expand(config),
        {
            "model": setup.ModelConfig,
            "lora": lora.LoraConfig,
            "optim": optim.OptimConfig,
            "mesh": meshes.MeshConfig,
            "env": setup.EnvConfig,
            "rollout": setup.RolloutConfig,
            "grpo": algorithms.GrpoConfig,
            "batch": setup.BatchConfig,
            "train": setup.TrainConfig,
        },
        {
            "dev": setup.EnvConfig,
            "guard": guard.GuardConfig,
            "log": monitor.LogConfig,
            "profile": monitor.ProfileConfig,
        },
    )


def main(
    config: ConfigDict,
    workdir: Path,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> int:
    """Train for `config.train.steps` steps in `workdir`, as one of several processes or alone."""
    part = parts(config)
    with hosts.joined(coordinator, processes, process):
        run(part, config, workdir)
    return 0


def run(part: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """The run that the parts of `config` describe, and again from where the guard has set it back."""
    chat = setup.chat_of(part["model"])
    taskset = setup.taskset_of(part["env"])
    dev = part["dev"] and setup.taskset_of(part["dev"])
    mesh = meshes.make_mesh(part["mesh"])
    check_sizes(part, len(taskset), mesh)
    place = setup.folder_of(workdir)
    with lock_workdir(place), Termination() as ending:
        part["about"] = configs.save(algorithms.expand(config), place, sys.argv)
        write_atomic(place / tokenizer.FILE, chat.tokenizer.text)
        while not train(part, chat, taskset, dev, mesh, workdir, ending):
            pass  # the guard has set the run back


def train(
    part: dict[str, Any],
    chat: Chat,
    taskset: Taskset,
    dev: Taskset | None,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    ending: Termination,
) -> bool:
    """Go on from the newest checkpoint to the end, or to SIGTERM; False where the guard set the run back."""
    config, settings, rollout = part["train"], part["grpo"], part["rollout"]
    rules, place = settings.rules(rollout.limits), setup.folder_of(workdir)
    guard.agree(place)
    spec = spec_of(part, guard.rate(part["guard"], place))
    own = sizes.devices(spec.model, mesh)
    setup.check_vocabulary(chat, spec.model)
    where = setup.checkpoint_dir(config, workdir)
    params, state = setup.load_or_init(config, part["model"], spec, mesh, where)
    step = states.Step(spec, mesh)
    base = setup.base_of(part["model"], spec, params)
    keep = max(config.keep, guard.keep(part["guard"], config.save_every))
    saved = checkpoint.Checkpoints(where, spec, keep=keep, base=base, run=part["about"])
    guard.finish(place, saved)
    done, position = 0, {}
    if saved.latest() is not None:
        done, state, position = saved.restore(state)
    version = int(tensors.on_host(state.step)) // settings.passes
    if done < config.steps:
        programs.compile_all(work_of(part, spec), mesh, own)
    with contextlib.ExitStack() as stack:
        stack.callback(saved.close)
        frozen = setup.load_sampler_weights(part["model"], spec, params, own, config.seed)
        weights, adapter = sampled(spec, frozen, state, own)
        engine = setup.engine_of(rollout, weights, spec, own, adapters=1 + settings.ahead)
        stack.callback(engine.close)
        engine.set_adapter(adapter, version=version)
        metrics = stack.enter_context(monitor.Monitor(place, step=done, mesh=mesh, part=part))
        known = exchange.broadcast(read_metrics(metrics.path))
        watch = guard.Guard(part["guard"] or guard.GuardConfig(), known)
        bar = stack.enter_context(progress(config.steps, "grpo", "step", done=done))
        explorer = Explorer(taskset, engine, chat, part, done, position, guard.rollbacks(place))
        stack.callback(explorer.close)
        timer, first, void, counts = trace.Timer(trace.Trace(place)), True, 0, engine.metrics()
        for n in range(done + 1, config.steps + 1):
            position, score = explorer.position(), None
            with timer("rollout"):
                groups = explorer.groups(n, ending)
            if groups is None:
                break
            every, logps = [t for g in groups for t in g], []
            with timer("data"):
                rows, shares = advantages.rows(groups, rules)
                if place == workdir:
                    gaps_at(workdir, n).unlink(missing_ok=True)  # of a try that was set back
                    record.write(rollouts_of(workdir, n), every, chat.tokenizer)
                batches = batches_of(rows, part["batch"], shares["grpo/loss_tokens"])
            void = summary.refuse_void(groups, void, n)
            found = summary.summarize(groups) | engine_counts(engine, counts) | shares
            found["grpo/epochs"] = explorer.walk.epochs
            if rows:
                with timer("train"):
                    tolerance, first = settings.tolerance if first else None, False
                    state, more, trouble = passes.learn(
                        step,
                        state,
                        states.Frozen(params),
                        batches,
                        tolerance,
                        settings.passes,
                        logps,
                    )
                if trouble:
                    if state is not None:
                        saved.save(n - 1, state, position)
                    if guard.set_back(place, saved, watch, n, [trouble], config.save_every):
                        return False
                    raise DivergedError(f"step {n}: {trouble}")
                with timer("data"):
                    gaps = summary.gaps_of(
                        every, rows, [tensors.on_host(x) for x in logps], part["batch"].length
                    )
                    if place == workdir:
                        record.write_gaps(gaps_at(workdir, n), every, gaps)
                more |= summary.staleness(every, gaps, version)
                found |= {f"train/{name}": value for name, value in more.items()}
                version += 1
                engine.follow(*sampled(spec, frozen, state, own), version)
            if dev and settings.eval_every and n % settings.eval_every == 0:
                with timer("eval"):
                    score = found["dev/em"] = greedy_em(dev, engine, chat, rollout)
            done, position = n, explorer.position()
            row = metrics.write(n, found | timer.take())
            bar.set_postfix(reward=f"{found['reward/mean']:.3f}", refresh=False)
            bar.update()
            if n % config.save_every == 0 or n == config.steps:
                with timer("checkpoint"):
                    saved.save(n, state, position, score=score)
            if guard.set_back(place, saved, watch, n, watch.see(row), config.save_every):
                return False
        if done < config.steps and saved.latest() != done > 0:
            saved.save(done, state, position)
    if done < config.steps:
        print(ENDED.format(step=done))
    return True


def spec_of(
    part: dict[str, Any], rate: float = 1.0, hf: Mapping[str, Any] | None = None
) -> states.Spec:
    """What the steps are compiled from, with `rate` times the configured learning rate; `hf` as in
    `setup.spec_of`."""
    settings, limits = part["grpo"], part["rollout"].limits
    optimizer = part["optim"].in_updates(settings.passes)
    optimizer = dataclasses.replace(
        optimizer, lr=optimizer.lr * rate, muon_lr=optimizer.muon_lr * rate
    )
    return setup.spec_of(part["model"], part["lora"], optimizer, settings.loss(limits), hf=hf)


def work_of(part: dict[str, Any], spec: states.Spec) -> programs.Workload:
    """What a step asks devices for, each rollout as long as its limits allow."""
    batch, settings, limits = part["batch"], part["grpo"], part["rollout"].limits
    rollouts = settings.prompts * settings.group
    rows = -(-rollouts // (batch.length // limits.max_tokens))
    return programs.Workload(
        "grpo",
        spec,
        batch.rows,
        batch.length,
        microbatches=-(-rows // batch.rows),
        passes=settings.passes,
        engine=setup.size_of(part["rollout"], 1 + settings.ahead),
        rollouts=rollouts,
    )


def check_sizes(part: dict[str, Any], tasks: int, mesh: jax.sharding.Mesh) -> None:
    """ConfigError for sizes that cannot go together."""
    meshes.check_size(mesh, part["batch"].rows, part["batch"].length)
    check_length(part)
    if part["grpo"].prompts > tasks:
        raise ConfigError(f"grpo.prompts={part['grpo'].prompts}, but there are {tasks} questions")


def check_length(part: dict[str, Any]) -> None:
    """ConfigError where a row of a batch cannot hold a rollout, or rollouts cannot be ahead."""
    length, longest = part["batch"].length, part["rollout"].limits.max_tokens
    settings = part["grpo"]
    if length < longest:
        raise ConfigError(
            f"batch.length={length} must hold a whole rollout: rollout.limits.max_tokens={longest}"
        )
    if part["grpo"].ahead and not part["lora"].rank:
        raise ConfigError(
            f"grpo.ahead={part['grpo'].ahead} needs an adapter: with lora.rank=0 an update changes the "
            "weights under the conversations that are in progress"
        )
    stale = settings.ahead and settings.loss(part["rollout"].limits).needs_old(settings.passes)
    if stale and settings.correction.kind == "none":
        raise ConfigError(
            f"grpo.ahead={settings.ahead} with grpo.passes={settings.passes} needs "
            "grpo.correction.kind=truncate or mask: the ratio of several passes is to the policy before the "
            "first of them, and nothing would weigh how far that is from the one that sampled"
        )


def sampled(
    spec: states.Spec, frozen: Any, state: states.State, mesh: jax.sharding.Mesh
) -> tuple[dict, lora.Adapter | None]:
    """Weights and adapter on the mesh of the sampler. Of all that a step changes, what it
    trained is what crosses from process to process."""
    trained = exchange.reshard(state.trained, states.shardings(spec, mesh).trained)
    return states.policy(spec, frozen, trained)


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


def greedy_em(taskset: Taskset, engine: Engine, chat: Chat, rollout: setup.RolloutConfig) -> float:
    """The share of tasks that greedy rollouts get right, each process doing its part."""
    some = exchange.my_items(range(len(taskset)))
    with engine.serving():
        seen = asyncio.run(greedy(taskset, engine, chat, rollout, some))
    return harness.summarize(exchange.all_gather_objects(seen))["em"]


def batches_of(rows: Sequence[Row], batch: setup.BatchConfig, sampled: float) -> list[Batch]:
    """The rows in microbatches, whose masks must add up to the tokens that were sampled for them."""
    batches = pack(rows, B=batch.rows, T=batch.length)
    masked = sum(int(np.count_nonzero(b.learn_BT)) for b in batches)
    if masked != sampled:
        raise ValueError(
            f"the masks of a step hold {masked} tokens, but its rollouts sampled {sampled:.0f}"
        )
    return batches


def engine_counts(engine: Engine, before: dict[str, float]) -> dict[str, float]:
    """What the engine has done since its metrics were `before`, which then are those of now."""
    now = engine.metrics()
    names = ("sampled", "prefilled", "reused", "paused", "compilations")
    done = {f"engine/{name}": now[name] - before[name] for name in names}
    before.update(now)
    entered = done["engine/reused"] + done["engine/prefilled"]
    return done | {"engine/hit_rate": done["engine/reused"] / max(entered, 1)}


def rollouts_of(workdir: Path, step: int) -> Path:
    """Where the rollouts of a step are."""
    return workdir / "rollouts" / f"{step:06d}.jsonl"


def gaps_at(workdir: Path, step: int) -> Path:
    """Where the gaps of the rollouts of a step are."""
    return workdir / "gaps" / f"{step:06d}.npy"
