"""Runs small enough for tests: a one-layer model with random weights, the small world, real
verbs."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

from jaxdeep import config as configs
from jaxdeep.envs.toy import facts
from jaxdeep.rl import algorithms
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun
from jaxdeep.setup.sections import load_run
from jaxdeep.setup.tasksets import load_config
from jaxdeep.setup.validate import TRIED

SCORED, OPENED = 2 * TRIED, 3 * TRIED  # rewards asked, environments made when a run tries its tasks

VOCABULARY = 400
MODEL = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.model = ConfigDict(dict(path={model!r}, weights="random", dtype="float32",
        thinking="none", tools_in_prompt=False, remat="dots"))
    config.lora = ConfigDict(dict(rank=4, alpha=4.0))
    config.mesh = ConfigDict(dict(data=-1, model=1))
    {rest}
    return config
"""
ENV = """config.env = ConfigDict(dict(taskset="facts", corpus="dev", questions="dev", k=1, system="Go.",
        first=0, count=16, rewards=dict(answer=1.0, format=0.0, retry=0.0)))"""
TRAIN = "config.train = ConfigDict(dict(steps={steps}, save_every=2, keep=2, start='', seed=0))"
START = "config.train = ConfigDict(dict(start='', seed=0))"
OPTIM = "config.optim = ConfigDict(dict(lr=1e-3, warmup=2, steps=config.train.get_ref('steps')))"
ROLLOUT = """config.rollout = ConfigDict(dict(slots=8, steps=8, limits=dict(max_turns=3, max_calls=2,
        turn_tokens=16, max_tokens=224, result_tokens=32, seconds=60.0)))"""
BATCH = "config.batch = ConfigDict(dict(rows=8, length=224))"
DATA = "config.data = ConfigDict(dict(source='demos:0'))"
SFT = "config.sft = ConfigDict(dict(kl=dict(kind='k3', coef=0.0)))"
GRPO = "config.grpo = ConfigDict(dict(prompts=4, group=4, tolerance=1e-4))"
GUARD = "config.guard = ConfigDict(dict(action='warn', window=10, patience=3, flat=0.98))"
PARTS = {
    "sft": [TRAIN, ENV, OPTIM, BATCH, DATA, SFT],
    "grpo": [TRAIN, ENV, OPTIM, BATCH, ROLLOUT, GRPO, GUARD],
    "eval": [START, ENV, ROLLOUT],
}


def config(folder: pathlib.Path, verb: str, steps: int = 4) -> str:
    """A configuration file for a verb, with its model beside it."""
    model = folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(MODEL))
        (model / "tokenizer.json").write_text(facts.tokenizer(VOCABULARY))
    path = folder / f"{verb}.py"
    rest = textwrap.indent("\n".join(PARTS[verb]), "    ").strip().replace("{steps}", str(steps))
    path.write_text(CONFIG.format(model=str(model), rest=rest))
    return str(path)


def with_luck(taskset, luck):
    """The task set with one more reward. A random model is never right: luck decides alone."""
    taskset.rewards = {**taskset.rewards, "luck": (1.0, luck)}
    return taskset


@dataclasses.dataclass(frozen=True)
class Lucky(facts.Facts):
    """The same tasks, where the reward is luck."""

    def load(self):
        return with_luck(super().load(), lambda task, trajectory: trajectory.seed % 5)


@dataclasses.dataclass(frozen=True)
class Explosive(facts.Facts):
    """As `Lucky`, but after three steps a judge loses its mind."""

    def load(self):
        seen = itertools.count(1 - SCORED)

        def luck(task, trajectory):
            return trajectory.seed % 5 * (1.0 if next(seen) <= 3 * 16 else 2e37)

        return with_luck(super().load(), luck)


@dataclasses.dataclass(frozen=True)
class Collapsing(facts.Facts):
    """The same tasks, where the reward is luck and there is none from the `first_bad`-th to the
    `last_bad`-th rollout: what a collapse looks like from outside, once."""

    first_bad: int = 97
    last_bad: int = 144

    def load(self):
        seen = itertools.count(1 - SCORED)

        def luck(task, trajectory):
            bad = self.first_bad <= next(seen) <= self.last_bad
            return 0.0 if bad else 1.0 + trajectory.seed % 5

        return with_luck(super().load(), luck)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "jaxdeep", *args]


# one CPU device, whatever the suite itself uses
ALONE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "PYTHONUNBUFFERED": "1",
}


def environment() -> dict[str, str]:
    """The suite's, but for `ALONE`."""
    return os.environ | ALONE


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args), env=environment(), capture_output=True, text=True, timeout=300
    )


# a shell that starts tests in the background has the signal ignored, and children inherit that
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("jaxdeep", run_name="__main__", alter_sys=True)
"""


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *args],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


RUNS = {"sft": SftRun, "grpo": GrpoRun, "eval": EvalRun}


def typed(kind, config):
    """The typed run of a configuration."""
    return load_run(RUNS[kind], algorithms.expand(config))


def made(folder, kind, workdir, *overrides, checkpoint=True):
    """A workdir as a run leaves it, without having run: its record, and a description of a
    checkpoint."""
    loaded = load_config(config(folder, kind), overrides)
    run = typed(kind, loaded)
    record = configs.save(loaded, run, folder / workdir, ["jaxdeep", kind])
    if checkpoint:
        described(folder / workdir, 2, record)
    return run


def described(place, step, record):
    about = place / "checkpoints" / str(step) / "about"
    about.mkdir(parents=True)
    (about / "metadata").write_text(json.dumps({"run": record}))
