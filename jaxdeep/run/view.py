"""Look at a run: its curves and every rollout token by token, as pages that open from the disk.

In a rollout tokens are coloured by who wrote them, by advantage, by the sampler's probability or by
the gap between trainer and sampler; tool calls are folded, rewards stand by component, and a search
reads all rollouts. With a second run the curves lie over one another and rollouts of the same task
side by side. Of a quickstart its last stage is shown."""

from __future__ import annotations

from pathlib import Path

from jaxdeep import config as configs
from jaxdeep.errors import ConfigError
from jaxdeep.pages import view
from jaxdeep.workdir import Workdir, home

ARGUMENTS = "RUN [RUN2]"
DEFAULT_CONFIG = None
EXAMPLE = "python -m jaxdeep view runs/grpo"
NEEDS = "a run in runs/grpo; after the quickstart there is one in runs/quickstart- quickstart/grpo"
FLAGS = {"steps": "only the rollouts of these steps, as 10:20"}


def main(*runs: str, steps: str = "") -> int:
    """Write the pages into `RUN/view`."""
    if not 1 <= len(runs) <= 2:
        raise ConfigError(f"view takes the folder of one run or of two, not {len(runs)}")
    places = [place(run) for run in runs]
    out = Workdir(places[0]).pages
    page = view.build(places, out, window(steps))
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{page} ({len(files)} files, {size:.1f} MiB): open it in a browser")
    return 0


def place(run: str) -> Path:
    """The folder with the metrics of a run: of a quickstart that of its last stage. ConfigError for
    one in a bucket, where only checkpoints are."""
    if "://" in run:
        raise ConfigError(f"{run} is not a local folder: view reads the --workdir of a run")
    return configs.last_stage(home(run))


def window(steps: str) -> range | None:
    """The steps of "10:20", both ends among them, either of which may be left out; None for all."""
    first, colon, last = steps.partition(":")
    if not steps:
        return None
    if not all(end.isdigit() or (colon and not end) for end in (first, last if colon else first)):
        raise ConfigError(f"--steps={steps} is not like 10:20, 10: or :20")
    begin, end = int(first or 0), int(last or view.LAST) if colon else int(first)
    if begin > end:
        raise ConfigError(f"--steps={steps} ends before it begins")
    return range(begin, end + 1)
