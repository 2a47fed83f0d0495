"""A policy to sample from, without anything that only training needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxdeep import programs
from jaxdeep.chat.format import ChatFormat
from jaxdeep.parallel import mesh as meshes
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import weights
from jaxdeep.setup.runs import EvalRun


class OpenPolicy(NamedTuple):
    """A chat format and the engine that samples in it."""

    chat: ChatFormat
    engine: Engine


@contextlib.contextmanager
def open_policy(run: EvalRun, name: str = "eval") -> Iterator[OpenPolicy]:
    """The policy that `run.train.start` names (empty: the base), its programs compiled. No
    optimizer is made. `name` stands beside the progress of compiling. The engine is closed at the
    end."""
    chat = weights.chat_of(run.model)
    mesh = meshes.make_mesh(run.mesh)
    spec = weights.spec_of(run.model, run.lora)
    weights.check_vocabulary(chat, spec.model)
    frozen, trained = weights.load_policy(run.train.start, run.train.seed, run.model, spec, mesh)
    params, adapter = weights.sampled_policy(spec, frozen, trained, mesh)
    sizes = run.rollout.engine()
    under = tuple(adapter.config for adapter in frozen.under)
    work = programs.Workload(name, spec, engine=sizes, under=under)
    programs.compile_all(work, mesh, mesh)
    engine = Engine(params, spec.model, mesh, sizes)
    try:
        engine.set_adapter(adapter)
        yield OpenPolicy(chat, engine)
    finally:
        engine.close()
