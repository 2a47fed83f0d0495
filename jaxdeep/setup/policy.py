"""A policy to sample from, without anything that only training needs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from jaxdeep import programs
from jaxdeep.chat.format import ChatFormat
from jaxdeep.parallel import mesh as meshes
from jaxdeep.sample import sizes
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import weights
from jaxdeep.setup.runs import EvalRun


class OpenPolicy(NamedTuple):
    """A chat format and the engine that samples in it."""

    chat: ChatFormat
    engine: Engine


@contextlib.contextmanager
def open_policy(run: EvalRun, name: str = "eval", conversations: int = 0) -> Iterator[OpenPolicy]:
    """The policy that `run.train.start` names (empty: the base), its programs compiled. No
    optimizer is made. `name` stands beside the progress of compiling. The engine is closed at the
    end. It has room for `conversations` at a time (0: as many as the run says).

    Several processes all open it, and each has an engine of its own, as in training; they serve
    while all are in `engine.serving()`.
    """
    chat = weights.chat_of(run.model)
    mesh = meshes.make_mesh(run.mesh)
    spec = weights.spec_of(run.model, run.lora)
    weights.check_vocabulary(chat, spec.model)
    place = sizes.devices(spec.model, mesh)
    settings = run.rollout
    if conversations:
        shards = sizes.shards_of(place)
        slots = -(-conversations // shards) * shards
        settings = dataclasses.replace(settings, slots=slots, cache_gb=0.0)
    frozen, trained = weights.load_policy(run.train, run.model, spec, mesh)
    frozen = weights.frozen_for_sampler(run.model, spec, frozen, place, run.train.seed)
    params, adapter = weights.sampled_policy(spec, frozen, trained, place)
    under = tuple(adapter.config for adapter in frozen.under)
    work = programs.Workload(name, spec, engine=settings.engine(), under=under)
    programs.compile_all(work, mesh, place)
    engine = Engine(params, spec.model, place, settings.engine())
    try:
        engine.set_adapter(adapter)
        yield OpenPolicy(chat, engine)
    finally:
        engine.close()
