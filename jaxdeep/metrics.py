"""Reads and writes `metrics.jsonl`, a row of numbers per step, and declares each metric.

The file survives a kill at any moment: an incomplete last line is dropped, and so are rows after
the checkpoint that a run resumes from, so that no step appears twice.

`METRICS` says of each metric its unit, what it means and what to do when it looks wrong.
`python -m jaxdeep.metrics > jaxdeep/rl/METRICS.md` writes it as a page.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdeep.errors import DataError
from jaxdeep.workdir import Workdir, write_atomic


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without an incomplete last line; DataError where it does not
    exist or is not a metrics file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: no run has written its metrics there") from None
    # What follows the last newline is empty, or the beginning of a row that a kill cut short.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}:{number} is not a row of metrics: {line[:80]!r}")
        rows.append(row)
    return rows


class Metrics:
    """Appends rows to `workdir/metrics.jsonl`, after dropping those later than `step`, from which
    the run resumes."""

    def __init__(self, workdir: Path, *, step: int) -> None:
        self.path = Workdir(workdir).metrics
        workdir.mkdir(parents=True, exist_ok=True)
        kept = (
            [row for row in read_metrics(self.path) if row["step"] <= step]
            if self.path.exists()
            else []
        )
        self.step = kept[-1]["step"] if kept else -1
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends one row and returns it; it is on disk then. Numbers that are not finite become
        null, which JSON has, and are named under "nonfinite". ValueError unless `step` is later
        than the last."""
        if step <= self.step:
            raise ValueError(f"{step=} is not after the last row of {self.path}, {self.step}")
        row: dict[str, Any] = {"step": step}
        for name, value in values.items():
            row[name] = value if isinstance(value, (int, str)) else float(value)
        nonfinite = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        if nonfinite:
            row |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.step = step
        return row

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Metric(NamedTuple):
    """One metric, or a family of them: a part of the name in braces stands for any."""

    name: str
    unit: str
    meaning: str
    advice: str = ""


METRICS = (
    Metric("step", "steps", "steps taken so far"),
    Metric("nonfinite", "names", "metrics of this row that were not finite, and are null in it"),
    # rewards and rollouts
    Metric(
        "reward/mean",
        "reward",
        "weighted total, over the rollouts that have one",
        "Falls: look at rollouts of before and after in `jaxdeep view`; lower optim.lr. null: no "
        "rollout was judged, see rollout/unjudged.",
    ),
    Metric(
        "reward/{reward}",
        "reward",
        "the reward of this name, before its weight, over the rollouts that have one",
        "One rises while `answer` falls: it is exploited; lower its weight in env.rewards.",
    ),
    Metric("reward/shaped", "reward", "the mean after the penalties of grpo.shaping"),
    Metric(
        "rollout/turns",
        "turns",
        "turns of the policy in a rollout",
        "1 throughout: no tool is used.",
    ),
    Metric(
        "rollout/calls",
        "calls",
        "tool calls made in a rollout, mistaken ones included",
        "0: the prompt does not show the tools (model.tools_in_prompt), or the policy never learned "
        "their format: SFT first.",
    ),
    Metric(
        "rollout/bad_calls",
        "calls",
        "of these, mistakes of the policy's",
        "High: read the answers the calls got; the tool's docstring and schema may mislead.",
    ),
    Metric(
        "rollout/sampled_tokens",
        "tokens",
        "sampled in a rollout, over all its branches",
        "Grows without reward: grpo.shaping.overlong or length. 0: no prompt fits "
        "rollout.limits.max_tokens.",
    ),
    Metric(
        "rollout/tool_seconds",
        "s",
        "in the tools of a rollout, summed over calls, which overlap",
        "Large beside time/rollout: raise rollout.slots, or cache answers.",
    ),
    Metric(
        "rollout/repetition",
        "share",
        "of runs of 4 tokens, those that were in the same turn before",
        "Rises: the policy loops; lower optim.lr or go back (guard.action=rollback).",
    ),
    Metric(
        "rollout/malformed",
        "share",
        "of turns, those that the chat format cannot read whole",
        "Rises: the policy loses its format; lower optim.lr, or reward the form.",
    ),
    Metric(
        "rollout/thoughtless",
        "share",
        "of turns, those without reasoning",
        "Rises where model.thinking=write: reasoning is being given up.",
    ),
    Metric(
        "rollout/unjudged",
        "share",
        "of rollouts, those without a reward: the world failed, or a reward raised or gave None",
        "Above 0: the console names the first failure; `jaxdeep validate` tries tools and rewards.",
    ),
    Metric(
        "rollout/unsampled",
        "share",
        "of rollouts, those in which no token was sampled",
        "Above 0: prompts are longer than rollout.limits.max_tokens, or `open` failed.",
    ),
    Metric(
        "rollout/broken_tools",
        "share",
        "of the tools called often in the step, those whose every call failed",
        "Above 0: the tool raises, or its schema asks for what the policy cannot know.",
    ),
    Metric(
        "rollout/stop/{stop}",
        "share",
        "of rollouts, those that ended so (jaxdeep.types.Stop)",
        "`max_tokens`, `turn_tokens`, `max_calls`, `max_turns`, `timeout`: raise that limit of "
        "rollout.limits. `failed`: see rollout/unjudged.",
    ),
    Metric("tool/{tool}/calls", "calls", "of this tool in a rollout"),
    Metric(
        "tool/{tool}/failed",
        "share",
        "of its calls, those that failed, by a mistake of the policy's or of the world",
        "High: look at what the calls were answered in `jaxdeep view`.",
    ),
    Metric("tool/{tool}/cached", "share", "of its calls, those answered from a cache"),
    Metric("tool/{tool}/latency", "s", "a call, on average"),
    # advantages
    Metric(
        "grpo/flat_groups",
        "share",
        "of groups, those whose rewards are all equal: nothing is learned from them",
        "Near 1: tasks are too hard or too easy (grpo.curriculum, grpo.flat=resample), or the reward "
        "does not tell rollouts apart; raise grpo.group.",
    ),
    Metric("grpo/void_rollouts", "rollouts", "without a reward", "See rollout/unjudged."),
    Metric("grpo/rows", "rows", "of the step's batches"),
    Metric(
        "grpo/loss_tokens",
        "tokens",
        "sampled and learned in the step",
        "0: no update was made, see grpo/flat_groups and rollout/unjudged.",
    ),
    Metric("grpo/epochs", "passes", "over the task set so far"),
    # the engine
    Metric("engine/sampled", "tokens", "drawn since the last step, in this process"),
    Metric("engine/prefilled", "tokens", "of prompts that were computed"),
    Metric("engine/reused", "tokens", "of prompts that lay in the cache"),
    Metric(
        "engine/hit_rate",
        "share",
        "of tokens of prompts, those that lay in the cache",
        "Low with several turns: raise rollout.cache_gb.",
    ),
    Metric(
        "engine/paused",
        "rows",
        "paused because pages ran out, to be computed again",
        "Above 0: raise rollout.cache_gb or lower rollout.slots.",
    ),
    Metric(
        "engine/compilations",
        "programs",
        "compiled since the last step",
        "Above 0 after the first steps: report it.",
    ),
    # the update
    Metric(
        "train/loss",
        "nats or reward",
        "of the step; in SFT nats a token, in GRPO a surrogate whose value says little",
        "SFT: rises over many steps: lower optim.lr.",
    ),
    Metric(
        "train/grad_norm",
        "",
        "global norm of the gradient before it is clipped",
        "Far above optim.clip for long, or jumps: lower optim.lr.",
    ),
    Metric("train/lr", "", "learning rate of the update"),
    Metric("train/tokens", "tokens", "learned, by their weights"),
    Metric(
        "train/entropy",
        "nats a token",
        "of the policy where it was learned",
        "Falls to 0: it no longer explores; raise grpo.clip.high or grpo.entropy. Rises without end: "
        "lower optim.lr.",
    ),
    Metric(
        "train/kl",
        "nats a token",
        "from policy to base, where a KL penalty is set",
        "Runs away: raise the coefficient of the penalty or lower optim.lr.",
    ),
    Metric(
        "train/mismatch_kl",
        "nats a token",
        "between sampler and policy before the update (k3)",
        "Above 0.01: sampler and trainer differ, or grpo.ahead makes rollouts stale; "
        "grpo.correction.kind=truncate.",
    ),
    Metric("train/logp_diff", "nats", "mean distance of their log-probabilities of a token"),
    Metric(
        "train/max_logp_diff",
        "nats",
        "the largest distance in any token",
        "Above grpo.tolerance at the first step ends a run: set model.dtype=float32 to see whether "
        "it is rounding.",
    ),
    Metric("train/max_prob_diff", "probability", "the largest distance of their probabilities"),
    Metric(
        "train/ess",
        "share",
        "effective sample size of the ratios policy / sampler, of the tokens; 1 on policy",
        "Far below 1: the update is of another policy; fewer grpo.passes, smaller grpo.ahead.",
    ),
    Metric(
        "train/clipped",
        "share",
        "of tokens, those beyond a bound of grpo.clip",
        "Above 0.2: lower optim.lr or grpo.passes.",
    ),
    Metric("train/corrected", "share", "of tokens, those beyond a bound of grpo.correction"),
    Metric("train/staleness", "updates", "mean age of the tokens in the loss"),
    Metric("train/max_staleness", "updates", "largest age of a token in the loss"),
    Metric(
        "train/fresh_logp_diff",
        "nats",
        "largest distance of trainer and sampler among tokens of age 0",
        "As train/max_logp_diff.",
    ),
    Metric("train/flops", "FLOP", "of the update, on all devices"),
    Metric("mfu", "share", "of the devices' peak, during the update"),
    # data and evaluation
    Metric("data/rows", "rows", "read so far, over all processes"),
    Metric("data/skipped", "rows", "left out so far", "Grows: data/{source}/... says why."),
    Metric("data/{source}/rows", "rows", "of this source used so far"),
    Metric("data/{source}/tokens", "tokens", "in them"),
    Metric(
        "data/{source}/cut",
        "rows",
        "of these, cut to batch.length after a turn",
        "Many: raise batch.length.",
    ),
    Metric(
        "data/{source}/long",
        "rows",
        "left out because they are longer than batch.length",
        "Many: raise batch.length, or data.long=cut.",
    ),
    Metric("data/{source}/empty", "rows", "left out because nothing in them is learned"),
    Metric("data/{source}/bad", "rows", "left out because they are malformed"),
    Metric("data/{source}/skipped", "rows", "left out, for whatever reason"),
    Metric(
        "eval/loss",
        "nats a token",
        "on held-out rows",
        "Rises while train/loss falls: it overfits; stop earlier, fewer passes over the data.",
    ),
    Metric("eval/tokens", "tokens", "that it is over"),
    Metric(
        "dev/em",
        "share",
        "of the tasks of `dev`, those that greedy rollouts got right",
        "Falls while reward/mean rises: the reward is exploited, or the tasks are memorised.",
    ),
    Metric("dev/reward/{reward}", "reward", "its mean over those rollouts that have it"),
    # time
    Metric("time/total", "s", "of the step by the clock"),
    Metric(
        "time/{stage}",
        "s",
        "in this stage; with a slash, in a part of one",
        "Parts of concurrent rollouts are added up. time/rollout/tools large: slow tools.",
    ),
)

_PATTERNS = [
    (re.compile(re.sub(r"\\\{\w+\\\}", "[^ ]+", re.escape(metric.name))), metric)
    for metric in METRICS
]


def declared(name: str) -> Metric | None:
    """What is declared of a metric; None for one that is not. One of its very name is preferred to
    a family."""
    found = [metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)]
    return min(found, key=lambda metric: metric.name.count("{"), default=None)


def text(columns: int = 100) -> str:
    """All metrics for a terminal of so many columns."""
    lines = []
    for metric in METRICS:
        unit = f" ({metric.unit})" if metric.unit else ""
        for line, indent in (
            (f"{metric.name}{unit}: {metric.meaning}", 0),
            (metric.advice, 6),
        ):
            lines += textwrap.wrap(
                line,
                columns,
                initial_indent=" " * indent,
                subsequent_indent=" " * max(indent, 4),
                break_on_hyphens=False,
            )
    return "\n".join(lines)


TITLE = """# Metrics

Every number in a row of `metrics.jsonl`; a part in braces stands for any. `jaxdeep view
--help=metrics` prints them. Written by `python -m jaxdeep.metrics > jaxdeep/rl/METRICS.md`.

| metric | unit | meaning | what to do when it looks wrong |
|---|---|---|---|
"""


def markdown() -> str:
    """All metrics as a page."""
    rows = (f"| `{m.name}` | {m.unit} | {m.meaning} | {m.advice} |\n" for m in METRICS)
    return TITLE + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(markdown())
