"""Runs as pages to look at: curves, and every rollout of every step, token by token.

    build([run, other], out)      out/index.html, without a server, a network or a library

The page and its script come with the package and hold no text of a run. What a run says lies beside them
in scripts that are loaded when they are wanted, `view(KEY, JSON)`, since pages opened from a disk may load
nothing else; the script on the page makes text nodes of it and never markup.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdeep.agent import record
from jaxdeep.chat.families import chat_format, family_of
from jaxdeep.chat.tokenizer import FILE, Tokenizer
from jaxdeep.console import progress
from jaxdeep.errors import DataError
from jaxdeep.metrics import read_metrics
from jaxdeep.types import Message, ToolCall, Trajectory
from jaxdeep.workdir import write_atomic

PAGE = Path(__file__).parent / "page"
FORMAT = 1  # of the scripts: those of another one are made again
CHUNK = 2**16  # tokens in a script, about a megabyte
LABEL = 200  # characters of what is folded that are shown
BROKEN = "\ufffd"  # what is decoded from part of a character


class Record(NamedTuple):
    """Rollouts that belong together: `key` is the folder of their scripts, `step` a number or None for an
    evaluation, `path` and `gaps` their files."""

    key: str
    step: int | None
    path: Path
    gaps: Path


def build(runs: Sequence[Path], out: Path, steps: range | None = None) -> Path:
    """Writes the pages of one run, or of two side by side, for all steps or those in `steps`; the path of
    the first page."""
    for run in runs:
        if not _is_run(run):
            inside = [str(path) for path in sorted(run.glob("*")) if _is_run(path)]
            there = f"; there are {', '.join(inside)}" if inside else ""
            raise DataError(
                f"{run} holds no run, neither metrics.jsonl nor rollouts/ nor eval.jsonl{there}"
            )
    out.mkdir(parents=True, exist_ok=True)
    for path in PAGE.iterdir():
        shutil.copyfile(path, out / path.name)
    for index, run in enumerate(runs):
        _run(run, out, str(index), steps)
    write(out, "runs", len(runs))
    return out / "index.html"


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or bool(records(path))


def records(run: Path) -> list[Record]:
    """The records of a run, in order."""
    steps = sorted(p for p in run.glob("rollouts/*.jsonl") if p.stem.isdigit())
    found = [Record(p.stem, int(p.stem), p, run / "gaps" / f"{p.stem}.npy") for p in steps]
    path = run / "eval.jsonl"
    return [Record("eval", None, path, run / "gaps.npy"), *found] if path.exists() else found


def write(out: Path, key: str, payload: Any) -> None:
    """The script `key`.js, plain ASCII without a `<`: nothing in it can end it."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    path = out / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'view("{key}",{text})\n', encoding="ascii")


def _run(run: Path, out: Path, index: str, steps: range | None) -> None:
    found = [r for r in records(run) if steps is None or r.step is None or r.step in steps]
    tokenizer = _tokenizer(run) if found else None
    words = [tokenizer.decode([id]) for id in range(tokenizer.size)] if tokenizer else []
    shown = []
    for each in progress(found, f"view {run.name}", "record"):
        folder, stamp = out / index / each.key, _stamp(run, each)
        ready = (
            folder / "ready.json"
        )  # what the scripts beside it were made from, once they are whole
        about = json.loads(ready.read_text()) if ready.exists() else {}
        if about.get("stamp") != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            about = _record(each, out, f"{index}/{each.key}", tokenizer, words)
            write_atomic(ready, json.dumps(about | {"stamp": stamp}))
        about.pop("stamp", None)
        shown.append({"key": each.key, "step": each.step} | about)
    config = run / "config.json"
    about = {
        "name": run.resolve().name,
        "path": str(run),
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
        "metrics": _columns(run / "metrics.jsonl"),
        "records": shown,
    }
    write(out, f"{index}/vocabulary", words)
    write(out, f"{index}/run", about)


def _stamp(run: Path, found: Record) -> list[Any]:
    """What a record was made from."""
    stats = [path.stat() for path in (found.path, found.gaps) if path.exists()]
    return [FORMAT, str(run.resolve()), *([s.st_mtime_ns, s.st_size] for s in stats)]


def _tokenizer(run: Path) -> Tokenizer:
    path = run / FILE
    if not path.exists():
        raise DataError(f"{path} is absent: put the {FILE} of the run's model there")
    return Tokenizer.load(path)


def _columns(path: Path) -> dict[str, Any]:
    """The numbers of the metrics by name, None where a row has none."""
    rows = read_metrics(path) if path.exists() else []
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names if name != "step"}
    numbers = {
        name: values
        for name, values in columns.items()
        if any(isinstance(v, (int, float)) for v in values)
        and all(v is None or isinstance(v, (int, float)) for v in values)
    }
    return {"steps": [row["step"] for row in rows], "values": numbers}


def _record(
    found: Record, out: Path, key: str, tokenizer: Tokenizer, words: Sequence[str]
) -> dict[str, Any]:
    """Writes the scripts of a record; what the run says of it."""
    tasks: dict[str, dict[str, Any]] = {}
    reader = Reader(tokenizer, words)
    chunk: list[dict[str, Any]] = []
    number = size = count = 0
    rewards = []
    for trajectory, gap in record.with_gaps(record.stream(found.path), found.gaps):
        told = _told(trajectory) | {"chunk": number, "place": len(chunk), "id": count}
        task = trajectory.task
        about = {"task": task.id, "question": task.question, "answers": list(task.answers)}
        tasks.setdefault(task.id, about | {"rollouts": []})["rollouts"].append(told)
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


def _told(trajectory: Trajectory) -> dict[str, Any]:
    """All of a rollout but its tokens."""
    said = [m for m in trajectory.messages if m.role == "assistant"]
    return {
        "reward": trajectory.reward,
        "rewards": trajectory.rewards,
        "advantage": trajectory.advantage,
        "stop": trajectory.stop.value,
        "truncated": trajectory.stop.truncated,
        "failure": trajectory.failure,
        "metrics": trajectory.metrics,
        "said": said[-1].content.strip()[:LABEL] if said else "",
        "tokens": len(trajectory.tokens),
        "sampled": trajectory.sampled,
        "seed": trajectory.seed,
        "policy": " to ".join(f"version {n}" for n in dict.fromkeys(_versions(trajectory))),
    }


def _versions(trajectory: Trajectory) -> list[int]:
    """Of the policies of its first turn and of its last: how many updates had made them."""
    found = [piece.version for piece in trajectory.pieces if piece.author == "policy"]
    return [found[0], found[-1]] if found else []


class Reader:
    """Tokens as the page shows them."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        # "none": what is only read is not changed by who writes the block of reasoning
        self.chat = chat_format(family_of(tokenizer), tokenizer, "none")
        self.broken = {id for id, word in enumerate(words) if BROKEN in word}

    def tokens(self, trajectory: Trajectory, gap: np.ndarray | None) -> dict[str, Any]:
        """`ids` in order; `parts`, runs of them that are shown as one, each [end, sampled or not, kind,
        label], where the first of a turn says the version of its policy if the turns differ; of the sampled ones `logps` in thousandths and `gaps` in millionths of a nat; `texts`, by
        position, where a character is made of several tokens."""
        said = [p for p in trajectory.pieces if p.author == "policy"]
        logps = [logp for p in said for logp in p.logps or [0.0] * len(p.tokens)]
        ids = trajectory.tokens
        return {
            "ids": ids,
            "parts": list(self._parts(trajectory)),
            "logps": [_whole(1e3 * logp) for logp in logps],
            "gaps": None if gap is None else [_whole(x) for x in (1e6 * gap).tolist()],
            "texts": self._texts(ids),
        }

    def _parts(self, trajectory: Trajectory) -> Iterator[tuple[int, int, str, str]]:
        calls = (call for m in trajectory.messages for call in m.calls)
        results = (m for m in trajectory.messages if m.role == "tool")
        end, several = 0, len(set(_versions(trajectory))) > 1
        for piece in trajectory.pieces:
            sampled = piece.author == "policy"
            for at, (tokens, kind) in enumerate(self.chat.spans(piece.tokens, piece.author)):
                end += len(tokens)
                label = f"version {piece.version}" if sampled and several and not at else ""
                if kind == "call":
                    label = f"{_call(next(calls, ToolCall('')))} {label}".rstrip()
                elif kind == "result":
                    label = _result(next(results, Message("tool")))
                yield end, int(sampled), kind, label

    def _texts(self, ids: Sequence[int]) -> dict[int, str]:
        """The text of characters that several tokens make together, at the first of them."""
        found: dict[int, str] = {}
        for at, id in enumerate(ids):
            if id not in self.broken:
                continue
            for start in range(at - 1, max(at - 4, -1), -1):  # a character is four tokens at most
                if start in found or ids[start] not in self.broken:
                    break
                text = self.tokenizer.decode(ids[start : at + 1])
                if BROKEN not in text:
                    found |= dict.fromkeys(range(start, at + 1), "") | {start: text}
                    break
        return found


def _whole(value: float) -> int:
    """A number as JSON holds it in few characters; what is no number, or endless, at the edge."""
    return round(max(min(value, 1e9), -1e9)) if not math.isnan(value) else 0


def _call(call: ToolCall) -> str:
    if call.error:
        return f"{call.name}: {call.error}"[:LABEL]
    values = (f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items())
    return f"{call.name}({', '.join(values)})"[:LABEL]


def _result(message: Message) -> str:
    return f"{message.name}: {' '.join(message.content[:LABEL].split())}"
