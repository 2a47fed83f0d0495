"""From the section `data` to the rows that SFT walks over, and those it is measured on.

jsonl:FILE or pattern      a conversation a line, read when it is its turn
json:FILE or pattern       a list of conversations
hf:NAME[:SPLIT[:CONFIG]]   by `datasets`: a hub id, Parquet files or a folder, a saved set
tfds:NAME[:SPLIT]          by TFDS without TensorFlow: a name or folder, prepared as array_record
text:FILE, FOLDER or pattern   plain .txt or .md, every token learned
reading:SEED, choosing:SEED, demos:SEED   made-up worlds, without end
mazes:SEED                 mazes as env.taskset=maze describes, of its training split, without end
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated

from jaxdeep import config as configs
from jaxdeep.chat.format import ChatFormat
from jaxdeep.chat.learn import LearnConfig
from jaxdeep.console import progress, say
from jaxdeep.data import check, mix, sources
from jaxdeep.data.pack import pack
from jaxdeep.envs.toy import facts, maze, practice
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.settings import Above, AtLeast, section
from jaxdeep.setup.tasksets import EnvConfig
from jaxdeep.types import Batch

WORLDS = ("reading", "choosing", "demos", "mazes")
KINDS = {
    "jsonl": "jsonl:traces.jsonl",
    "json": "json:conversations.json",
    "hf": "hf:NAME_or_FOLDER:train",
    "tfds": "tfds:NAME_or_FOLDER:train",
    "text": "text:chapters/",
    **{kind: f"{kind}:0" for kind in WORLDS},
}
COLON = re.compile(r":(?![^\[]*\])")  # the one in train[:10%] is part of a split
VERSION = re.compile(r"(\d+|\*)(\.(\d+|\*)){2}")


@section
class SourceConfig:
    """One of several sources."""

    source: Annotated[str, "KIND:NAME, as data.source"]
    weight: Annotated[
        float | None,
        Above(0),
        "its share of the rows beside the others'; set it for all or for none: then each row comes "
        "once an epoch",
    ] = None
    cap: Annotated[int | None, AtLeast(1), "rows of it in an epoch, at most"] = None
    name: Annotated[
        str, "in metrics; empty: its key in data.sources, or what the source is called"
    ] = ""


@section
class EvalConfig:
    """The loss on held-out rows."""

    source: Annotated[str, "where they are from; empty: held out of each training source"] = ""
    rows: Annotated[int, AtLeast(1), "how many: the first ones, or so many of each source"] = 64
    every: Annotated[int, AtLeast(0), "steps between measurements; 0: at the end only"] = 0


@section
class DataConfig:
    """Where rows come from: one source, or several. All that is cut or left out is counted."""

    source: Annotated[
        str, f"KIND:NAME, such as {', '.join(KINDS.values())}; empty: see sources"
    ] = ""
    sources: Annotated[
        Mapping[str, SourceConfig] | tuple[SourceConfig, ...], "several, by name or in a tuple"
    ] = ()
    accumulate: Annotated[int, AtLeast(1), "microbatches of a step"] = 1
    learn: LearnConfig = dataclasses.field(default_factory=LearnConfig)
    long: Annotated[
        mix.LongRows,
        "rows longer than a batch, or than the model has positions: cut after the last turn that "
        "fits, or left out",
    ] = "cut"
    bad_rows: Annotated[mix.BadRows, "a malformed row stops the run, or is skipped"] = "refuse"
    check: Annotated[
        bool, "read each row once before the run begins: what is cut, left out or malformed"
    ] = True
    eval: EvalConfig | None = None

    def __post_init__(self) -> None:
        if bool(self.source) == bool(self.sources):
            raise ConfigError("set data.source or data.sources, one of them")

    @property
    def named(self) -> dict[str, SourceConfig]:
        """The sources by name."""
        if self.source:
            return {name_of(self.source): SourceConfig(self.source)}
        if isinstance(self.sources, Mapping):
            return {entry.name or name: entry for name, entry in self.sources.items()}
        out: dict[str, SourceConfig] = {}
        for entry in self.sources:
            name = entry.name or name_of(entry.source)
            if name in out:
                raise ConfigError(
                    f"data.sources has two sources of the name {name!r}, {out[name].source} and "
                    f"{entry.source}: give one another name="
                )
            out[name] = entry
        return out


def name_of(source: str) -> str:
    """What a source is called in metrics: the file without its ending, the last part of a hub id,
    or the kind where there is nothing to say."""
    kind, _, rest = source.partition(":")
    last = pathlib.PurePath(COLON.split(rest)[0]).name
    last = re.sub(r"\.(jsonl|json|txt|md|parquet|csv|arrow)(\.gz|\.zst)?$", "", last)
    return kind if kind in WORLDS else last.strip("*") or kind


def mixture(
    data: DataConfig, chat: ChatFormat, env: EnvConfig | None, *, T: int, seed: int
) -> tuple[mix.Mix, sources.Source | None]:
    """The walk to train on, and the rows to measure the loss on where `data.eval` asks for it."""
    parts, held = {}, []
    for name, entry in data.named.items():
        source = source_of(entry.source, data, chat, env, T=T)
        if data.eval and not data.eval.source:
            source, apart = mix.hold_out(source, data.eval.rows, seed)
            held.append(apart)
        parts[name] = mix.WeightedSource(source, entry.weight, entry.cap)
    if data.eval and data.eval.source:
        held = [source_of(data.eval.source, data, chat, env, T=T)]
    return mix.Mix(parts, seed), held


def source_of(
    name: str, data: DataConfig, chat: ChatFormat, env: EnvConfig | None, *, T: int
) -> sources.Source:
    """The rows that a string such as "jsonl:traces.jsonl" names; text is cut into windows of T
    tokens."""
    kind, colon, rest = name.partition(":")
    if kind not in KINDS or not rest:
        known = ", ".join(KINDS.values())
        raise ConfigError(
            f"{name!r} is not a source of data.{configs.suggest(kind, KINDS) if colon else ''} "
            f"Write its kind before a colon: {known}"
        )
    if kind == "text":
        texts = sources.Texts(rest, chat, T)
        for what, count in texts.left_out.items():
            say(f"{name}: {count} {what} left out")
        return texts
    if kind in ("jsonl", "json"):
        return sources.Conversations(
            sources.files(rest, check=data.bad_rows == "refuse"), chat, data.learn
        )
    if kind == "hf":
        place, split, config, *more = [*COLON.split(rest), "", ""]
        if any(more):
            raise ConfigError(f"{name!r} has too many parts: hf:NAME:SPLIT:CONFIG")
        rows = sources.hugging_face(place, split or "train", config)
        return sources.Conversations(rows, chat, data.learn)
    if kind == "tfds":
        place, *more = COLON.split(rest)
        if more and VERSION.fullmatch(more[0]):
            place = f"{place}:{more.pop(0)}"
        if len(more) > 1:
            raise ConfigError(f"{name!r} has too many parts: tfds:NAME:SPLIT")
        rows = sources.tensorflow_dataset(place, more[0] if more else "train")
        return sources.Conversations(rows, chat, data.learn)
    if not rest.isdigit():
        raise ConfigError(f"{name!r} needs a number after the colon: {kind}:0")
    if kind == "mazes":
        if env is None or not isinstance(env.settings, maze.Mazes):
            raise ConfigError(f"{name!r} needs env.taskset=maze, which says how large they are")
        return maze.Demos(chat, int(rest), env.settings)
    if kind != "demos":
        return practice.Reading(chat, int(rest), choosing=4 if kind == "choosing" else 1)
    if env is None or not isinstance(env.settings, facts.Facts):
        raise ConfigError(
            f"{name!r} needs env.taskset=facts: demonstrations use its tool and prompt"
        )
    return practice.Demos(chat, int(rest), k=env.settings.k, system=env.settings.system)


def measured(
    held: list[sources.Source], data: DataConfig, *, B: int, T: int, longest: int
) -> list[Batch]:
    """The held-out rows, packed. Rows too long or malformed are treated as in training, and told on
    stderr."""
    rows, tally = [], mix.Tally()
    for source in held:
        size = mix.WeightedSource(source).size
        for index in range(min(data.eval.rows, size or data.eval.rows)):
            get = functools.partial(source.__getitem__, index)
            row, outcome = mix.load_row(get, longest, data.long, data.bad_rows)
            tally = tally.count(row, outcome)
            rows += [row] if row is not None else []
    if not rows:
        raise ConfigError(
            f"no row to measure the loss on fits in {longest} tokens and has something to learn: "
            "look at data.eval"
        )
    asked, there = data.eval.rows * len(held), tally.rows + tally.skipped
    if there < asked:
        say(f"data.eval: {there} rows, data.eval.rows={data.eval.rows} asks for {asked}")
    for line in summary({"data.eval": tally}, longest):
        say(line)
    return pack(rows, B=B, T=T)


def check_rows(
    mixture: mix.Mix, data: DataConfig, longest: int, *, index: int, count: int
) -> check.Found:
    """What becomes of the rows, of which process `index` of `count` reads its part."""
    total = sum(part.size or 0 for part in mixture.parts.values())
    with progress(len(range(index, total, count)), "check", "row") as bar:
        return check.check(mixture, longest, data.long, part=index, parts=count, on_row=bar.update)


def report(found: check.Found, data: DataConfig, longest: int) -> None:
    """Tells on stderr what is cut, left out or not read. DataError where a row is malformed and may
    not be skipped, or where a source has no row to learn from."""
    for line in summary(found.tallies, longest):
        say(line)
    for name, keys in found.unread.items():
        if keys:
            said = ", ".join(f"{key} ({rows} rows)" for key, rows in sorted(keys.items()))
            say(f"{name}: keys that are not read: {said}")
    bad = sum(tally.bad for tally in found.tallies.values())
    if bad and data.bad_rows == "refuse":
        told = [error for errors in found.errors.values() for error in errors.values()]
        raise DataError(
            f"{bad} malformed rows, such as\n  " + "\n  ".join(told[: check.SHOWN]) + "\n"
            "Correct them, or leave out malformed rows with data.bad_rows=skip"
        )
    for name, tally in found.tallies.items():
        if not tally.rows:
            raise DataError(
                f"{name}: none of its {tally.skipped} rows can be learned from: raise "
                "batch.length or look at the data"
            )


def due(settings: EvalConfig, step: int, steps: int) -> bool:
    """Whether the loss is measured after `step` of `steps`."""
    return step == steps or bool(settings.every and step % settings.every == 0)


def counts(position: mix.Position) -> dict[str, int]:
    """The metrics of a position."""
    out = {"data/rows": position.read, "data/skipped": position.skipped}
    for name, tally in position.tallies.items():
        out |= {f"data/{name}/{field}": count for field, count in tally._asdict().items()}
        out[f"data/{name}/skipped"] = tally.skipped
    return out


def summary(tallies: Mapping[str, mix.Tally], longest: int) -> list[str]:
    """A line for each source of which rows were cut, left out or skipped. `longest` is the number
    of tokens that a row may have."""
    out = []
    for name, tally in tallies.items():
        said = [
            f"{count} {what}"
            for count, what in (
                (tally.long, f"longer than {longest} tokens and left out"),
                (tally.cut, f"longer than {longest} tokens and cut after a turn"),
                (tally.empty, "with nothing to learn"),
                (tally.bad, "malformed"),
            )
            if count
        ]
        if said:
            out.append(f"{name}: of {tally.rows + tally.skipped} rows {', '.join(said)}")
    return out
