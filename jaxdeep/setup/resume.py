"""A run that goes on: what it says, and which settings may not have changed meanwhile."""

from __future__ import annotations

import os
from typing import Any

import jax

from jaxdeep import config as configs
from jaxdeep.console import say
from jaxdeep.errors import CheckpointError
from jaxdeep.setup.past import flatten
from jaxdeep.train import checkpoint

FIXED = ("model.", "lora.", "optim.name", "train.seed", "grpo.passes")
"""Settings that what is saved depends on: it would go on as something else."""

FREE = ("model.path", "model.tokenizer", "model.remat", "model.attention", "model.chunk")
FREE += ("lora.under",)
"""Of those: what may have moved (weights are compared by themselves), and how fast the model is."""

UNSET = "unset"


def compare(run: Any, location: str | os.PathLike) -> list[str]:
    """What a typed run has changed since the newest checkpoint in `location` was written, as
    "key old -> new"; nothing where there is no checkpoint. CheckpointError where a setting has
    changed that may not."""
    if not checkpoint.exists(location):
        return []
    before = checkpoint.about(location).get("run")
    if not before or "config" not in before:
        return []
    theirs, ours = dict(flatten(before["config"])), dict(flatten(configs.plain(run)))
    keys = ours.keys() & theirs.keys()
    if "references" in before:  # it has every setting
        keys = ours.keys() | theirs.keys()
    changed = {
        key: (theirs.get(key, UNSET), ours.get(key, UNSET))
        for key in sorted(keys)
        if theirs.get(key, UNSET) != ours.get(key, UNSET) and ours.get(key) is not None
    }
    fixed = [key for key in changed if key.startswith(FIXED) and not key.startswith(FREE)]
    if fixed:
        said = "; ".join(f"{key}={changed[key][0]} there, {changed[key][1]} here" for key in fixed)
        raise CheckpointError(
            f"the run in {location} cannot go on with other settings of this kind: {said}. Use its "
            "own, or another --workdir, with --config.train.start as the run to begin from"
        )
    return [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]


def tell(done: int, steps: int, changed: list[str]) -> None:
    """Say where a run goes on, and what has changed; nothing at its beginning."""
    if not done or jax.process_index():
        return
    if done > steps:
        say(f"step {done} is done, beyond train.steps={steps}: nothing is left to do")
    elif done == steps:
        say(f"step {done} of {steps} is done: nothing is left to do (train.steps={steps})")
    else:
        say(f"goes on from step {done} of {steps}")
    if changed:
        say(f"changed since: {', '.join(changed)}")
