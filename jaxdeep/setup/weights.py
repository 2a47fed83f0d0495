"""Weights, adapters and training state of a run, from folders, hubs and checkpoints onto the
mesh."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdeep.chat.families import chat_format, family_of
from jaxdeep.chat.format import ChatFormat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.console import say
from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.gguf_file import is_gguf
from jaxdeep.model import identity, layout, load, lora, peft, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import exchange
from jaxdeep.rl.objective import SFT, Objective
from jaxdeep.setup import past
from jaxdeep.setup.sections import ModelConfig, StartConfig, TrainConfig
from jaxdeep.train import checkpoint, optim
from jaxdeep.train import state as states
from jaxdeep.workdir import home


def chat_of(model: ModelConfig) -> ChatFormat:
    """The chat format with the model's tokenizer."""
    source = model.tokenizer or model.location
    path = pathlib.Path(source)
    if path.suffix == ".json" and path.name != "tokenizer.json" and not model.tokenizer:
        # models/a/config.json: a model with random weights, its tokenizer beside it
        source = str(path.parent)
    tokenizer = Tokenizer.load(source)
    return chat_format(
        model.chat or family_of(tokenizer),
        tokenizer,
        model.thinking,
        tools_in_prompt=model.tools_in_prompt,
    )


def tokenizer_folder(model: ModelConfig) -> pathlib.Path | None:
    """The folder with the files of the model's tokenizer; None where one from the hub was set, and
    for a GGUF file."""
    path = pathlib.Path(model.tokenizer or model.location)
    if is_gguf(path):  # which has them inside
        return None
    if path.is_file():
        return path.parent
    if path.is_dir() or model.tokenizer:
        return path if path.is_dir() else None
    return layout.folder(model.location)


def spec_of(
    model: ModelConfig,
    adapter: lora.LoraConfig,
    optimizer: optim.OptimConfig | None = None,
    objective: Objective = SFT,
    *,
    hf: Mapping[str, Any] | None = None,
) -> states.Spec:
    """What the programs of a run are compiled from; without an optimizer it can only sample. `hf`
    is the content of the model's `config.json`, where it is not read from the model's folder."""
    if model.quant and not adapter.rank:
        raise ConfigError(
            f"model.quant={model.quant!r} holds frozen weights, and lora.rank=0 trains them: set lora.rank"
        )
    path = pathlib.Path(model.location)
    cfg = Config.from_hf(
        hf or (path if path.exists() else layout.folder(model.location)),
        dtype=model.dtype,
        remat=model.remat,
        attention=model.attention,
        quant=model.quant,
        chunk=model.chunk,
    )
    return states.Spec(cfg, adapter, optimizer, objective)


def check_vocabulary(chat: ChatFormat, cfg: Config) -> None:
    """ConfigError where the tokenizer has ids that the model does not."""
    if chat.tokenizer.size > cfg.V:
        raise ConfigError(
            f"the tokenizer has ids up to {chat.tokenizer.size - 1}, the model a vocabulary of {cfg.V}: "
            "set model.tokenizer to the model's own"
        )


def base_weights(
    model: ModelConfig, spec: states.Spec, mesh: jax.sharding.Mesh, seed: int
) -> dict[str, Any]:
    """The weights of the base, sharded over the mesh."""
    if model.weights == "random":
        shardings = model_weights.shardings(spec.model, mesh)
        build = jax.jit(lambda key: model_weights.init(key, spec.model), out_shardings=shardings)
        return build(jax.random.key(seed))
    return load.load(model.location, spec.model, mesh)


def load_frozen(
    model: ModelConfig,
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    params: dict[str, Any],
) -> states.Frozen:
    """What training reads and never changes: the base's weights (None with lora.rank=0, which
    trains them), and the adapters of `lora.under`. CheckpointError if one of those belongs to
    another base."""
    if spec.full:
        return states.Frozen(None)
    base = identity.Base(model.path, identity.identity(params, spec.model))
    return states.Frozen(params, load_under(spec, mesh, base))


def load_under(
    spec: states.Spec, mesh: jax.sharding.Mesh, base: identity.Base | None = None
) -> tuple[lora.Adapter, ...]:
    """The frozen adapters of `lora.under` on the mesh, each a run's newest checkpoint or a PEFT
    folder."""
    under = []
    for path in spec.lora.under:
        if is_adapter(path):
            adapter = peft.load(home(path), spec.model)
        elif checkpoint.exists(path):
            adapter = checkpoint.load_adapter(path, spec.model, mesh)
        else:
            raise CheckpointError(
                f"lora.under={path}: there is neither a run with a checkpoint nor a PEFT adapter"
            )
        under.append(lora.place(adapter, spec.model, mesh))
    lora.check_under(under, base)
    return tuple(under)


def base_of(model: ModelConfig, spec: states.Spec, frozen: states.Frozen) -> identity.Base | None:
    """The name and hash of all that is frozen; None with lora.rank=0, where nothing is."""
    if spec.full:
        return None
    base = identity.Base(model.path, identity.identity(frozen.params, spec.model))
    return lora.base_over(base, frozen.under)


def load_or_init(
    train: TrainConfig,
    model: ModelConfig,
    spec: states.Spec,
    mesh: jax.sharding.Mesh,
    checkpoints: str | os.PathLike | None = None,
) -> tuple[states.Frozen, states.State]:
    """What is frozen, and a training state at step 0. What is trained begins as the result of the
    run or adapter in `train.start`; without one as a new adapter, or with lora.rank=0 as the base.
    Where there is a run in `checkpoints`, which will be resumed, `train.start` is not read.
    CheckpointError, before any weight is loaded, if what will be read belongs to another base."""
    resumes = checkpoints is not None and checkpoint.exists(checkpoints)
    start = "" if resumes or not train.start else past.find(train.start, tell=False).start
    for path in filter(None, (start, checkpoints)):
        refuse_other_base(path, model, spec)
    params = base_weights(model, spec, mesh, train.seed)
    frozen = load_frozen(model, spec, mesh, params)
    state = states.init(jax.random.key(train.seed), spec, mesh, params if spec.full else None)
    if start:
        base = base_of(model, spec, frozen)
        trained = load_trained(start, spec, base, state.trained, best=train.best)
        state = state.replace(trained=trained)
    return frozen, state


def load_policy(
    train: StartConfig, model: ModelConfig, spec: states.Spec, mesh: jax.sharding.Mesh
) -> tuple[states.Frozen, Any]:
    """What is frozen, and the result of the run or adapter in `train.start`, to sample from: no
    optimizer state is made. Without one, a new adapter, which changes nothing."""
    start = train.start and past.find(train.start, tell=False).start
    seed = train.seed
    if start:
        refuse_other_base(start, model, spec)
    params = base_weights(model, spec, mesh, seed)
    frozen = load_frozen(model, spec, mesh, params)
    trained: Any = params
    if not spec.full:
        shardings = jax.tree.map(lambda x: x.sharding, states.trained_shapes(spec, mesh))
        build = jax.jit(lambda k: lora.init(k, spec.model, spec.lora), out_shardings=shardings)
        trained = build(jax.random.key(seed))
    if start:
        like = states.trained_shapes(spec, mesh) if spec.full else trained
        base = base_of(model, spec, frozen)
        trained = load_trained(start, spec, base, like, best=train.best)
    return frozen, trained


def load_trained(
    start: str | os.PathLike,
    spec: states.Spec,
    base: identity.Base | None,
    like: Any,
    *,
    best: bool = False,
) -> Any:
    """What the newest checkpoint of the run in `start` trained, or with `best` the one with the
    best score, or the PEFT adapter in that folder; with the shapes and shardings of `like`: arrays
    for an adapter, shapes are enough for a run. Says on stderr which step was taken."""
    if is_adapter(start):
        if best:
            raise ConfigError(f"train.best=True, but {start} is an adapter, not a run")
        return load_adapter(home(start), spec, base, like)
    if not checkpoint.folder(start).is_dir():
        raise CheckpointError(f"train.start={start}: there is no such run")
    saved = checkpoint.Checkpoints(start, spec, base=base, read_only=True)
    with contextlib.closing(saved):
        step, trained = saved.trained(like, saved.best() if best else None)
    if jax.process_index() == 0:
        say(f"{'best' if best else 'newest'} checkpoint of {start}: step {step}")
    return trained


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder is a PEFT adapter's."""
    return (home(path) / peft.CONFIG).exists()


def load_adapter(
    path: pathlib.Path, spec: states.Spec, base: identity.Base | None, fresh: dict[str, Any]
) -> dict[str, Any]:
    """The factors of the PEFT adapter in `path`, sharded as the `fresh` ones. It must have the rank
    and the linears of the configuration; another alpha is folded into its factor `b`."""
    adapter = peft.load(path, spec.model, base)
    ours, theirs = ((c.rank, tuple(sorted(c.targets))) for c in (spec.lora, adapter.config))
    if ours != theirs:
        raise ConfigError(
            f"the adapter in {path} has lora.rank={theirs[0]} and lora.targets={theirs[1]}, "
            f"the configuration {ours[0]} and {ours[1]}: make them equal"
        )
    ratio = np.float32(adapter.scale / spec.lora.scale)
    for name, pair in adapter.factors.items():
        pair["b"] *= ratio
        pair["a"] = reinit_dead_directions(pair, tensors.on_host(fresh[name]["a"]))
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), adapter.factors, fresh)


def reinit_dead_directions(pair: dict[str, np.ndarray], fresh_a: np.ndarray) -> np.ndarray:
    """The factor `a` with directions that are zero in both factors taken from a fresh one: they
    would never get a gradient. The product of the factors stays the same."""
    dead = ~pair["a"].any(-2, keepdims=True) & ~pair["b"].any(-1)[..., None, :]
    return np.where(dead, fresh_a, pair["a"])


def refuse_other_base(path: str | os.PathLike, model: ModelConfig, spec: states.Spec) -> None:
    """CheckpointError if the adapter or the run in `path` belongs to another base than `model`.
    Only the small tensors of the model's files are compared, before anything is loaded."""
    if spec.full or model.weights == "random":
        return
    if is_adapter(path):
        theirs = peft.base_in(home(path))
    elif checkpoint.exists(path):
        theirs = checkpoint.base_in(checkpoint.about(path))
    else:
        return
    if theirs is not None:  # the adapters under it are compared when they are loaded
        theirs = theirs._replace(identity=theirs.identity.partition("+")[0])
    ours = identity.Base(model.path, identity.of_files(model.location, spec.model))
    identity.check(f"what is in {path}", theirs, ours)


def frozen_for_sampler(
    model: ModelConfig,
    spec: states.Spec,
    frozen: states.Frozen,
    mesh: jax.sharding.Mesh,
    seed: int,
) -> states.Frozen:
    """`frozen` on the sampler's mesh: the trainer's own arrays if the sampler's devices hold all
    their shards; otherwise the weights are loaded (or initialised from `seed`) a second time."""
    if frozen.params is None:
        return frozen
    params = exchange.reuse_shards(frozen.params, model_weights.shardings(spec.model, mesh))
    if params is None:
        params = base_weights(model, spec, mesh, seed)
    under = frozen.under if jax.process_count() == 1 else load_under(spec, mesh)
    return states.Frozen(params, under)


def sampled_policy(
    spec: states.Spec, frozen: states.Frozen, trained: Any, mesh: jax.sharding.Mesh
) -> tuple[dict, lora.Adapter | None]:
    """The weights and the one adapter that the sampler takes, on its mesh: those of `lora.under`
    and the trained one side by side. Only what is trained crosses from process to process."""
    shardings = jax.tree.map(lambda x: x.sharding, states.trained_shapes(spec, mesh))
    trained = exchange.reshard(trained, shardings)
    params, adapter = states.policy(spec, frozen.params, trained, frozen.under)
    if isinstance(adapter, tuple):
        adapter = lora.concatenate(adapter)
    return params, adapter
