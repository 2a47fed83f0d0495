"""Write what a run has learned for other programs: a PEFT adapter or whole weights.

It takes the newest checkpoint of an `sft` or `grpo` run and that run's configuration. `adapter` is
a folder for PEFT and for `train.start`; `merged` is a checkpoint as transformers and vLLM load it,
the adapter added to the base in float32, a tensor at a time. The folder appears when it is whole.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdeep.errors import ConfigError
from jaxdeep.model import identity, load, lora, peft, tensors
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl import algorithms
from jaxdeep.setup import weights
from jaxdeep.setup.runs import GrpoRun, SftRun
from jaxdeep.setup.sections import load_run
from jaxdeep.train import checkpoint
from jaxdeep.train import state as states

DEFAULT_CONFIG = None
KEYS = {"": ("GrpoRun", "SftRun")}
EXAMPLE = (
    "python -m jaxdeep export --config=configs/search/grpo.py --workdir=runs/grpo "
    "--to=models/search --what=merged"
)
NEEDS = "the run of the example of grpo"
FLAGS = {
    "to": "the folder to write: new, or empty",
    "what": "adapter or merged; default: the adapter, if one was trained",
}


def main(config: ConfigDict, workdir: Path, to: str = "", what: str = "") -> int:
    """Export the newest checkpoint in `workdir` to the folder `to`."""
    if not to:
        raise ConfigError("export needs --to=DIR, the folder to write")
    target = Path(to)
    tensors.refuse_used(target)
    config = algorithms.expand(config)
    run = load_run(GrpoRun if "grpo" in config else SftRun, config)
    model = run.model
    spec = weights.spec_of(model, run.lora)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, quant=""))
    what = what or ("merged" if spec.full else "adapter")
    if what not in ("adapter", "merged"):
        raise ConfigError(f"--what={what}: choose adapter or merged")
    if what == "adapter" and spec.full:
        raise ConfigError("this run trained every weight (lora.rank=0): use --what=merged")
    location = run.train.checkpoints or workdir
    about = checkpoint.about(location)
    files = {
        "source": weights.tokenizer_folder(model),
        "beside": {"tokenizer.json": weights.chat_of(model).tokenizer.text},
    }
    mesh = meshes.make_mesh(run.mesh)
    trained = newest(location, spec, mesh)
    base = checkpoint.base_in(about)
    frozen = states.Frozen(None)
    weights.refuse_other_base(location, model, spec)
    if not spec.full and (what == "merged" or base is None):
        params = weights.base_weights(model, spec, mesh, run.train.seed)
        frozen = weights.load_frozen(model, spec, mesh, params)
        ours = weights.base_of(model, spec, frozen)
        identity.check(f"the run in {location}", base, ours)
        base = ours
    if what == "adapter":
        base = base._replace(name=model.location)
        peft.save(target, lora.Adapter(trained, spec.lora.scale, base), spec.model, **files)
    elif spec.full:
        load.save(target, trained, spec.model, **files)
    else:
        _, adapter = weights.sampled_policy(spec, frozen, trained, mesh)
        load.save(target, frozen.params, spec.model, adapter=adapter, **files)
    print(f"{what} of {location} in {target}")
    return 0


def newest(location: str | os.PathLike, spec: states.Spec, mesh: jax.sharding.Mesh) -> Any:
    """What the newest checkpoint trained, on the mesh."""
    saved = checkpoint.Checkpoints(location, spec)
    try:
        return saved.trained(states.trained_shapes(spec, mesh))
    finally:
        saved.close()
