"""The learning study: what algorithms, the retry reward and the adapter's rank do on two tasks.

    python tests/bench/study.py [--rows=maze/default,maze/grpo] [--seeds=0,1,2] [--minutes=60]
                                [--out=runs/study] [--config.grpo.train.steps=9 ...]

A row is one change to `configs/search/quickstart.py` (search) or `configs/toy/maze.py` (maze). SFT,
GRPO and the evaluation of the last checkpoint are the verbs' own; rows with the same SFT share it.
Finished parts are not done again and an interrupted run is resumed, so a study can be done piece by
piece: after `--minutes` no further run begins.

Prints a table and writes `study.json`: the mean over seeds with its 95 % interval (Student's t;
Wilson's for a single seed), and a McNemar test against the world's default row, over the tasks of
all seeds that both rows have.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent import record
from jaxdeep.eval import harness, statistics
from jaxdeep.metrics import read_metrics
from jaxdeep.pages import report
from jaxdeep.run import grpo, quickstart, sft
from jaxdeep.run.eval import evaluate
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.sections import load_run
from jaxdeep.types import Trajectory
from jaxdeep.workdir import write_atomic

WORLDS = {"search": "configs/search/quickstart.py", "maze": "configs/toy/maze.py"}
ALGORITHMS = ("default", "grpo", "dr_grpo", "rloo", "gspo", "cispo", "binary_tv")
BASE = "default"


def rank(number: int, **rates: float) -> dict[str, Any]:
    return {"sft.lora.rank": number, "grpo.lora.rank": number} | {
        f"{stage}.optim.lr": rate for stage, rate in rates.items()
    }


# The changes of each row. Rows of other ranks have learning rates of their own.
CHANGES: dict[str, dict[str, Any]] = {
    **{f"{world}/{name}": {"grpo.grpo.algorithm": name} for world in WORLDS for name in ALGORITHMS},
    "search/retry": {"grpo.env.rewards.retry": 0.1},
    "search/rank1": rank(1),
    "search/rank8": rank(8),
    "search/rank64": rank(64),
    "search/full": rank(0, sft=1e-3, grpo=2e-4),
}
COLUMNS = ("row", "seeds", "after SFT", "em", "difference", "p")


def main(argv: Sequence[str]) -> None:
    """Run what is missing until the time is up; print and write all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(CHANGES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/study"))
    args, overrides = parser.parse_known_args(argv)
    rows, seeds = args.rows.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(rows) - CHANGES.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(CHANGES)}")
    end = time.monotonic() + 60 * args.minutes
    for seed in seeds:
        for row in rows:
            config = configuration(row, seed, overrides)
            if not (args.out / row / str(seed) / "test" / "eval.jsonl").exists():
                if time.monotonic() > end:
                    break
                print(f"study: {row}, seed {seed}", file=sys.stderr)
                run(config, args.out, row, seed)
    found = [line for row in CHANGES if (line := result(args.out, row))]
    write_atomic(args.out / "study.json", json.dumps(found, indent=2) + "\n")
    print(report.table(found, COLUMNS))


def configuration(row: str, seed: int, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of a row: sections sft, grpo and test."""
    changes = [f"--config.{key}={value}" for key, value in CHANGES[row].items()]
    with_row = [f"--config.seed={seed}", *changes, *overrides]
    config = configs.load(WORLDS[row.split("/")[0]], with_row)
    config.grpo.grpo.eval_every = 0  # the last checkpoint counts
    config.grpo.rollout.limits.seconds = 3600.0  # on a busy machine none should time out
    return config


def run(config: ConfigDict, out: pathlib.Path, row: str, seed: int) -> None:
    """SFT, unless another row had the same, GRPO, and the evaluations of both."""
    shared, place = shared_sft(config, out), out / row / str(seed)
    sft.main(config.sft, shared)
    if not quickstart.finished(config.sft, shared):
        sys.exit(0)  # SIGTERM
    start = quickstart.go_on(config, shared)
    tested(quickstart.test_config(config, start), shared / "test")
    grpo.main(config.grpo, place)
    if not quickstart.finished(config.grpo, place):
        sys.exit(0)
    write_atomic(place / "sft", str(shared.relative_to(out)))
    tested(quickstart.test_config(config, str(place)), place / "test")


def shared_sft(config: ConfigDict, out: pathlib.Path) -> pathlib.Path:
    """The folder of this configuration's SFT: equal sections share one."""
    section = config.sft.copy_and_resolve_references().to_json(sort_keys=True)
    return out / "sft" / f"{zlib.crc32(section.encode()):08x}"


def tested(config: ConfigDict, place: pathlib.Path) -> None:
    """Evaluate, unless that was done."""
    if not (place / "eval.jsonl").exists():
        evaluate(load_run(EvalRun, config), config, place)


def result(out: pathlib.Path, row: str) -> dict[str, Any] | None:
    """The result of a row over its finished seeds; None if there are none."""
    places = done(out, row)
    if not places:
        return None
    base = done(out, f"{row.split('/')[0]}/{BASE}")
    after = {seed: read(place / "test") for seed, place in places.items()}
    before = [read(out / (place / "sft").read_text() / "test") for place in places.values()]
    shares = [share(seen) for seen in after.values()]
    right = [harness.correct(t) for seen in after.values() for t in seen]
    alone = len(shares) == 1
    low, high = statistics.wilson(sum(right), len(right)) if alone else statistics.student(shares)
    line = {
        "row": row,
        "seeds": len(shares),
        "n": [len(seen) for seen in after.values()],
        "after SFT": sum(map(share, before)) / len(before),
        "em": sum(shares) / len(shares),
        "em_low": low,
        "em_high": high,
        "each": dict(zip(after, shares, strict=True)),
        "minutes": round(sum(map(minutes, places.values())) / len(places), 1),
    }
    both = [seed for seed in after if seed in base]
    if both and not row.endswith(f"/{BASE}"):
        pairs = [(read(base[seed] / "test"), after[seed]) for seed in both]
        theirs, ours = (
            [harness.correct(t) for pair in pairs for t in pair[side]] for side in (0, 1)
        )
        line["difference"] = (sum(ours) - sum(theirs)) / len(ours)
        line["p"] = statistics.mcnemar(theirs, ours)
    return line


def done(out: pathlib.Path, row: str) -> dict[int, pathlib.Path]:
    """The folders of a row's evaluated seeds, by seed."""
    found = (path for path in (out / row).glob("*") if (path / "test" / "eval.jsonl").exists())
    return {int(path.name): path for path in sorted(found)}


def read(place: pathlib.Path) -> list[Trajectory]:
    """The rollouts of an evaluation, sorted by task."""
    return sorted(record.read(place / "eval.jsonl"), key=lambda trajectory: trajectory.task.id)


def share(seen: Sequence[Trajectory]) -> float:
    return sum(map(harness.correct, seen)) / len(seen)


def minutes(place: pathlib.Path) -> float:
    """Minutes of all steps of a run."""
    return sum(row["time/total"] for row in read_metrics(place / "metrics.jsonl")) / 60


if __name__ == "__main__":
    main(sys.argv[1:])
