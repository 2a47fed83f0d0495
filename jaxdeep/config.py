"""Configurations: a Python file and overrides come in, frozen dataclasses go out.

A file defines `get_config()`, or `get_config(arg)` for `path.py:arg`, and returns a `ConfigDict`.
The command line changes single values of it (`--config.train.steps=20`). `build` turns a section into
the frozen dataclass that the code reads, and `save` writes down what was run. Whatever cannot be run is
refused here, with the key, the value and what was expected.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import importlib.metadata
import json
import shlex
import subprocess
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from jaxdeep import __version__
from jaxdeep.errors import ConfigError
from jaxdeep.workdir import write_atomic

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
SECTIONS = (Mapping, ConfigDict)
OPTIONAL = ("log", "profile")  # sections that a file may leave out, set from the command line

# What running a mistaken file raises; an error of ours passes through as it is.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def suggest(name: str, names: Iterable[str]) -> str:
    """' Did you mean "..."?' with the closest of `names`, or nothing. A dotted name that has the same
    last part counts as close."""
    names = list(names)
    last = name.rpartition(".")[2]
    close = [other for other in names if other.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


# From a file and the command line to a ConfigDict.


def load(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked configuration of `path.py` or `path.py:arg`, each "--config.a.b=value" applied with the
    type of the present value. Relative paths are looked up from here, then from the repository."""
    name, colon, arg = path.partition(":")
    config = _run(_find(name), arg if colon else None)
    config.lock()
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if not equals or key == override:
            raise ConfigError(f"{override!r} is not of the form --config.key=value")
        _override(config, key, text)
    return config


def _find(name: str) -> Path:
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    known = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
    listing = "; there are " + ", ".join(known) if known else ""
    raise ConfigError(f"{name} does not exist{listing}.{suggest(name, known)}")


def _run(path: Path, arg: str | None) -> ConfigDict:
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), namespace)
        get_config = namespace.get("get_config")
        if get_config is None:
            raise ConfigError(f"{path} defines no get_config()")
        config = get_config() if arg is None else get_config(arg)
    except MISTAKES as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else f"{path}"
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() gave a {type(config).__name__}, not a ConfigDict")
    return config


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one value. A key that the file leaves at its default, alone or with the section it is in, is
    set too, and checked by `build`: it is refused here where there is no such section of the file."""
    leaves = _flatten(config)
    *parents, last = key.split(".")
    section: Any = config
    for depth, parent in enumerate(parents):
        absent = isinstance(section, ConfigDict) and section.get(parent) is None
        if absent and (depth or parent in OPTIONAL):
            with section.unlocked():
                section[parent] = ConfigDict()
        section = section.get(parent) if isinstance(section, ConfigDict) else None
    inside = [leaf for leaf in leaves if leaf.startswith(key + ".")]
    if inside:
        raise ConfigError(f"--config.{key} is a section; set one of {', '.join(inside)}")
    if not isinstance(section, ConfigDict) or not (parents or key in leaves):
        raise ConfigError(f"--config.{key} is not in the configuration.{suggest(key, leaves)}")
    if key not in leaves:
        with section.unlocked():
            section[last] = _literal(text)
        return
    expected = section.get_type(last)
    try:
        section[last] = _parse(text, expected, leaves[key])
    except (ValueError, TypeError, KeyError, ConfigError):
        raise ConfigError(
            f"--config.{key}={text}: expected {expected.__name__}, such as {leaves[key]!r}"
        ) from None


def _parse(text: str, expected: type, present: Any) -> Any:
    """The text as a value of the expected type; "None" is None for every type."""
    if text == "None":
        return None
    if expected is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if expected in (int, float, str):
        return expected(text)
    if expected in (tuple, list):
        return expected(_elements(text, present or ()))
    return _literal(text)


def _elements(text: str, present: Sequence) -> list:
    """The parts of `(1, 2)`, `1,2` or `a,b`, each of the type that the present elements share."""
    value = _literal(text)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif not isinstance(value, (tuple, list)):
        value = [value]
    kinds = {type(element) for element in present}
    if len(kinds) != 1:
        return list(value)
    (kind,) = kinds
    return [_cast(part, kind, text) for part in value]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# From a section to a frozen dataclass.


def build(cls: type[T], section: Mapping | ConfigDict, where: str = "config") -> T:
    """The dataclass `cls` made of the section, sections inside it too; lists become tuples. ConfigError on
    an unknown key, a missing one without a default, or a value of the wrong type, named `where.key`."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values = dict(section.items())
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}.{key} is not a setting.{suggest(key, fields)}")
    nothing = dataclasses.MISSING
    missing = [
        f"{where}.{name}"
        for name, field in fields.items()
        if name not in values and field.default is nothing and field.default_factory is nothing
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set")
    values = {key: _cast(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _cast(value: Any, hint: Any, where: str) -> Any:
    """The value as the annotation wants it, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (origin is typing.Literal and value in args):
        return value
    if origin is typing.Literal:
        raise ConfigError(
            f"{where} is {value!r}, none of {', '.join(map(repr, args))}.{suggest(str(value), map(str, args))}"
        )
    if origin in (typing.Union, types.UnionType):
        choices = [arg for arg in args if arg is not type(None)]
        if value is None and len(choices) < len(args):
            return None
        for choice in choices[:-1]:
            try:
                return _cast(value, choice, where)
            except ConfigError:
                continue
        return _cast(value, choices[-1], where)
    if dataclasses.is_dataclass(hint) and isinstance(value, SECTIONS):
        return build(hint, value, where)
    if (origin or hint) is tuple and isinstance(value, (tuple, list)):
        return _cast_tuple(tuple(value), args, where)
    if (origin or hint) in (dict, collections.abc.Mapping) and isinstance(value, SECTIONS):
        of = args[1] if args else Any
        return {key: _cast(element, of, f"{where}.{key}") for key, element in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # A bool is an int to Python, and never what a count or a size wants.
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = hint.__name__ if isinstance(hint, type) else hint
    raise ConfigError(f"{where} is {value!r}, a {type(value).__name__}; expected {expected}")


def _cast_tuple(value: tuple, args: tuple, where: str) -> tuple:
    if not args:
        return value
    if args[-1] is Ellipsis:
        args = args[:1] * len(value)
    if len(args) != len(value):
        raise ConfigError(f"{where} is {value!r}, of {len(value)} elements; expected {len(args)}")
    pairs = enumerate(zip(value, args, strict=True))
    return tuple(_cast(element, arg, f"{where}[{i}]") for i, (element, arg) in pairs)


# What was run.


def save(config: ConfigDict, workdir: Path, argv: Sequence[str]) -> dict[str, Any]:
    """Writes `workdir/config.json`, and returns what is in it: the resolved configuration, the command,
    the commit, the versions."""
    record = {
        "config": config.copy_and_resolve_references().to_dict(),
        "command": shlex.join(argv),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0], "jaxdeep": __version__} | _versions(),
    }
    text = json.dumps(record, indent=2, default=str)
    write_atomic(workdir / "config.json", text + "\n")
    return json.loads(text)


def _commit() -> str:
    """The commit of the checkout, "-dirty" after it where files differ, or "unknown" outside one."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
