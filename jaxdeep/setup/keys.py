"""Every key of a configuration with its default, type, bounds and meaning, read from the code.

    keys_of({"": (GrpoRun,)})      the sections of a verb, and the settings in each
    text(...), markdown(...)       the same for a terminal of 100 columns, and as a page

`python -m jaxdeep.setup.keys > configs/KEYS.md` writes the page."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdeep import settings
from jaxdeep.errors import ConfigError
from jaxdeep.setup import runs, tasksets

COLUMNS = 100
LONGEST_DEFAULT = 44  # characters
TITLE = """# Keys

Every setting of every section: `--config.KEY=VALUE` sets one. `jaxdeep VERB --help=config` prints
those of a verb, `--help=config.optim` those of a section, and with `--config=FILE.py` the file's
values. Written by `python -m jaxdeep.setup.keys > configs/KEYS.md`.
"""


class Key(NamedTuple):
    """One setting. `default` is '' where it must be set; `here` is the value that a configuration
    gives it, '' where none does."""

    key: str
    default: str
    kind: str
    meaning: str
    here: str = ""


class Section(NamedTuple):
    """A section: its key, what it is about, and the settings in it, those of sections inside it
    left out."""

    key: str
    meaning: str
    keys: tuple[Key, ...]


def keys_of(
    classes: Mapping[str, Iterable[str]], config: ConfigDict | None = None
) -> list[Section]:
    """The sections of the runs that are named in `classes`, by the key that each run is under ('':
    the configuration itself is one). With a configuration, also the values that it has, and of the
    task sets only those that it names."""
    out: dict[str, Section] = {}
    for prefix, names in classes.items():
        here = config if config is None or not prefix else config.get(prefix)
        for name in names:
            run = getattr(runs, name)
            if run is tasksets.EnvConfig:
                found = _of_env(prefix, here)
            else:
                found = _of_run(run, f"{prefix}." if prefix else "", here)
            for section in found:
                known = out.setdefault(section.key, section)
                names = {key.key for key in known.keys}
                more = tuple(key for key in section.keys if key.key not in names)
                out[section.key] = known._replace(keys=known.keys + more)
    return list(out.values())


def _of_run(run: type, prefix: str, config: Any) -> list[Section]:
    out: list[Section] = []
    described = ""  # the key of the first task set
    for name, hint in typing.get_type_hints(run).items():
        cls = settings.nested(hint)
        here = config.get(name) if config is not None else None
        key = f"{prefix}{name}"
        if cls is not tasksets.EnvConfig:
            out += _of_class(cls, key, here)
        elif described and here is None:
            out.append(Section(key, f"Another task set, with the keys of {described}.", ()))
        else:
            out += _of_env(key, here)
            described = key
    return out


def _of_env(key: str, config: Any) -> list[Section]:
    """The shared keys of a task set, then its own: of all that ship, or of the one that is
    named."""
    (shared, *inside) = _of_class(tasksets.SharedSettings, key, config)
    named = [config.get("taskset", "search")] if config is not None else tasksets.BUILT_IN
    for name in named:
        cls = tasksets.settings_class(name, f"{key}.taskset")
        own, *more = _of_class(cls, key, config)
        inside += [own._replace(key=f"{key} with {key}.taskset={name}"), *more]
    return [shared, *inside]


def _of_class(cls: type, key: str, config: Any) -> list[Section]:
    keys, inside = [], []
    for setting in settings.describe(cls):
        name = f"{key}.{setting.name}"
        value = config.get(setting.name) if config is not None else None
        given = config is not None and setting.name in config
        deeper = settings.nested(setting.kind)
        if deeper and settings.type_text(setting.kind).startswith(deeper.__name__):
            inside += _of_class(deeper, name, value if given else None)
        else:
            keys.append(_key(setting, name, _said(value) if given else ""))
    doc = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return [Section(key, doc, tuple(keys)), *inside]


def _key(setting: settings.Setting, name: str, here: str) -> Key:
    required = setting.default is dataclasses.MISSING
    kind = ", ".join(filter(None, (settings.type_text(setting.kind), setting.bounds)))
    return Key(name, "" if required else _said(setting.default), kind, setting.meaning, here)


def _said(value: Any) -> str:
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    text = repr(value).replace("\\n", " ")
    return text if len(text) <= LONGEST_DEFAULT else f"{text[: LONGEST_DEFAULT - 3]}..."


def chosen(sections: Sequence[Section], part: str) -> list[Section]:
    """The sections at a key or inside it, or the one setting that it names; ConfigError for any
    other."""
    under = (part, f"{part}.", f"{part} ")
    found = [s for s in sections if s.key == part or s.key.startswith(under[1:])]
    if not found:
        found = [
            section._replace(keys=keys)
            for section in sections
            if (keys := tuple(key for key in section.keys if key.key == part))
        ]
    if not found:
        names = [s.key for s in sections] + [key.key for s in sections for key in s.keys]
        raise ConfigError(f"--help=config.{part}: no such key.{settings.suggest(part, names)}")
    return found


def text(sections: Sequence[Section]) -> str:
    """The sections for a terminal: a line of key, value and type, and what it means below."""
    lines: list[str] = []
    for section in sections:
        lines += ["", *_wrapped(f"{section.key}: {section.meaning}", "", "  ")]
        for key in section.keys:
            value = f"= {key.here or key.default}" if key.here or key.default else "must be set"
            default = f" (default {key.default or 'none'})" if key.here else ""
            if key.here == key.default:
                default = ""
            lines += _wrapped(f"{key.key} {value}{default}    {key.kind}", "  ", " " * 10)
            lines += _wrapped(key.meaning, " " * 6, " " * 6) if key.meaning else []
    return "\n".join(lines[1:])


def _wrapped(line: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        line, COLUMNS, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def markdown(sections: Sequence[Section]) -> str:
    """The sections as a page, one table each."""
    parts = [TITLE]
    for section in sections:
        parts.append(f"## {section.key}\n\n{_cell(section.meaning)}\n")
        if section.keys:
            rows = [
                f"| `{k.key}` | {_code(k.default) or 'must be set'} | {_cell(k.kind)} | {_cell(k.meaning)} |"
                for k in section.keys
            ]
            parts.append(
                "\n".join(["| key | default | type | meaning |", "|---|---|---|---|", *rows, ""])
            )
    return "\n".join(parts)


def _code(said: str) -> str:
    return said and f"`{said.replace('|', chr(92) + '|')}`"


def _cell(said: str) -> str:
    return said.replace("|", "\\|").replace("<", "&lt;")


EVERYTHING = {"": ("SftRun", "GrpoRun", "EvalRun")}

if __name__ == "__main__":
    sys.stdout.write(markdown(keys_of(EVERYTHING)))
