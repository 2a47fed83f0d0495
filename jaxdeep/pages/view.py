"""Runs as pages to look at: curves, and every rollout of every step, token by token.

    build([run, other], out)      out/index.html, without a server, a network or a library

The page and its script come with the package and hold no text of a run. The data of a run lie
beside them, in scripts that are loaded when they are wanted and consist of one call `view(KEY,
JSON)`: a page opened from a disk may load scripts and nothing else. The page turns that data into
text nodes, never into markup, so nothing a model or a web page wrote can run.

    runs.js             how many runs
    0/run.js            names, metrics, which records there are and their tasks
    0/vocabulary.js     the text of every token, once
    0/000012/index.js   a record: its rollouts by task, all but their tokens
    0/000012/3.js       the tokens of some of them

A record that has not changed is not made again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdeep.agent import record
from jaxdeep.chat.families import chat_format, family_of
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.console import progress
from jaxdeep.errors import DataError
from jaxdeep.metrics import declared, read_metrics
from jaxdeep.types import ToolCall, Trajectory
from jaxdeep.workdir import Workdir, write_atomic

PAGE = Path(__file__).parent / "page"
FORMAT = 2  # of the scripts: those of another format are made again
CHUNK = 2**16  # tokens in a script, about a megabyte
LABEL = 200  # characters that a folded part shows of what is in it
LAST = 10**9  # a step that no run reaches
BROKEN = "\ufffd"  # what part of a character decodes to


class Record(NamedTuple):
    """A file of rollouts, of one step or of an evaluation (`step` is None). `key` is the folder of
    its scripts; `path` and `gaps` are its files, of which `gaps` may be absent."""

    key: str
    step: int | None
    path: Path
    gaps: Path


def build(runs: Sequence[Path], out: Path, steps: range | None = None) -> Path:
    """Write the pages of one run, or of two side by side, for all steps or those in `steps`.
    Returns the path of the first page. DataError for a folder that is not a run's, or has nothing
    to show: no rollouts of these steps, or neither rollouts nor metrics yet."""
    for run in runs:
        if not _is_run(run):
            inside = [str(path) for path in sorted(run.glob("*")) if _is_run(path)]
            hint = f"; there are {', '.join(inside)}" if inside else ""
            raise DataError(
                f"{run} holds no run, neither metrics.jsonl nor rollouts/ nor eval.jsonl{hint}"
            )
        _refuse_empty(run, steps)
    out.mkdir(parents=True, exist_ok=True)
    for path in PAGE.iterdir():
        shutil.copyfile(path, out / path.name)
    for index, run in enumerate(runs):
        _run(run, out, str(index), steps)
    write(out, "runs", len(runs))
    return out / "index.html"


def _is_run(path: Path) -> bool:
    return Workdir(path).metrics.exists() or bool(records(path))


def _refuse_empty(run: Path, steps: range | None) -> None:
    """DataError where the pages would show nothing of a run."""
    known = Workdir(run).rollout_steps()
    if steps is not None and not any(step in steps for step in known):
        there = f"there are {spans(known)}" if known else "it has no rollouts of steps at all"
        raise DataError(f"{run} has no rollouts of steps {asked_for(steps)}: {there}")
    if not records(run) and not read_metrics(Workdir(run).metrics):
        raise DataError(f"{run} has nothing to show yet: it has not finished a step")


def asked_for(steps: range) -> str:
    """Steps as they were asked for, where the last may be without an end."""
    return f"{steps.start} on" if steps.stop > LAST else f"{steps.start} to {steps.stop - 1}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: "1 to 40, 50, 60 to 80"."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ends)


def records(run: Path) -> list[Record]:
    """The records of a run: its evaluation first, then its steps in order."""
    workdir = Workdir(run)
    records = [
        Record(f"{step:06d}", step, workdir.rollouts(step), workdir.gaps(step))
        for step in workdir.rollout_steps()
    ]
    if workdir.evaluation.exists():
        records.insert(0, Record("eval", None, workdir.evaluation, workdir.evaluation_gaps))
    return records


def write(out: Path, key: str, payload: Any) -> None:
    """Write the script `key`.js. It is ASCII without a `<`, so that no text in it can close it."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    path = out / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'view("{key}",{text})\n', encoding="ascii")


def _run(run: Path, out: Path, index: str, steps: range | None) -> None:
    chosen = [r for r in records(run) if steps is None or r.step is None or r.step in steps]
    tokenizer = _tokenizer(run) if chosen else None
    words = [tokenizer.decode([id]) for id in range(tokenizer.size)] if tokenizer else []
    summaries = []
    for each in progress(chosen, f"view {run.name}", "record"):
        folder, stamp = out / index / each.key, _stamp(run, each)
        # Written last: it says that the scripts beside it are whole, and what they were made from.
        ready = folder / "ready.json"
        about = json.loads(ready.read_text()) if ready.exists() else {}
        if about.get("stamp") != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            reader = Reader(tokenizer, words, _family(run))
            about = _record(each, out, f"{index}/{each.key}", reader)
            write_atomic(ready, json.dumps(about | {"stamp": stamp}))
        about.pop("stamp", None)
        summaries.append({"key": each.key, "step": each.step} | about)
    config = Workdir(run).config
    about = {
        "name": run.resolve().name,
        "path": str(run),
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
        "metrics": _columns(Workdir(run).metrics),
        "records": summaries,
    }
    about["meanings"] = _meanings(about["metrics"]["values"])
    write(out, f"{index}/vocabulary", words)
    write(out, f"{index}/run", about)


def _stamp(run: Path, source: Record) -> list[Any]:
    """What the scripts of a record depend on: while it stays the same, they do."""
    stats = [path.stat() for path in (source.path, source.gaps) if path.exists()]
    return [FORMAT, str(run.resolve()), *([s.st_mtime_ns, s.st_size] for s in stats)]


def _tokenizer(run: Path) -> Tokenizer:
    path = Workdir(run).tokenizer
    if not path.exists():
        raise DataError(f"{path} is absent: put the tokenizer.json of the run's model there")
    return Tokenizer.load(path)


def _family(run: Path) -> str:
    """The chat format that the run's configuration names; "" where the tokenizer tells it."""
    path = Workdir(run).config
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return about.get("config", {}).get("model", {}).get("chat", "")


def _columns(path: Path) -> dict[str, Any]:
    """The metrics that are numbers, as columns by name; None where a row has none."""
    rows = read_metrics(path) if path.exists() else []
    # in the order of the last row: the first may be of an evaluation before training alone
    names = dict.fromkeys(name for row in (*rows[-1:], *rows) for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names if name != "step"}
    numbers = {
        name: values
        for name, values in columns.items()
        if any(isinstance(v, (int, float)) for v in values)
        and all(v is None or isinstance(v, (int, float)) for v in values)
    }
    return {"steps": [row["step"] for row in rows], "values": numbers}


def _meanings(names: Iterable[str]) -> dict[str, list[str]]:
    """Unit, meaning and advice of the metrics that are declared, by name."""
    found = {name: declared(name) for name in names}
    return {name: [m.unit, m.meaning, m.advice] for name, m in found.items() if m}


def _record(source: Record, out: Path, key: str, reader: Reader) -> dict[str, Any]:
    """Write the scripts of a record. Returns what `run.js` says of it."""
    tasks: dict[str, dict[str, Any]] = {}
    chunk: list[dict[str, Any]] = []
    number = size = count = 0
    rewards = []
    for trajectory, gap in record.with_gaps(record.stream(source.path), source.gaps):
        facts = _facts(trajectory) | {"chunk": number, "place": len(chunk), "id": count}
        task = trajectory.task
        about = {"task": task.id, "question": task.question, "answers": list(task.answers)}
        tasks.setdefault(task.id, about | {"rollouts": []})["rollouts"].append(facts)
        chunk.append(reader.tokens(trajectory, gap))
        rewards += [] if trajectory.reward is None else [trajectory.reward]
        size, count = size + len(trajectory.tokens), count + 1
        if size >= CHUNK:
            write(out, f"{key}/{number}", chunk)
            chunk, size, number = [], 0, number + 1
    if chunk:
        write(out, f"{key}/{number}", chunk)
    write(out, f"{key}/index", list(tasks.values()))
    reward = sum(rewards) / len(rewards) if rewards else None
    return {"count": count, "reward": reward, "tasks": list(tasks)}


def _facts(trajectory: Trajectory) -> dict[str, Any]:
    """What the page says of a rollout, all but its tokens."""
    turns = [m for m in trajectory.messages if m.role == "assistant"]
    return {
        "reward": trajectory.reward,
        "rewards": trajectory.rewards,
        "advantage": trajectory.advantage,
        "stop": trajectory.stop.value,
        "truncated": trajectory.stop.truncated,
        "failure": trajectory.failure,
        "metrics": trajectory.metrics,
        "said": turns[-1].content.strip()[:LABEL] if turns else "",
        "tokens": len(trajectory.tokens),
        "sampled": trajectory.sampled,
        "seed": trajectory.seed,
        "policy": " to ".join(f"version {n}" for n in dict.fromkeys(_versions(trajectory))),
    }


def _versions(trajectory: Trajectory) -> list[int]:
    """The versions of the policies that sampled the first turn and the last; none without a
    turn."""
    versions = [piece.version for piece in trajectory.pieces if piece.author == "policy"]
    return [versions[0], versions[-1]] if versions else []


class Reader:
    """Makes of tokens what the page shows."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], family: str = "") -> None:
        self.tokenizer = tokenizer
        # "none": what is only read is not changed by who writes the block of reasoning
        self.chat = chat_format(family or family_of(tokenizer), tokenizer, "none")
        self.broken = {id for id, word in enumerate(words) if BROKEN in word}

    def tokens(self, trajectory: Trajectory, gap: np.ndarray | None) -> dict[str, Any]:
        """The tokens of a rollout, its branches one after the other.

        ids     in order
        parts   runs of tokens that are shown as one: [end, sampled (1 or 0), kind, label]. An empty
                run of the kind "branch" stands before each branch where there are several. A label
                says the version of the policy at the begin of a turn, where turns differ in it
        logps   of the sampled tokens, in thousandths of a nat
        gaps    of the sampled tokens, in millionths of a nat, or None
        texts   by position, where one character is made of several tokens
        """
        pieces = [p for p in trajectory.pieces if p.author == "policy"]
        logps = [logp for p in pieces for logp in p.logps or [0.0] * len(p.tokens)]
        texts: dict[int, str] = {}
        start = 0
        for branch in trajectory.branches:
            ids = branch.tokens
            texts |= {start + at: text for at, text in self._texts(ids).items()}
            start += len(ids)
        return {
            "ids": trajectory.tokens,
            "parts": list(self._parts(trajectory)),
            "logps": [_whole(1e3 * logp) for logp in logps],
            "gaps": None if gap is None else [_whole(x) for x in (1e6 * gap).tolist()],
            "texts": texts,
        }

    def _parts(self, trajectory: Trajectory) -> Iterator[tuple[int, int, str, str]]:
        # Calls are the policy's: the branches together have each once, in order. Results are not:
        # a branch may repeat or drop them, so a result is recognised by its text.
        calls = (call for m in trajectory.messages for call in m.calls)
        tools: dict[str, list[str]] = {}
        for message in trajectory.messages:
            if message.role == "tool":
                tools.setdefault(message.content.strip(), []).append(message.name)
        branches = trajectory.branches
        end, several = 0, len(set(_versions(trajectory))) > 1
        for number, branch in enumerate(branches, 1):
            if len(branches) > 1:
                yield end, 0, "branch", f"branch {number} of {len(branches)}"
            for piece in branch.pieces:
                sampled = piece.author == "policy"
                for at, (tokens, kind) in enumerate(self.chat.spans(piece.tokens, piece.author)):
                    end += len(tokens)
                    label = f"version {piece.version}" if sampled and several and not at else ""
                    if kind == "call":
                        label = f"{_call(next(calls, ToolCall('')))} {label}".rstrip()
                    elif kind == "result":
                        label = self._result(tokens, tools)
                    yield end, int(sampled), kind, label

    def _result(self, tokens: Sequence[int], tools: Mapping[str, list[str]]) -> str:
        """The label of a tool's result: the name of the tool, where it is known, and how the text
        begins. `tools` are the names that remain for each text, of which this takes the first."""
        marks = self.tokenizer.control
        content = self.tokenizer.decode([id for id in tokens if id not in marks]).strip()
        names = tools.get(content, [""])
        name = names.pop(0) if len(names) > 1 else names[0]
        return ": ".join(filter(None, (name, " ".join(content[:LABEL].split()))))

    def _texts(self, ids: Sequence[int]) -> dict[int, str]:
        """The text of each character that several tokens make together, at the first of them; the
        others get an empty text."""
        texts: dict[int, str] = {}
        for at, id in enumerate(ids):
            if id not in self.broken:
                continue
            # A character has at most four tokens: UTF-8 has at most four bytes for it.
            for start in range(at - 1, max(at - 4, -1), -1):
                if start in texts or ids[start] not in self.broken:
                    break
                text = self.tokenizer.decode(ids[start : at + 1])
                if BROKEN not in text:
                    texts |= dict.fromkeys(range(start, at + 1), "") | {start: text}
                    break
        return texts


def _whole(value: float) -> int:
    """A number rounded, which takes few characters. JSON has no NaN and no infinity: they become 0
    and the largest number."""
    return round(max(min(value, 1e9), -1e9)) if not math.isnan(value) else 0


def _call(call: ToolCall) -> str:
    if call.error:
        return f"{call.name}: {call.error}"[:LABEL]
    values = (f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items())
    return f"{call.name}({', '.join(values)})"[:LABEL]
