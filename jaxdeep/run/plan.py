"""Whether a run fits into a pod, and how fast it may be: told by the real TPU compiler, on a laptop.

Compiles the run's own programs for the topology and the mesh of the configuration: the step of SFT or GRPO,
and for GRPO the engine beside it. No TPU is needed, only the extra `tpu`; no weights, no data. It prints
and writes (`plan.json`, `plan.html`) the memory of a chip by kind, what is left for keys and values, FLOPs,
exchange between chips, the bound of the roofline and an estimate. Exit status 2 where it does not fit.

`--topology=v5e:8x8` is a chip and its shape; `v5e:16x16*2` two slices, for `mesh.replica`; several with
commas. `--sweep=model,context` tries meshes: all sizes of these axes that divide, `data` taking the rest.
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
from jaxdeep.model import load
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, estimate, published, report
from jaxdeep.rl import algorithms
from jaxdeep.setup.runs import GrpoRun, SftRun
from jaxdeep.setup.sections import ModelConfig, load_run
from jaxdeep.workdir import write_atomic

DEFAULT_CONFIG = "configs/search/quickstart.py"
EXAMPLE = "python -m jaxdeep plan --config=configs/search/grpo.py --topology=v5e:4x4"
FLAGS = {
    "topology": "chips to plan for, such as v5e:8x8 or v5e:16x16*2 (default v5e:1x1), or several",
    "sweep": "axes of the mesh to try sizes of, such as model,context",
}


def main(
    config: ConfigDict, workdir: pathlib.Path, topology: str = "v5e:1x1", sweep: str = ""
) -> int:
    """Print and write the plan; 2 where nothing that was asked for fits."""
    jax.config.update("jax_platforms", "cpu")  # a plan never asks for this machine's devices
    stages = works(config)
    places = [chips.topology(name) for name in topology.split(",")]
    found, refused = [], {}
    for work, axes in stages:
        for place in places:
            for mesh in meshes_of(sweep, axes, place):
                try:
                    found.append(estimate.plan(work, place, mesh, whole=not sweep))
                except ConfigError as error:
                    if not sweep:
                        raise
                    shape = " ".join(f"{k}={n}" for k, n in vars(mesh).items() if n != 1)
                    refused[f"{place.name} {shape}"] = str(error)
    if sweep or len(places) > 1:
        show_compared(found, refused)
    else:
        print("\n\n".join(report.text(one) for one in found))
    facts = json.dumps([report.facts(one) for one in found], indent=2)
    write_atomic(workdir / "plan.json", facts + "\n")
    write_atomic(workdir / "plan.html", report.page(found))
    print(f"\n{report.BASIS}\nLook at {workdir / 'plan.html'}")
    best = {one.work.name for one in found if one.fits}
    return 0 if len(best) == len(stages) and (sweep or all(one.fits for one in found)) else 2


def meshes_of(
    sweep: str, axes: meshes.MeshConfig, place: chips.Topology
) -> list[meshes.MeshConfig]:
    """The mesh of the configuration, or those of a sweep: powers of two along each of its axes."""
    if not sweep:
        return [axes]
    names = sweep.split(",")
    if unknown := set(names) - {"context", "model"}:
        raise ConfigError(
            f"--sweep={sweep}: {', '.join(sorted(unknown))} is not an axis that is tried; they are model "
            "and context, data takes the rest, and replica is the configuration's"
        )
    share = len(place.devices) // axes.replica
    sizes = [2**n for n in range(share.bit_length()) if share % 2**n == 0]
    found = [
        dataclasses.replace(axes, data=-1, **dict(zip(names, some, strict=True)))
        for some in itertools.product(sizes, repeat=len(names))
    ]
    return [one for one in found if one.context * one.model <= share]


def show_compared(found: Sequence[estimate.Plan], refused: Mapping[str, str]) -> None:
    """The sweep as a table for each stage, and the cheapest that fits."""
    for name in dict.fromkeys(one.work.name for one in found):
        some = [one for one in found if one.work.name == name]
        print(f"\n{name}", *report.grid(*report.compared(some, refused)), sep="\n")
        best = min(some, key=report.cost)
        print(f"cheapest that fits: {report.verdict(best)}" if best.fits else "none of them fits")


def works(config: ConfigDict) -> list[tuple[programs.Workload, meshes.MeshConfig]]:
    """What each stage of a configuration asks for, and the mesh it is to run on."""
    if {"sft", "grpo"} <= set(config) and "model" not in config:
        return [*works(config.sft), *works(config.grpo)]
    if "grpo" in config:
        run: GrpoRun | SftRun = load_run(GrpoRun, algorithms.expand(config))
    elif "data" in config:
        run = load_run(SftRun, config)
    else:
        raise ConfigError(
            "a plan is of a configuration of sft, grpo or the quickstart: it has `data` or `grpo`"
        )
    return [(run.workload(run.spec(hf=published_of(run.model))), run.mesh)]


def published_of(model: ModelConfig) -> dict[str, Any] | None:
    """The content of a model's `config.json` where no copy is here: the published one, or the hub's,
    without its weights."""
    if pathlib.Path(model.location).exists():
        return None
    if model.path in published.CONFIGS:
        return published.CONFIGS[model.path]
    try:
        folder = load.folder(model.path, ("config.json",))
    except CheckpointError as error:
        known = ", ".join(published.CONFIGS)
        raise ConfigError(
            f"model.path={model.path!r} is not here, and its config.json could not be fetched: name a "
            f"folder, a config.json, or one of {known}.{configs.suggest(model.path, published.CONFIGS)}"
        ) from error
    return json.loads((folder / "config.json").read_text())
