"""Write what a run has learned for other programs: a PEFT adapter or whole weights.

RUN is the folder of an `sft` or `grpo` run, of a quickstart, or gs://... where its checkpoints are:
the newest one is taken, with the model and the adapter's shape that the run had. `adapter` is a
folder for PEFT and for `train.start`; `merged` is a checkpoint as transformers and vLLM load it,
the adapter added to the base in float32, a tensor at a time; `gguf` (in float16) and `gguf-q8_0`
are the same in one GGUF file, for llama.cpp. What is written appears when it is whole.
The run's settings lie beside the weights in `run.json`: `chat` and `eval` take such a folder as
a run, too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdeep.chat import gguf_tokenizer
from jaxdeep.errors import ConfigError
from jaxdeep.model import identity, load, lora, peft, tensors
from jaxdeep.parallel import hosts
from jaxdeep.parallel import mesh as meshes
from jaxdeep.setup import past, weights
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.sections import ModelConfig
from jaxdeep.train import checkpoint
from jaxdeep.train import state as states
from jaxdeep.workdir import home

DEFAULT_CONFIG = None
RUN = "optional"
KEYS = {"": ("EvalRun",)}
EXAMPLE = "python -m jaxdeep export runs/grpo --to=models/search --what=merged"
NEEDS = "the run of the example of grpo"
FLAGS = {
    "to": "the folder to write: new, or empty; of gguf a file",
    "what": "adapter, merged, gguf or gguf-q8_0; default: the adapter, if one was trained",
}
GGUF = {"gguf": "F16", "gguf-q8_0": "Q8_0"}
PROCESSES = True
RECORDED = ("config", "references", "commit", "versions")  # of what a run says about itself


def main(config: ConfigDict, workdir: Path, to: str = "", what: str = "", **process: str) -> int:
    """Export the run in `train.start`, or with the configuration of a training run the one in
    `workdir`, to the folder `to`; `process` says which of several this is."""
    if not to:
        raise ConfigError("export needs --to=DIR, the folder to write")
    target = home(to)
    tensors.refuse_used(target)
    if "optim" in config:
        config = past.policy_sections(config, str(workdir))
    with hosts.joined(**process):
        first = jax.process_index() == 0
        run = past.start(EvalRun, config, first=first)
        what = export(run, target, what)
        if first:
            print(f"{what} of {run.train.start} in {target}")
    return 0


def export(run: EvalRun, target: Path, what: str = "") -> str:
    """Write the result of the run in `run.train.start`: `what` as in `FLAGS`. Returns it. All
    processes take part, the first one writes."""
    model, location = run.model, located(run)
    spec = weights.spec_of(model, run.lora)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, quant=""))
    what = what or ("merged" if spec.full else "adapter")
    if what not in ("adapter", "merged", *GGUF):
        raise ConfigError(f"--what={what}: choose adapter, merged, {' or '.join(GGUF)}")
    if what == "adapter" and spec.full:
        raise ConfigError("this run trained every weight (lora.rank=0): use --what=merged")
    about = checkpoint.about(location)
    if what in GGUF:
        tokenizer = weights.chat_of(model).tokenizer
        files = {
            "kind": GGUF[what],
            "tokenizer": gguf_tokenizer.metadata(tokenizer.text, spec.model.V),
            "template": tokenizer.template,
        }
        save = load.save_gguf
    else:
        files, save = beside(model, about), load.save
    mesh = meshes.make_mesh(run.mesh)
    like = states.trained_shapes(spec, mesh)
    trained = weights.load_trained(location, spec, None, like, best=run.train.best)
    base = checkpoint.base_in(about)
    frozen = states.Frozen(None)
    weights.refuse_other_base(location, model, spec)
    if not spec.full and (what != "adapter" or base is None):
        params = weights.base_weights(model, spec, mesh, run.train.seed)
        frozen = weights.load_frozen(model, spec, mesh, params)
        ours = weights.base_of(model, spec, frozen)
        identity.check(f"the run in {location}", base, ours)
        base = ours
    if what == "adapter":
        base = base._replace(name=model.location)
        peft.save(target, lora.Adapter(trained, spec.lora.scale, base), spec.model, **files)
    elif spec.full:
        save(target, trained, spec.model, **files)
    else:
        _, adapter = weights.sampled_policy(spec, frozen, trained, mesh)
        save(target, frozen.params, spec.model, adapter=adapter, **files)
    return what


def located(run: EvalRun) -> str:
    """Where the checkpoints of the run are; ConfigError where nothing was trained."""
    begun = run.train.start
    found = past.find(begun, tell=False).start if begun else ""
    if not found or weights.is_adapter(found):
        what = f"{begun} is an adapter or a model already" if begun else "no run is named"
        raise ConfigError(f"{what}: export takes the folder of a run of sft, grpo or quickstart")
    return found


def beside(model: ModelConfig, about: dict[str, Any]) -> dict[str, Any]:
    """What is written beside weights: the files of the tokenizer, and the run's settings."""
    texts = weights.chat_of(model).tokenizer.files | settings(about)
    return {"source": weights.tokenizer_folder(model), "beside": texts}


def settings(about: dict[str, Any]) -> dict[str, str]:
    """The file with the settings of the run, where its checkpoint has them."""
    recorded = {name: x for name, x in (about.get("run") or {}).items() if name in RECORDED}
    return {past.EXPORTED: json.dumps(recorded, indent=2) + "\n"} if recorded else {}
