"""From a configuration to the parts of a run: chat, mesh, weights, state, tasks.

Sections of a configuration, shared by the verbs: `model`, `lora`, `mesh`, `optim`, `env`, `rollout`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.base import Taskset
from jaxdeep.agent.rollout import Limits
from jaxdeep.chat.qwen3 import Chat, Thinking
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs import qa
from jaxdeep.envs.toy import facts, maze
from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import identity, layout, load, lora, peft, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import exchange
from jaxdeep.rl.objective import SFT, Objective
from jaxdeep.sample.engine import Engine
from jaxdeep.sample.sizes import EngineConfig
from jaxdeep.tools import corpus
from jaxdeep.tools.bm25 import BM25
from jaxdeep.train import checkpoint, optim
from jaxdeep.train import state as states
from jaxdeep.types import Task

TINY = facts.ASSETS / "tiny"
SHIPPED = {"tiny": TINY, "maze": facts.ASSETS / "maze"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model: `path` is a folder in the Hugging Face layout, a config.json (with random
    weights), a hub id, "tiny" for the base that comes with the package, or "maze" for a model of mazes,
    which has no weights yet."""

    path: str
    dtype: str = "bfloat16"
    weights: Literal["load", "random"] = "load"
    tokenizer: str = ""  # folder, tokenizer.json or hub id; empty: the model's own
    thinking: Thinking = "write"
    tools_in_prompt: bool = True  # False: for a model that was taught its tools, to save tokens
    # what the backward pass computes again: all but linears and attention (dots), all but attention, or
    # all (full); the longer the rows, the more it costs to compute attention again
    remat: str = "full"
    attention: str = "auto"  # the kernel: auto, plain, splash (TPU), cudnn (GPU)
    quant: str = ""  # "int8" holds the frozen linears in a byte a weight
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"model.dtype={self.dtype!r} is float32 or bfloat16")

    @property
    def place(self) -> str:
        """Where the model is, the names of those in the package resolved."""
        return str(SHIPPED.get(self.path, self.path))


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Questions over a corpus. Either is a path, or "facts:train" (or dev, test, all) for the small
    world that comes with the package. Or `maze`s. Or a `taskset` of your own, "FILE.py:NAME" or
    "module:NAME": a function of this section that returns it."""

    corpus: str = ""
    questions: str = ""
    maze: maze.Mazes | None = None
    taskset: str = ""
    k: int = 5
    k1: float = 1.5  # of BM25: how much a word that is repeated in a passage counts
    cache: int = 0  # answers of the search engine that are kept, for those who ask the same
    chunk: int = 1000  # characters of a passage, at most
    system: str = qa.SYSTEM
    first: int = 0  # skip as many questions
    count: int = 0  # then use as many; 0: all that are left
    weights: qa.Weights = qa.WEIGHTS

    def __post_init__(self) -> None:
        if not self.taskset and not self.maze and not (self.corpus and self.questions):
            raise ConfigError("env needs corpus and questions, maze, or a taskset of your own")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The limits of a conversation, and conversations at a time. `cache_gb` is the room for keys and
    values; 0 is enough for all of them at `limits.max_tokens`. `exact` makes a run repeat itself to the
    last bit on CPUs, after an interruption too, for slower rollouts."""

    limits: Limits
    slots: int
    cache_gb: float = 0.0
    chunk: int = 256
    steps: int = 8
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """A microbatch: rows of packed sequences, and positions in each."""

    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, what to keep, and what to start from: a run's folder, or a PEFT adapter's.
    `checkpoints` is a folder for the checkpoints, local or in a bucket (gs://...); empty: the workdir."""

    steps: int
    save_every: int = 10
    keep: int = 2
    checkpoints: str = ""
    start: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1 or self.keep < 1:
            raise ConfigError(
                f"train.steps={self.steps}, save_every={self.save_every} and keep={self.keep} "
                "must be at least 1"
            )


def sections(
    config: ConfigDict, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Each section of the configuration as its dataclass, None for an optional one that is absent;
    ConfigError for one too many or too few."""
    classes = {**required, **(optional or {})}
    for name in config:
        if name not in classes:
            raise ConfigError(f"config.{name} is not a section.{configs.suggest(name, classes)}")
    missing = [name for name in required if name not in config]
    if missing:
        raise ConfigError(f"the configuration lacks the sections {', '.join(missing)}")
    return {
        name: configs.build(cls, config[name], name) if name in config else None
        for name, cls in classes.items()
    }


def chat_of(model: ModelConfig) -> Chat:
    """The chat format with the model's tokenizer."""
    where = model.tokenizer or model.place
    path = pathlib.Path(where)
    if path.suffix == ".json" and path.name != "tokenizer.json" and not model.tokenizer:
        where = str(path.parent)  # the folder of a config.json
    return Chat(Tokenizer.load(where), model.thinking, tools_in_prompt=model.tools_in_prompt)


def spec_of(
    model: ModelConfig,
    adapter: lora.LoraConfig,
    optimizer: optim.OptimConfig,
    objective: Objective = SFT,
    *,
    hf: Mapping[str, Any] | None = None,
) -> states.Spec:
    """What the steps of a run are compiled from; `hf` is the content of the model's `config.json`, where
    it is not read from the model's folder."""
    if model.quant and not adapter.rank:
        raise ConfigError(f"model.quant={model.quant!r} freezes what lora.rank=0 would train")
    path = pathlib.Path(model.place)
    cfg = Config.from_hf(
        hf or (path if path.exists() else layout.folder(model.place)),
        dtype=model.dtype,
        remat=model.remat,
        attention=model.attention,
        quant=model.quant,
        chunk=model.chunk,
    )
    return states.Spec(cfg, adapter, optimizer, objective)


def weights_of(
    model: ModelConfig, spec: states.Spec, mesh: jax.sharding.Mesh, seed: int
) -> dict[str, Any]:
    """The base on the mesh."""
    if model.weights == "random":
        where = model_weights.shardings(spec.model, mesh)
        build = jax.jit(lambda key: model_weights.init(key, spec.model), out_shardings=where)
        return build(jax.random.key(seed))
    return load.load(model.place, spec.model, mesh)


def load_or_init(
    train: TrainConfig,
    model: ModelConfig,
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    saved: str | os.PathLike | None = None,
) -> tuple[dict[str, Any] | None, states.State]:
    """The frozen weights (None where they are what is trained) and a fresh state: around the adapter or
    the result of the run in `train.start`, else around a new adapter or the base. Where that, or the run
    that goes on from what is `saved`, belongs to another base, CheckpointError before any weight is
    loaded."""
    for path in filter(None, (train.start, saved)):
        refuse_other_base(path, model, spec)
    params = weights_of(model, spec, mesh, train.seed)
    key = jax.random.key(train.seed)
    trained = params if spec.full else None
    state = states.init(key, spec, mesh, trained)
    if train.start:
        base = base_of(model, spec, params)
        if is_adapter(train.start):
            path = pathlib.Path(train.start)
            state = state.replace(trained=adapter_of(path, spec, base, state.trained))
        elif not checkpoint.folder(train.start).is_dir():
            raise CheckpointError(f"train.start={train.start}: there is no such run")
        else:
            run = checkpoint.Checkpoints(train.start, spec, base=base)
            state = state.replace(trained=run.trained(state.trained))
            run.close()
    return (None if spec.full else params), state


def checkpoint_dir(train: TrainConfig, workdir: pathlib.Path) -> str | os.PathLike:
    """Where the checkpoints of the run in `workdir` are."""
    return train.checkpoints or workdir


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder is a PEFT adapter's."""
    return (pathlib.Path(path) / peft.CONFIG).exists()


def refuse_other_base(path: str | os.PathLike, model: ModelConfig, spec: states.Spec) -> None:
    """CheckpointError where the adapter or the run in `path` belongs to another base, as far as the files
    of `model` show without loading it."""
    if spec.full or model.weights == "random":
        return
    if is_adapter(path):
        theirs = peft.base_in(pathlib.Path(path))
    elif checkpoint.exists(path):
        theirs = checkpoint.base_in(checkpoint.about(path))
    else:
        return
    ours = identity.Base(model.path, identity.of_files(model.place, spec.model))
    identity.check(f"what is in {path}", theirs, ours)


def base_of(
    model: ModelConfig, spec: states.Spec, params: dict[str, Any] | None
) -> identity.Base | None:
    """The name and hash of the frozen weights; None where they are what is trained."""
    return None if spec.full else identity.Base(model.path, identity.identity(params, spec.model))


def adapter_of(
    path: pathlib.Path, spec: states.Spec, base: identity.Base | None, fresh: dict[str, Any]
) -> dict[str, Any]:
    """The PEFT adapter in `path`, laid out as the `fresh` one. It must have the rank and the linears of
    the configuration; another alpha is folded into its factors."""
    found = peft.load(path, spec.model, base)
    ours, theirs = ((c.rank, tuple(sorted(c.targets))) for c in (spec.lora, found.config))
    if ours != theirs:
        raise ConfigError(
            f"the adapter in {path} has lora.rank={theirs[0]} and lora.targets={theirs[1]}, "
            f"the configuration {ours[0]} and {ours[1]}: make them equal"
        )

    ratio = np.float32(found.scale / spec.lora.scale)
    for name, pair in found.factors.items():
        pair["b"] *= ratio
        pair["a"] = reinit_dead_directions(pair, tensors.on_host(fresh[name]["a"]))
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), found.factors, fresh)


def reinit_dead_directions(pair: dict[str, np.ndarray], fresh_a: np.ndarray) -> np.ndarray:
    """The factor `a` with directions that are zero in both factors taken from a fresh one: they would
    have no gradient, ever. The product stays as it is."""
    dead = ~pair["a"].any(-2, keepdims=True) & ~pair["b"].any(-1)[..., None, :]
    return np.where(dead, fresh_a, pair["a"])


def load_sampler_weights(
    model: ModelConfig,
    spec: states.Spec,
    params: dict[str, Any] | None,
    mesh: jax.sharding.Mesh,
    seed: int,
) -> dict[str, Any] | None:
    """The frozen weights on the mesh of the sampler: the same arrays where its devices
    hold all of them, else read once more."""
    if params is None:
        return None
    found = exchange.reuse_shards(params, model_weights.shardings(spec.model, mesh))
    return weights_of(model, spec, mesh, seed) if found is None else found


def folder_of(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process keeps its configuration, lock and metrics: the first of several in `workdir`,
    where the rollouts of all are too, each other in a folder of its own there."""
    index = jax.process_index()
    return workdir / f"process-{index}" if index else workdir


def source_folder(model: ModelConfig) -> pathlib.Path | None:
    """The folder with the files of the model's tokenizer; None where a tokenizer from the hub was set."""
    path = pathlib.Path(model.tokenizer or model.place)
    if path.is_file():
        return path.parent
    if path.is_dir() or model.tokenizer:
        return path if path.is_dir() else None
    return layout.folder(model.place)


def tasks_of(env: EnvConfig) -> list[Task]:
    """The questions that `env` chooses, in order."""
    if env.maze:
        found = env.maze.tasks()
    elif env.questions.startswith("facts:"):
        found = facts.tasks(facts.parse(env.questions.removeprefix("facts:")))
    else:
        found = qa.read_questions(env.questions)
    chosen = found[env.first : env.first + env.count if env.count else None]
    if not chosen:
        raise ConfigError(
            f"env.first={env.first} is beyond the {len(found)} questions of "
            f"{env.questions or 'env.maze.number'}"
        )
    return chosen


def imported(name: str, where: str) -> Any:
    """What "FILE.py:NAME" or "module:NAME" names; `where` is the key it stands under."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(pathlib.Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}={name!r} cannot be imported as FILE.py:NAME: {error}"
        ) from error


def taskset_of(env: EnvConfig) -> Taskset:
    """The questions and the search engine over the corpus, or the taskset of one's own."""
    if env.taskset:
        return imported(env.taskset, "env.taskset")(env)
    if env.maze:
        return maze.MazeTaskset(tasks_of(env), env.maze)
    if env.corpus.startswith("facts:"):
        passages = facts.passages(facts.parse(env.corpus.removeprefix("facts:")))
    else:
        documents = corpus.read_corpus(env.corpus)
        passages = [p for document in documents for p in corpus.chunk(document, env.chunk)]
    return qa.SearchTaskset(
        tasks_of(env),
        BM25(passages, k1=env.k1),
        k=env.k,
        system=env.system,
        weights=env.weights,
        cache=env.cache,
    )


def size_of(rollout: RolloutConfig, adapters: int = 1) -> EngineConfig:
    """How large the sampler is; with room for so many adapters."""
    return EngineConfig(
        rollout.slots,
        rollout.limits.max_tokens,
        cache_gb=rollout.cache_gb,
        chunk=rollout.chunk,
        steps=rollout.steps,
        adapters=adapters,
        exact=rollout.exact,
    )


def engine_of(
    rollout: RolloutConfig,
    params: dict,
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    adapters: int = 1,
) -> Engine:
    """The sampler over the same arrays that training reads, with room for so many adapters."""
    return Engine(params, spec.model, mesh, size_of(rollout, adapters))


def check_vocabulary(chat: Chat, cfg: Config) -> None:
    """A tokenizer with ids the model does not have is refused."""
    if chat.tokenizer.size > cfg.V:
        raise ConfigError(
            f"the tokenizer has ids up to {chat.tokenizer.size - 1}, the model a vocabulary of {cfg.V}: "
            "set model.tokenizer to the model's own"
        )
