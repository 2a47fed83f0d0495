"""GRPO with slow tools: what it gains to begin the rollouts of the next steps before the update.

    make bench     (python tests/bench/slow_tools.py [--ahead=0,1,2] [--rounds=2] [--steps=10]
                                                     [--tool=1.0])

Runs the verb itself with the base and the world of the quickstart: 8 prompts x 8 rollouts. The one
tool that the base was taught to call takes `--tool` seconds, the median of a log-normal, whatever
it is asked. The learning rate is next to 0, so that all runs have the same work. The runs of a
round follow each other in one process; the first two steps are left out.

Printed: seconds a step (median of the rounds) and the speedup over no rollouts ahead, the share of
them in which the trainer waits for rollouts, trained tokens/s, calls a rollout, and the age of a
token's policy in updates.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import pathlib
import random
import statistics
import tempfile
from typing import Annotated

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.agent.base import Env
from jaxdeep.agent.tool import tool
from jaxdeep.envs import qa
from jaxdeep.envs.toy import facts
from jaxdeep.metrics import read_metrics
from jaxdeep.run import grpo
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.search import show
from jaxdeep.types import Message

WARM = 2


class Desk(Env):
    """A librarian who takes his time."""

    def __init__(self, task, taskset) -> None:
        self.task, self.index, self.seconds = task, taskset.engine, taskset.seconds
        self.tools = (self.Desk,)

    async def open(self) -> list[Message]:
        return [Message("system", "Call the desk."), Message("user", self.task.question)]

    @tool
    async def Desk(self, Find: Annotated[str, "keywords"]) -> str:
        """Find a passage."""
        await asyncio.sleep(self.seconds * random.lognormvariate(0.0, 0.5))
        return show(self.index.search(Find, 1))


class DeskTaskset(qa.SearchTaskset):
    """Questions whose only tool is the librarian."""

    seconds: float

    def env(self, task) -> Desk:
        return Desk(task, self)


@dataclasses.dataclass(frozen=True)
class Desks:
    """The questions of the quickstart; the reward is luck, so that no group is left out."""

    seconds: float = 1.0

    def load(self) -> DeskTaskset:
        entities = facts.entities_of("train")
        taskset = DeskTaskset(facts.tasks(entities), BM25(facts.passages(entities), k1=facts.K1))
        taskset.seconds = self.seconds
        taskset.rewards = {"luck": (1.0, lambda task, trajectory: trajectory.seed % 5)}
        return taskset


def run(ahead: int, steps: int, seconds: float, workdir: pathlib.Path) -> dict[str, float]:
    """The mean of each metric over the steps of a run."""
    config = configs.load(
        "configs/search/quickstart.py",
        [f"--config.grpo.grpo.ahead={ahead}", f"--config.grpo.train.steps={steps + WARM}"],
    ).grpo
    config.optim.lr = 1e-9
    config.rollout.slots, config.rollout.limits.seconds = 64 * (1 + ahead), 600.0
    config.grpo.eval_every, config.train.save_every = 0, steps + WARM
    config.env = ConfigDict({"taskset": f"{__file__}:Desks", "seconds": seconds})
    grpo.main(config, workdir)
    rows = read_metrics(workdir / "metrics.jsonl")[WARM:]
    names = ("time/total", "time/rollout", "train/tokens", "train/staleness", "rollout/calls")
    return {name: statistics.mean(row[name] for row in rows) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ahead", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tool", type=float, default=1.0, help="seconds of a call, the median")
    flags = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {int(n): [] for n in flags.ahead.split(",")}
    for number in range(flags.rounds):
        for ahead, rows in found.items():
            with tempfile.TemporaryDirectory() as folder:
                place = pathlib.Path(folder, f"{number}-{ahead}")
                rows.append(run(ahead, flags.steps, flags.tool, place))
    middle = {
        ahead: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for ahead, rows in found.items()
    }
    first = next(iter(middle.values()))["time/total"]
    print(f"GRPO, 8 x 8 conversations, {flags.tool:g} s a call, median of {flags.rounds} rounds")
    print(f"{'ahead':>5}{'s/step':>9}{'x':>7}{'waits':>8}{'tokens/s':>10}{'calls':>7}{'age':>6}")
    for ahead, row in middle.items():
        total = row["time/total"]
        print(
            f"{ahead:5}{total:9.2f}{first / total:7.2f}{row['time/rollout'] / total:8.0%}"
            f"{row['train/tokens'] / total:10.0f}{row['rollout/calls']:7.2f}"
            f"{row['train/staleness']:6.2f}"
        )


if __name__ == "__main__":
    main()
