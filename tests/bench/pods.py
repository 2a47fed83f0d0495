"""Where runs of Qwen3 fit, according to the TPU compiler: the rows of a table, planned by `jaxdeep
plan`.

    make plan-table      (python tests/bench/pods.py [--rows=8B-32k/v5e:4x4,...] [--out=runs/pods])

Needs libtpu (the extra `tpu`), no TPU; each program takes a minute or two to compile. Results are
kept in `--out`, and rows that have one are not compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import jax

from jaxdeep import config as configs
from jaxdeep import programs
from jaxdeep.errors import ConfigError
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, estimate, published, report
from jaxdeep.run import plan as verb
from jaxdeep.workdir import write_atomic

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


@dataclasses.dataclass(frozen=True)
class Row:
    """A run and the chips it is planned for."""

    model: str
    length: int
    topology: str
    mesh: dict[str, int]
    rows: int
    cache: float = 0.0  # rollout.cache_gb of one engine; 0: SFT, without an engine
    slots: int = 8
    quant: str = ""
    full: bool = False

    @property
    def stage(self) -> str:
        return "grpo" if self.cache else "sft"


ROWS = {
    # runs that should fit
    "8B-32k-sft/v5e:4x4": Row("8B", 32_768, "v5e:4x4", dict(model=4), 4),
    "8B-32k-grpo/v5e:4x4": Row("8B", 32_768, "v5e:4x4", dict(model=4), 4, 10, 2),
    "8B-32k-grpo/v5e:8x8": Row("8B", 32_768, "v5e:8x8", dict(model=4), 16, 15, 3),
    "32B-32k-grpo/v5p:2x2x2": Row("32B", 32_768, "v5p:2x2x2", dict(model=4), 2, 80),
    "32B-32k-sft/v5e:8x8": Row("32B", 32_768, "v5e:8x8", dict(model=8), 8),
    "32B-32k-grpo-int8/v5e:8x8": Row(
        "32B", 32_768, "v5e:8x8", dict(context=4, model=8), 2, 8.8, 1, "int8"
    ),
    "32B-32k-grpo-int8/v6e:4x4": Row("32B", 32_768, "v6e:4x4", dict(model=8), 2, 20, 5, "int8"),
    "8B-128k-sft/v5e:8x8": Row("8B", 131_072, "v5e:8x8", dict(context=16), 4),
    "8B-128k-grpo-int8/v5e:8x8": Row(
        "8B", 131_072, "v5e:8x8", dict(context=8, model=4), 2, 20, 1, "int8"
    ),
    "8B-128k-grpo/v5p:2x2x4": Row("8B", 131_072, "v5p:2x2x4", dict(context=8), 2, 30),
    "30B-A3B-32k-sft/v5e:4x8": Row("30B-A3B", 32_768, "v5e:4x8", dict(model=8), 4),
    "30B-A3B-32k-grpo-int8/v5e:4x8": Row(
        "30B-A3B", 32_768, "v5e:4x8", dict(context=2, model=8), 2, 3.3, 1, "int8"
    ),
    # weak scaling: the same work a chip
    "8B-8k/v5e:4x4": Row("8B", 8192, "v5e:4x4", dict(model=4), 16),
    "8B-8k/v5e:8x8": Row("8B", 8192, "v5e:8x8", dict(model=4), 64),
    "8B-8k/v5e:16x16": Row("8B", 8192, "v5e:16x16", dict(model=4), 256),
    "8B-8k/v5e:16x16*2": Row("8B", 8192, "v5e:16x16*2", dict(replica=2, model=4), 512),
    # to compare with figures that others have published
    "8B-8k-full/v6e:16x16": Row("8B", 8192, "v6e:16x16", {}, 512, full=True),
    "8B-decode/v6e:2x2": Row("8B", 2048, "v6e:2x2", dict(model=4), 1, 80, 256),
}


def work_of(row: Row, folder: pathlib.Path) -> tuple[programs.Workload, meshes.MeshConfig]:
    """The workload and mesh of a row, from a configuration as the verb reads it."""
    path = f"Qwen/Qwen3-{row.model}"
    if row.length > 40_960:  # the model card asks for YaRN beyond this
        hf = published.CONFIGS[path] | {"rope_scaling": YARN}
        path = str(folder / f"{row.model}-yarn.json")
        pathlib.Path(path).write_text(json.dumps(hf))
    flags = {
        "model.path": path,
        "model.quant": row.quant,
        "batch.rows": row.rows,
        "batch.length": row.length,
        "mesh.data": -1,
        **{f"mesh.{axis}": n for axis, n in row.mesh.items()},
    }
    if row.full:
        flags["lora.rank"] = 0
    if row.cache:
        flags |= {
            "rollout.limits.max_tokens": row.length,
            "rollout.slots": row.slots,
            "rollout.cache_gb": row.cache,
        }
    if row.cache or row.full:
        flags["model.remat"] = "full"
    given = [f"--config.{name}={value}" for name, value in flags.items() if value != ""]
    ((work, axes),) = verb.works(configs.load(f"configs/search/{row.stage}.py", given))
    return work, axes


def path(name: str, out: pathlib.Path) -> pathlib.Path:
    """The file that keeps the plan of a row."""
    return out / f"{name.replace('/', '-').replace(':', '-').replace('*', 'x')}.json"


def plan_of(name: str, out: pathlib.Path) -> dict:
    """The plan of a row as JSON: read if it is kept, else compiled."""
    kept = path(name, out)
    if not kept.exists():
        row, begun = ROWS[name], time.perf_counter()
        work, axes = work_of(row, out)
        try:
            plan = estimate.plan(work, chips.topology(row.topology), axes, largest_only=True)
            facts = report.facts(plan) | {"says": [report.verdict(plan), *report.sentences(plan)]}
        except ConfigError as error:
            facts = {"says": [f"{name}: {error}"]}
        facts["seconds"] = time.perf_counter() - begun
        write_atomic(kept, json.dumps(facts, indent=2) + "\n")
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/pods"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    head = [
        "run",
        "mesh",
        "rows",
        "GB a chip",
        "of",
        "fits",
        "32k+ rows",
        "s a step",
        "tok/s/chip",
        "MFU",
    ]
    lines = []
    for name in args.rows.split(","):
        facts = plan_of(name, args.out)
        print(*facts["says"], sep="\n", file=sys.stderr)
        if "step" not in facts:
            lines.append([name, *["-"] * 4, "no", *["-"] * 4])
            continue
        step, engine = facts["step"], facts["engine"]
        lines.append(
            [
                name,
                " ".join(f"{axis}={n}" for axis, n in facts["mesh"].items() if n > 1),
                f"{facts['batch']['rows']}",
                report.gb(facts["used"]),
                report.gb(facts["limit"]),
                "yes" if facts["fits"] else "no",
                f"{engine['rows_possible']}" if engine else "-",
                f"{step['estimated_seconds']:.3g}" if step else "-",
                f"{step['tokens_per_second_and_device']:,.0f}" if step else "-",
                f"{100 * step['mfu']:.1f} %" if step else "-",
            ]
        )
    print(*report.grid(head, lines), sep="\n")


if __name__ == "__main__":
    main()
