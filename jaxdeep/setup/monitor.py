"""What is seen of a run while it runs, beside its rows: boards, where the time goes, a profiler
window.

Sections of a configuration, shared by the verbs that train: `log`, `profile`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax

from jaxdeep.boards import TensorBoard, Wandb
from jaxdeep.console import say
from jaxdeep.errors import ConfigError
from jaxdeep.metrics import Metrics, read_metrics
from jaxdeep.model import flops
from jaxdeep.settings import AtLeast, section
from jaxdeep.workdir import Workdir


@section
class LogConfig:
    """What is said while a run works."""

    every: Annotated[int, AtLeast(1), "steps between lines about where the time went"] = 25
    wandb: Annotated[str, "a Weights & Biases project to send rows to; empty: none"] = ""


@section
class ProfileConfig:
    """What JAX's profiler watches."""

    steps: Annotated[
        str | int, AtLeast(1), "the steps, such as 10:12 (both among them) or 10; empty: none"
    ] = ""

    def __post_init__(self) -> None:
        self.window()

    def window(self) -> range:
        """The steps, both ends among them."""
        if self.steps == "":
            return range(0)
        first, _, last = str(self.steps).partition(":")
        last = last or first
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError(f"profile.steps={self.steps!r} is not like 10:12, or 10")
        return range(int(first), int(last) + 1)


LOG, NO_PROFILE = LogConfig(), ProfileConfig()


class Monitor(Metrics):
    """`metrics.jsonl` with more in each row, sent to the boards as well: `time/total` in seconds,
    and on devices with a known peak `mfu`, `train/flops` over `time/train` as a share of that peak.

    Writing a row ends its step: the profiler starts and stops there, and time spent after it, such
    as for a checkpoint, counts to the next step."""

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        mesh: jax.sharding.Mesh,
        settings: LogConfig = LOG,
        profile: ProfileConfig = NO_PROFILE,
    ) -> None:
        self.settings = settings
        self._window = profile.window()
        self._profile, self._profiling = Workdir(workdir).profile, False
        self._peak = flops.peak_of(mesh)
        path = Workdir(workdir).metrics
        before = read_metrics(path) if path.exists() else []
        self._boards: list[TensorBoard | Wandb] = []
        self._first = jax.process_index() == 0  # of several processes, whose rows are the same
        if self.settings.wandb and self._first:
            sent = before[-1]["step"] if before else -1
            self._boards.append(Wandb(workdir, self.settings.wandb, sent))
        super().__init__(workdir, step=step)
        self._boards.append(TensorBoard(workdir, (r for r in before if r["step"] <= step)))
        self._spent: list[dict[str, float]] = []  # seconds by stage, of each step
        self._move_window(step + 1)
        self._begun = time.perf_counter()

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Adds one row, which it returns, and ends the step."""
        now = time.perf_counter()
        row = dict(values) | {"time/total": now - self._begun}
        self._begun = now
        work, seconds = row.get("train/flops"), row.get("time/train")
        if work and seconds and self._peak:
            row["mfu"] = work / seconds / self._peak
        row = super().write(step, row)
        for board in self._boards:
            board.write(step, row)
        self._spent.append({k: v for k, v in row.items() if k.startswith("time/")})
        if len(self._spent) % self.settings.every == 0:
            self._tell(f"step {step}", self._spent[-self.settings.every :])
        self._move_window(step + 1)
        return row

    def close(self) -> None:
        """Says where the time of all steps went, and closes everything."""
        self._move_window(0)
        if self._spent:
            self._tell("the run", self._spent)
        for board in self._boards:
            board.close()
        super().close()

    def _tell(self, what: str, times: Sequence[Mapping[str, float]]) -> None:
        if self._first:
            say(f"{what}: {spent(times)}")

    def _move_window(self, step: int) -> None:
        wanted = step in self._window
        if wanted and not self._profiling:
            jax.profiler.start_trace(str(self._profile))
        if self._profiling and not wanted:
            jax.profiler.stop_trace()
        self._profiling = wanted


def spent(times: Sequence[Mapping[str, float]]) -> str:
    """Where the time of some steps went, as one line: stages by share, their parts in brackets."""
    total = sum(row["time/total"] for row in times)
    sums: dict[str, float] = {}
    for row in times:
        for name, seconds in row.items():
            sums[name.removeprefix("time/")] = sums.get(name.removeprefix("time/"), 0.0) + seconds
    sums.pop("total")
    stages = {name: seconds for name, seconds in sums.items() if "/" not in name}
    stages["other"] = max(total - sum(stages.values()), 0.0)
    said = []
    for stage, seconds in sorted(stages.items(), key=lambda item: -item[1]):
        parts = {n.partition("/")[2]: s for n, s in sums.items() if n.startswith(f"{stage}/")}
        inside = ", ".join(f"{name} {_share(s, total)}" for name, s in parts.items())
        said.append(f"{stage} {_share(seconds, total)}" + (f" ({inside})" if inside else ""))
    return f"{total / len(times):.3g} s a step over {len(times)}: {', '.join(said)}"


def _share(seconds: float, total: float) -> str:
    return f"{100 * seconds / total:.0f} %"
