"""Write what a run has learned for other programs: a PEFT adapter, or whole weights, with the tokenizer.

It takes the newest checkpoint of an `sft` or `grpo` run and that run's configuration. `adapter` is a folder
for PEFT and for `train.start`; `merged` is a checkpoint as transformers and vLLM load it, the adapter
added to the base in float32, a tensor at a time. The folder appears when it is whole.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdeep.errors import ConfigError
from jaxdeep.model import identity, load, lora, peft, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import grpo, sft
from jaxdeep.setup import sections as setup
from jaxdeep.train import checkpoint
from jaxdeep.train import state as states

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep export --config=configs/grpo_search.py --workdir=runs/grpo "
    "--to=models/search --what=merged"
)
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
    part = (grpo if "grpo" in config else sft).parts(config)
    model = part["model"]
    spec = setup.spec_of(model, part["lora"], part["optim"])
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, quant=""))
    what = what or ("merged" if spec.full else "adapter")
    if what not in ("adapter", "merged"):
        raise ConfigError(f"--what={what}: choose adapter or merged")
    if what == "adapter" and spec.full:
        raise ConfigError("this run trained every weight (lora.rank=0): use --what=merged")
    where = setup.checkpoint_dir(part["train"], workdir)
    about = checkpoint.about(where)
    files = {
        "source": setup.source_folder(model),
        "beside": {"tokenizer.json": setup.chat_of(model).tokenizer.text},
    }
    mesh = meshes.make_mesh(part["mesh"])
    trained = newest(where, spec, mesh)
    base = checkpoint.base_in(about)
    params = None
    setup.refuse_other_base(where, model, spec)
    if not spec.full and (what == "merged" or base is None):
        params = setup.weights_of(model, spec, mesh, part["train"].seed)
        ours = setup.base_of(model, spec, params)
        identity.check(f"the run in {where}", base, ours)
        base = ours
    if what == "adapter":
        base = base._replace(name=model.place)
        peft.save(target, lora.Adapter(trained, spec.lora.scale, base), spec.model, **files)
    elif spec.full:
        load.save(target, trained, spec.model, **files)
    else:
        load.save(
            target, params, spec.model, adapter=lora.Adapter(trained, spec.lora.scale), **files
        )
    print(f"{what} of {where} in {target}")
    return 0


def newest(where: str | os.PathLike, spec: states.Spec, mesh: jax.sharding.Mesh) -> Any:
    """What the newest checkpoint trained, on the mesh."""
    tree = model_weights.leaves(spec.model) if spec.full else lora.leaves(spec.model, spec.lora)
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=where),
        tree,
        model_weights.shardings(spec.model, mesh, tree),
        is_leaf=model_weights.is_leaf,
    )
    saved = checkpoint.Checkpoints(where, spec)
    try:
        return saved.trained(like)
    finally:
        saved.close()
