"""Sees a run collapse, mostly before its reward falls, and says so.

Reward is a late sign: text that repeats itself, calls that cannot be read, turns without a thought and
entropy that vanishes or runs away come first. Each sign is a number of `metrics.jsonl`, averaged over a
window of steps and compared with a limit, or with its own first or best window.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdeep.errors import ConfigError, DivergedError
from jaxdeep.parallel import exchange
from jaxdeep.train.checkpoint import Checkpoints
from jaxdeep.workdir import write_atomic

FILE = "guard.json"  # the times that a run was set back

ACTIONS = ("off", "warn", "stop", "rollback")
# how a sign is read: above or below its limit; risen, fallen or grown from its first or best window
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
}


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is done about a collapse: nothing ("off"), a line on stderr ("warn"), the end of the run
    ("stop"), or the last checkpoint from before, with a learning rate times `lr` ("rollback", at most
    `rollbacks` times, then "stop").

    A sign is raised when its mean over `window` steps is beyond its limit `patience` steps running; a
    limit of 0 switches it off. `reward_drop` is the part of the best window's reward that is lost,
    `mismatch` and `kl` are nats a token, `entropy_low` and `entropy_rise` nats, `length` a factor, the
    rest shares; those that rise or grow are measured from the first window.
    """

    action: str = "warn"
    window: int = 10
    patience: int = 3
    lr: float = 0.5
    rollbacks: int = 3
    reward_drop: float = 0.5
    mismatch: float = 0.05
    kl: float = 1.0
    entropy_low: float = 0.001
    entropy_rise: float = 2.0
    repetition: float = 0.3
    malformed: float = 0.3
    thoughtless: float = 0.5
    length: float = 3.0
    flat: float = 0.98

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"guard.action={self.action!r}: choose one of {', '.join(ACTIONS)}")
        if self.window < 1 or self.patience < 1 or self.rollbacks < 1:
            raise ConfigError("guard.window, patience and rollbacks must be at least 1")
        if not 0 < self.lr <= 1:
            raise ConfigError(f"guard.lr={self.lr} must be in (0, 1]")
        for name in SIGNS:
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name}={getattr(self, name)} must be 0 (off) or more")


class Guard:
    """Reads the rows of a run's metrics one by one; `rows` are those of a run that goes on."""

    def __init__(self, config: GuardConfig, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.config, self._healthy, self._told = config, 0, set()
        self._seen = {name: collections.deque(maxlen=config.window) for name in SIGNS}
        self._anchor: dict[str, float] = {}  # the mean of the first window, of rewards the best one
        self._beyond = dict.fromkeys(SIGNS, 0)
        for row in rows:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """What is wrong after this step, in words; nothing is wrong while the list is empty."""
        if self.config.action == "off":
            return []
        raised = []
        for name, (metric, kind) in SIGNS.items():
            limit, value = getattr(self.config, name), row.get(metric)
            if not limit or value is None or not math.isfinite(value):
                continue
            said = self._judge(name, kind, limit, value)
            self._beyond[name] = self._beyond[name] + 1 if said else 0
            if self._beyond[name] >= self.config.patience:
                raised.append(f"{metric} {said}")
        if not any(self._beyond.values()):
            self._healthy = row["step"]
        return raised

    @property
    def before(self) -> int:
        """The last step before the windows that show what is wrong now."""
        return max(self._healthy - self.config.window, 0)

    def _judge(self, name: str, kind: str, limit: float, value: float) -> str:
        """How the mean of the window is beyond the limit, or nothing."""
        seen = self._seen[name]
        seen.append(value)
        if len(seen) < self.config.window:
            return ""
        mean = sum(seen) / len(seen)
        anchor = self._anchor.setdefault(name, mean)
        if kind == "fell":
            self._anchor[name] = max(anchor, mean)
            bad, than = anchor > 0 and mean < (1 - limit) * anchor, f"its best was {anchor:.3g}"
        elif kind == "rose":
            bad, than = mean > anchor + limit, f"it began at {anchor:.3g}"
        elif kind == "grew":
            bad, than = mean > anchor * limit, f"it began at {anchor:.3g}"
        else:
            bad = mean > limit if kind == "above" else mean < limit
            than = f"the limit is {limit:g}"
        return (
            f"is {mean:.3g} over {len(seen)} steps, {than} (guard.{name}={limit:g})" if bad else ""
        )

    def tell(self, step: int, alarms: Sequence[str]) -> None:
        """Say what is wrong, each sign once."""
        for alarm in alarms:
            sign = alarm.split()[0]
            if sign not in self._told:
                print(f"step {step}: {alarm}", file=sys.stderr)
            self._told.add(sign)


def keep(config: GuardConfig | None, every: int) -> int:
    """How many checkpoints, one in `every` steps, reach back to before the windows of an alarm."""
    if config is None or config.action != "rollback":
        return 1
    return -(-(config.window + config.patience) // every) + 1


def set_back(
    workdir: pathlib.Path,
    saved: Checkpoints,
    guard: Guard,
    step: int,
    alarms: Sequence[str],
    every: int,
) -> bool:
    """Act on what is wrong after a step of a run that saves `every` so many. True where the run must go on
    from its newest checkpoint, which is from before the collapse, or from its beginning where none could
    be, with `rate`; what came after it is kept in `collapsed-N`. DivergedError where the run must stop."""
    guard.tell(step, alarms)
    if not alarms or guard.config.action in ("off", "warn"):
        return False
    saved.wait()
    done = rollbacks(workdir)
    good = max((at for at in saved.steps() if at <= guard.before), default=0)
    lost = not good and guard.before >= every
    if guard.config.action == "stop" or done >= guard.config.rollbacks or lost:
        last = f"The last checkpoint from before is that of step {good}" if good else ""
        if lost:
            last = f"No checkpoint of step {guard.before} or before it is kept any more: raise train.keep"
        raise DivergedError(
            f"stopped after step {step}, set back {done} times before: {'; '.join(alarms)}. {last}"
        )
    back = {"step": step, "to": good, "why": list(alarms)}
    write_atomic(workdir / FILE, json.dumps([*_read(workdir), back], indent=2) + "\n")
    print(f"step {step}: set back to step {good}", file=sys.stderr)
    finish(workdir, saved)
    return True


def finish(workdir: pathlib.Path, saved: Checkpoints) -> None:
    """Put what came after the step that a run was last set back to out of its way, where a kill has kept
    `set_back` from it."""
    backs = _read(workdir)
    place = workdir / f"collapsed-{len(backs)}"
    if not backs or exchange.broadcast((place / "metrics.jsonl").exists()):
        return
    saved.drop_after(backs[-1]["to"])
    for name in ("rollouts", "gaps"):
        for path in sorted((workdir / name).glob("*")):
            if int(path.name.split(".")[0]) > backs[-1]["to"]:
                place.mkdir(exist_ok=True)
                shutil.move(path, place / path.name)
    write_atomic(place / "metrics.jsonl", (workdir / "metrics.jsonl").read_text())


def agree(workdir: pathlib.Path) -> None:
    """Of several processes each keeps the history of the run; the first one's is right."""
    if (backs := exchange.broadcast(_read(workdir))) != _read(workdir):
        write_atomic(workdir / FILE, json.dumps(backs, indent=2) + "\n")


def rollbacks(workdir: pathlib.Path) -> int:
    """How often a run was set back."""
    return len(_read(workdir))


def rate(config: GuardConfig | None, workdir: pathlib.Path) -> float:
    """What the learning rate is multiplied by."""
    return (config or GuardConfig()).lr ** rollbacks(workdir)


def _read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / FILE
    return json.loads(path.read_text()) if path.exists() else []
