"""Detects that a run collapses, mostly before its reward falls, and warns, stops, or rolls it back.

Reward is a late sign of a collapse. Repeated text, malformed calls, turns without thinking, and
entropy that vanishes or explodes come first. Each sign is a metric of `metrics.jsonl`, averaged
over a window of steps and compared with a limit, or with its own first or best window.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from jaxdeep.errors import DivergedError
from jaxdeep.parallel import exchange
from jaxdeep.settings import Above, AtLeast, AtMost, section
from jaxdeep.train.checkpoint import Checkpoints
from jaxdeep.workdir import Workdir, write_atomic

# The metric of each sign and how its windowed mean is judged. "above" and "below": by the limit.
# "rose" and "grew": by the first window's mean plus the limit, or times the limit. "fell": by the
# best window's mean, of which the limit is the share that may be lost.
SIGNS = {
    "reward_drop": ("reward/mean", "fell"),
    "mismatch": ("train/mismatch_kl", "above"),
    "kl": ("train/kl", "above"),
    "entropy_low": ("train/entropy", "below"),
    "entropy_rise": ("train/entropy", "rose"),
    "repetition": ("rollout/repetition", "rose"),
    "malformed": ("rollout/malformed", "rose"),
    "thoughtless": ("rollout/thoughtless", "rose"),
    "length": ("rollout/sampled_tokens", "grew"),
    "flat": ("grpo/flat_groups", "above"),
    "unjudged": ("rollout/unjudged", "above"),
    "unsampled": ("rollout/unsampled", "above"),
    "tools": ("rollout/broken_tools", "above"),
}
# Signs of a broken world rather than of a broken policy: an earlier policy would meet it, too.
WORLD = {SIGNS[sign][0] for sign in ("unjudged", "unsampled", "tools")}


@section
class GuardConfig:
    """What to do about a collapse, and the limits of its signs.

    An alarm is raised when the mean of a sign over `window` steps has been beyond its limit for
    `patience` steps in a row. A limit of 0 switches the sign off. Where the world is broken, which
    an earlier policy would meet as well, "rollback" ends the run.
    """

    action: Annotated[
        Literal["off", "warn", "stop", "rollback"],
        "at an alarm: nothing, a line on stderr, end the run, or go back to the last checkpoint from "
        "before the collapse",
    ] = "warn"
    window: Annotated[int, AtLeast(1), "steps over which a sign is averaged"] = 10
    patience: Annotated[int, AtLeast(1), "steps in a row beyond a limit that raise an alarm"] = 3
    lr: Annotated[float, Above(0), AtMost(1), "factor on the learning rate at each rollback"] = 0.5
    rollbacks: Annotated[int, AtLeast(1), "rollbacks, at most; then the run is stopped"] = 3
    reward_drop: Annotated[
        float, AtLeast(0), AtMost(1), "share of the best window's reward that may be lost"
    ] = 0.5
    mismatch: Annotated[float, AtLeast(0), "nats a token from policy to sampler"] = 0.05
    kl: Annotated[float, AtLeast(0), "nats a token from policy to base"] = 1.0
    entropy_low: Annotated[float, AtLeast(0), "the least entropy, nats a token"] = 0.001
    entropy_rise: Annotated[float, AtLeast(0), "nats of entropy above the first window"] = 2.0
    repetition: Annotated[
        float, AtLeast(0), AtMost(1), "share of repeated text above the first window"
    ] = 0.3
    malformed: Annotated[
        float, AtLeast(0), AtMost(1), "share of malformed turns above the first window"
    ] = 0.3
    thoughtless: Annotated[
        float, AtLeast(0), AtMost(1), "share of turns without thinking above the first window"
    ] = 0.5
    length: Annotated[float, AtLeast(0), "times the first window's tokens of a rollout"] = 3.0
    flat: Annotated[float, AtLeast(0), AtMost(1), "share of groups of equal rewards"] = 0.98
    unjudged: Annotated[
        float, AtLeast(0), AtMost(1), "share of rollouts without a reward; ends the run"
    ] = 0.5
    unsampled: Annotated[
        float, AtLeast(0), AtMost(1), "share of rollouts without a sampled token; ends the run"
    ] = 0.5
    tools: Annotated[
        float, AtLeast(0), AtMost(1), "share of tools whose every call fails; ends the run"
    ] = 0.5


class Guard:
    """Reads the metrics of a run row by row; `rows` are the earlier ones of a run that is
    resumed."""

    def __init__(self, config: GuardConfig, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.config, self._told = config, set()
        self._last_healthy = 0  # the last step without a sign beyond its limit
        self._window = {name: collections.deque(maxlen=config.window) for name in SIGNS}
        self._baseline: dict[
            str, float
        ] = {}  # mean of the first window; of the reward, the best one
        self._steps_beyond = dict.fromkeys(SIGNS, 0)  # its limit, in a row
        for row in rows:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """The alarms after this step, each as a sentence; empty if all is well."""
        if self.config.action == "off":
            return []
        alarms = []
        for name, (metric, kind) in SIGNS.items():
            limit, value = getattr(self.config, name), row.get(metric)
            if not limit or value is None or not math.isfinite(value):
                continue
            finding = self._judge(name, kind, limit, value)
            self._steps_beyond[name] = self._steps_beyond[name] + 1 if finding else 0
            if self._steps_beyond[name] >= self.config.patience:
                alarms.append(f"{metric} {finding}")
        if not any(self._steps_beyond.values()):
            self._last_healthy = row["step"]
        return alarms

    @property
    def safe_step(self) -> int:
        """The last step before the windows of the present alarms. A collapse may have begun
        anywhere in the first window that shows it, so the whole window counts as collapsed."""
        return max(self._last_healthy - self.config.window, 0)

    def _judge(self, name: str, kind: str, limit: float, value: float) -> str:
        """How the mean of the window, this value included, is beyond the limit; '' if it is not."""
        window = self._window[name]
        window.append(value)
        if len(window) < self.config.window:
            return ""
        mean = sum(window) / len(window)
        baseline = self._baseline.setdefault(name, mean)
        if kind == "fell":
            self._baseline[name] = max(baseline, mean)
            beyond, reason = mean < (1 - limit) * baseline, f"its best was {baseline:.3g}"
            beyond = beyond and baseline > 0  # a share of a negative reward means nothing
        elif kind == "rose":
            beyond, reason = mean > baseline + limit, f"it began at {baseline:.3g}"
        elif kind == "grew":
            beyond, reason = mean > baseline * limit, f"it began at {baseline:.3g}"
        else:
            beyond = mean > limit if kind == "above" else mean < limit
            reason = f"the limit is {limit:g}"
        if not beyond:
            return ""
        return f"is {mean:.3g} over {len(window)} steps, {reason} (guard.{name}={limit:g})"

    def tell(self, step: int, alarms: Sequence[str]) -> None:
        """Print the alarms to stderr, each sign once in a run."""
        for alarm in alarms:
            sign = alarm.split()[0]
            if sign not in self._told:
                print(f"step {step}: {alarm}", file=sys.stderr)
            self._told.add(sign)


def checkpoints_to_keep(config: GuardConfig | None, every: int) -> int:
    """How many checkpoints, one every `every` steps, a run must keep so that one of them is from
    before the windows of an alarm."""
    if config is None or config.action != "rollback":
        return 1
    return -(-(config.window + config.patience) // every) + 1


def roll_back(
    workdir: pathlib.Path,
    saved: Checkpoints,
    guard: Guard,
    step: int,
    alarms: Sequence[str],
    every: int,
) -> bool:
    """Act on the alarms of a step, in a run that saves a checkpoint every `every` steps.

    True if the run was rolled back: it must go on from its newest checkpoint, or from its beginning
    if it has none, with its learning rate times `lr_factor`. That checkpoint is from before the
    collapse; the later rollouts and metrics are moved to `collapsed-N`. DivergedError if the run
    must stop.
    """
    guard.tell(step, alarms)
    if not alarms or guard.config.action in ("off", "warn"):
        return False
    saved.wait()
    done = rollback_count(workdir)
    good = max((s for s in saved.steps() if s <= guard.safe_step), default=0)
    # one was saved in time, and deleted since: beginning anew would throw away a healthy run
    lost = not good and guard.safe_step >= every
    broken = any(alarm.split()[0] in WORLD for alarm in alarms)
    if guard.config.action == "stop" or done >= guard.config.rollbacks or lost or broken:
        last = f"The last checkpoint from before is that of step {good}" if good else ""
        if lost:
            last = (
                f"No checkpoint of step {guard.safe_step} or before it is kept any more: "
                "raise train.keep"
            )
        raise DivergedError(
            f"stopped after step {step}, set back {done} times before: {'; '.join(alarms)}. {last}"
        )
    rollback = {"step": step, "to": good, "why": list(alarms)}
    # written first: if the process is killed from here on, the next start finishes the rollback
    write_atomic(Workdir(workdir).guard, json.dumps([*_read(workdir), rollback], indent=2) + "\n")
    print(f"step {step}: set back to step {good}", file=sys.stderr)
    finish_rollback(workdir, saved)
    return True


def finish_rollback(workdir: pathlib.Path, saved: Checkpoints) -> None:
    """Move everything after the step of the last rollback out of the run's way, unless that was
    done: a process that was killed in `roll_back` does it at its next start."""
    history = _read(workdir)
    folder = Workdir(Workdir(workdir).collapsed(len(history)))
    # the metrics are copied last, so their copy shows that the rest is done
    if not history or exchange.broadcast(folder.metrics.exists()):
        return
    step = history[-1]["to"]
    saved.drop_after(step)
    for path in Workdir(workdir).files_after(step):
        folder.path.mkdir(exist_ok=True)
        shutil.move(path, folder.path / path.name)
    write_atomic(folder.metrics, Workdir(workdir).metrics.read_text())


def share_history(workdir: pathlib.Path) -> None:
    """Give every process the first one's history of rollbacks. Each writes its own file, and a kill
    between two of them would leave the processes with different learning rates."""
    if (history := exchange.broadcast(_read(workdir))) != _read(workdir):
        write_atomic(Workdir(workdir).guard, json.dumps(history, indent=2) + "\n")


def rollback_count(workdir: pathlib.Path) -> int:
    """How often a run was rolled back."""
    return len(_read(workdir))


def lr_factor(config: GuardConfig | None, workdir: pathlib.Path) -> float:
    """The factor on the learning rate after all rollbacks so far."""
    return (config or GuardConfig()).lr ** rollback_count(workdir)


def _read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = Workdir(workdir).guard
    return json.loads(path.read_text()) if path.exists() else []
