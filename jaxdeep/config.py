"""Configurations: from a Python file and overrides to frozen dataclasses.

A file defines `get_config()`, or `get_config(arg)` for `path.py:arg`, which returns a `ConfigDict`.
The command line changes single values (`--config.train.steps=20`). `build` turns a section into the
frozen dataclass that the code reads (jaxdeep.settings), and `save` records what was run. A
configuration that cannot be run is refused with the key, the value and what was expected.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shlex
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from jaxdeep import __version__
from jaxdeep.errors import ConfigError
from jaxdeep.settings import build as build
from jaxdeep.settings import convert
from jaxdeep.settings import suggest as suggest
from jaxdeep.workdir import Workdir, write_atomic

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
# the configurations that come with the package: inside it where it is installed, beside it in a
# checkout
SHIPPED = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else ROOT / "configs"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
# sections that need not be in a file to be set on the command line
OPTIONAL = ("dev", "env", "guard", "log", "profile", "sft")

# Errors of a configuration file's own code, to be reported with its line. Errors of this package
# that the file raises are none of these, and pass through.
FILE_ERRORS = (
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


# From a file and the command line to a ConfigDict.


def load(
    path: str,
    overrides: Iterable[str] = (),
    on_change: Mapping[str, Callable[[ConfigDict, str], None]] = MappingProxyType({}),
) -> ConfigDict:
    """The locked configuration of `path.py` or `path.py:arg`, with each override
    "--config.a.b=value" applied in the type of the present value. Where there is no such file in
    the current folder, it is one that comes with the package, as "configs/search/grpo.py",
    "search/grpo", or "grpo" where no other has that name. ConfigError if the file or an override
    cannot be used. `on_change` has, by the last part of a key, a function of the section and the
    key that is called before an override changes this value, such as for `env.taskset`."""
    name, colon, arg = path.partition(":")
    config = _run(_find(name), arg if colon else None)
    config.lock()
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if not equals or key == override:
            raise ConfigError(f"{override!r} is not of the form --config.key=value")
        parents, _, last = key.rpartition(".")
        section = _section(config, parents)
        if last in on_change and section is not None and section.get(last) != text:
            with section.unlocked():
                on_change[last](section, text)
        _override(config, key, text)
    return config


def _section(config: ConfigDict, key: str) -> ConfigDict | None:
    """The section with this dotted key; None if there is none."""
    section: Any = config
    for name in filter(None, key.split(".")):
        section = section.get(name) if isinstance(section, ConfigDict) else None
    return section if isinstance(section, ConfigDict) else None


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in shipped()}
    short = name.removeprefix("configs/").removesuffix(".py")
    found = [known[full] for full in known if short in (full, full.rpartition("/")[2])]
    if len(found) == 1:
        return found[0]
    names = sorted(known)
    if found:
        several = [full for full in names if full.endswith(f"/{short}")]
        raise ConfigError(f"--config={name} could be {' or '.join(several)}: say which")
    raise ConfigError(
        f"--config={name} does not exist; with the package come {', '.join(names)}.{suggest(short, names)}"
    )


def shipped() -> list[Path]:
    """The configurations that come with the package."""
    return sorted(SHIPPED.rglob("*.py"))


def _run(path: Path, arg: str | None) -> ConfigDict:
    module = types.ModuleType(f"jaxdeep_config_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass of the file looks its module up
    try:
        # without this module's own `from __future__ import annotations`
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError(f"{path} defines no get_config()")
        config = get_config() if arg is None else get_config(arg)
    except FILE_ERRORS as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        location = f"{path}:{lines[-1]}" if lines else f"{path}"
        raise ConfigError(f"{location}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() gave a {type(config).__name__}, not a ConfigDict")
    return config


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of all sections, by their dotted key."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _override(config: ConfigDict, key: str, text: str) -> None:
    """Set one value.

    The file need not have the key, or the section inside a section that it is in: they may be left
    at their defaults there. `build` refuses such a key if no dataclass has it. A top-level section
    that the file does not have is refused here.
    """
    leaves = _flatten(config)
    *parents, last = key.split(".")
    section: Any = config
    for depth, parent in enumerate(parents):
        absent = isinstance(section, ConfigDict) and section.get(parent) is None
        if absent and (depth or parent in OPTIONAL):
            with section.unlocked():
                section[parent] = ConfigDict()
        section = section.get(parent) if isinstance(section, ConfigDict) else None
    keys = [leaf for leaf in leaves if leaf.startswith(key + ".")]
    if keys:
        raise ConfigError(f"--config.{key} is a section; set one of {', '.join(keys)}")
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
    """The value that a text stands for, in the expected type; "None" is None in every type."""
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
    """The elements of "(1, 2)", "1,2" or "a,b", in the type of the present elements if they share
    one."""
    value = _literal(text)
    if isinstance(value, str):
        value = [element.strip() for element in value.split(",") if element.strip()]
    elif not isinstance(value, (tuple, list)):
        value = [value]
    kinds = {type(element) for element in present}
    if len(kinds) != 1:
        return list(value)
    (kind,) = kinds
    return [convert(element, kind, text) for element in value]


def _literal(text: str) -> Any:
    """The Python literal, or the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# What was run.


def save(config: ConfigDict, workdir: Path, argv: Sequence[str]) -> dict[str, Any]:
    """Write `workdir/config.json` and return its content: the resolved configuration, the command,
    the commit and the versions."""
    record = {
        "config": config.copy_and_resolve_references().to_dict(),
        "command": shlex.join(argv),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0], "jaxdeep": __version__} | _versions(),
    }
    text = json.dumps(record, indent=2, default=str)
    write_atomic(Workdir(workdir).config, text + "\n")
    return json.loads(text)


def _commit() -> str:
    """The commit of the checkout, with "-dirty" if files differ from it; "unknown" without a
    checkout."""
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
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
