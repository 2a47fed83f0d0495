"""Tell whether a run fits on a TPU pod and how fast it may be, by compiling its programs for it.

The compiler is the real one for TPUs and runs on any machine: it needs the extra `tpu`, but no TPU,
no weights and no data. It compiles what the run would: the training step, and for GRPO the engine.
The result is printed and written to `plan.json` and `plan.html`: memory of a chip by kind, room for
keys and values, FLOPs, collectives, the bound of the roofline and an estimate. The exit status is 2
if the run does not fit.

`--topology=v5e:8x8` names a chip and a shape; `v5e:16x16*2` is two slices, for `mesh.replica=2`;
commas separate several. `--sweep=model,context` tries every size of these axes that divides the
chips, `data` taking the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep import programs
from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import layout
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, estimate, published, report
from jaxdeep.rl import algorithms
from jaxdeep.setup.runs import GrpoRun, SftRun
from jaxdeep.setup.sections import ModelConfig, load_run
from jaxdeep.workdir import write_atomic

DEFAULT_CONFIG = "configs/search/quickstart.py"
KEYS = {"": ("GrpoRun", "SftRun")}
EXAMPLE = (
    "python -m jaxdeep plan --config=configs/search/grpo.py --topology=v5e:4x4 "
    "--config.mesh.model=4 --config.rollout.cache_gb=18"
)
NEEDS = "the extra tpu (pip install 'jaxdeep[tpu]'), but no TPU"
FLAGS = {
    "topology": "chips to plan for, such as v5e:8x8 or v5e:16x16*2 (default v5e:1x1), or several",
    "sweep": "axes of the mesh to try sizes of, such as model,context",
}


def main(
    config: ConfigDict, workdir: pathlib.Path, topology: str = "v5e:1x1", sweep: str = ""
) -> int:
    """Print and write the plan. Returns 2 if a plan does not fit; in a sweep, if no plan of a stage
    does."""
    # compiling for described devices must not start the backend of devices that this machine has
    jax.config.update("jax_platforms", "cpu")
    stages = works(config)
    topologies = [chips.topology(name) for name in topology.split(",")]
    plans, refused = [], {}
    for work, axes in stages:
        for place in topologies:
            for mesh in meshes_to_try(sweep, axes, place):
                try:
                    plans.append(estimate.plan(work, place, mesh, largest_only=bool(sweep)))
                except ConfigError as error:
                    if not sweep:
                        raise
                    shape = " ".join(f"{k}={n}" for k, n in vars(mesh).items() if n != 1)
                    refused[f"{place.name} {shape}"] = str(error)
    if sweep or len(topologies) > 1:
        print_comparison(plans, refused)
    else:
        print("\n\n".join(report.text(plan) for plan in plans))
    facts = json.dumps([report.facts(plan) for plan in plans], indent=2)
    write_atomic(workdir / "plan.json", facts + "\n")
    write_atomic(workdir / "plan.html", report.page(plans))
    print(f"\n{report.BASIS}\nLook at {workdir / 'plan.html'}")
    fitting = {plan.work.name for plan in plans if plan.fits}
    everything = len(fitting) == len(stages) and (sweep or all(plan.fits for plan in plans))
    return 0 if everything else 2


def meshes_to_try(
    sweep: str, axes: meshes.MeshConfig, place: chips.Topology
) -> list[meshes.MeshConfig]:
    """The mesh of the configuration, or in a sweep all powers of two along each of the named
    axes."""
    if not sweep:
        return [axes]
    names = sweep.split(",")
    if unknown := set(names) - {"context", "model"}:
        raise ConfigError(
            f"--sweep={sweep}: {', '.join(sorted(unknown))} is not an axis that is tried; they are "
            "model and context, data takes the rest, and replica is the configuration's"
        )
    devices = len(place.devices) // axes.replica
    sizes = [2**n for n in range(devices.bit_length()) if devices % 2**n == 0]
    tried = [
        dataclasses.replace(axes, data=-1, **dict(zip(names, combination, strict=True)))
        for combination in itertools.product(sizes, repeat=len(names))
    ]
    return [mesh for mesh in tried if mesh.context * mesh.model <= devices]


def print_comparison(plans: Sequence[estimate.Plan], refused: Mapping[str, str]) -> None:
    """A table of the plans of each stage, and the cheapest that fits."""
    for name in dict.fromkeys(plan.work.name for plan in plans):
        of_stage = [plan for plan in plans if plan.work.name == name]
        print(f"\n{name}", *report.grid(*report.comparison(of_stage, refused)), sep="\n")
        best = min(of_stage, key=report.dollars_per_million_tokens)
        print(f"cheapest that fits: {report.verdict(best)}" if best.fits else "none of them fits")


def works(config: ConfigDict) -> list[tuple[programs.Workload, meshes.MeshConfig]]:
    """The workload of each training stage of a configuration, and its mesh."""
    if {"sft", "grpo"} <= set(config) and "model" not in config:
        return [*works(config.sft), *works(config.grpo)]
    if "grpo" in config:
        run: GrpoRun | SftRun = load_run(GrpoRun, algorithms.expand(config))
    elif "data" in config:
        run = load_run(SftRun, config)
    else:
        raise ConfigError(
            "a plan is of a configuration of sft, grpo or the quickstart: it has a section data or "
            "grpo"
        )
    return [(run.workload(run.spec(hf=published_of(run.model))), run.mesh)]


def published_of(model: ModelConfig) -> dict[str, Any] | None:
    """The content of `config.json` for a model that is not on this machine: the copy in
    `published`, or the hub's, fetched without weights. None for a model that is."""
    if pathlib.Path(model.location).exists():
        return None
    if model.path in published.CONFIGS:
        return published.CONFIGS[model.path]
    try:
        folder = layout.folder(model.path, ("config.json",))
    except CheckpointError as error:
        raise ConfigError(
            f"model.path={model.path!r} is not on this machine, and its config.json could not be "
            f"fetched: name a folder, a config.json, or one of {', '.join(published.CONFIGS)}."
            f"{configs.suggest(model.path, published.CONFIGS)}"
        ) from error
    return json.loads((folder / "config.json").read_text())
