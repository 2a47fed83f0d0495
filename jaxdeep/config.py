"""Configurations: from a Python file and overrides to frozen dataclasses.

A file defines `get_config()`, or `get_config(arg)` for `path.py:arg`, which returns a `ConfigDict`.
The `config.json` of a run, or the run's folder, is read as one too. The command line changes single
values (`--config.train.steps=20`). `build` turns a section into the frozen dataclass that the code
reads (jaxdeep.settings), and `save` records what was run. A configuration that cannot be run is
refused with the key, the value and what was expected.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.metadata
import json
import os
import re
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
from jaxdeep.settings import SECTIONS, convert
from jaxdeep.settings import build as build
from jaxdeep.settings import suggest as suggest
from jaxdeep.workdir import Workdir, home, write_atomic

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
# the configurations that come with the package: inside it where it is installed, beside it in a
# checkout
SHIPPED = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else ROOT / "configs"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
# sections that need not be in a file to be set on the command line
OPTIONAL = ("dev", "env", "guard", "log", "profile", "sft")
HOME = re.compile(r"^(\w+:)?(~[\w.-]*(?=/)|~$)")  # of a path, or of one after "jsonl:" and the like

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
    """The locked configuration of `path.py`, `path.py:arg`, or a run (its folder or `config.json`),
    with each override "--config.a.b=value" applied as `override` does. Where there is no such file
    in the current folder, it is one that comes with the package, as "configs/search/grpo.py",
    "search/grpo", or "grpo" where no other has that name. ConfigError if the file or an override
    cannot be used."""
    name, colon, arg = path.partition(":")
    file = _find(name)
    if file.suffix == ".json":
        config = written(read_record(file))
    else:
        config = _run(file, arg if colon else None)
    return override(config, overrides, on_change)


def override(
    config: ConfigDict,
    overrides: Iterable[str],
    on_change: Mapping[str, Callable[[ConfigDict, str], None]] = MappingProxyType({}),
) -> ConfigDict:
    """The configuration, locked, with each override applied in the type of the present value.
    `on_change` has, by the last part of a key, a function of the section and the key that is called
    before an override changes this value, such as for `env.taskset`. A `~` at the beginning of a
    path becomes the home folder, in every text of the configuration."""
    config.lock()
    for change in overrides:
        key, equals, text = change.removeprefix("--config.").partition("=")
        if not equals or key == change:
            raise ConfigError(f"{change!r} is not of the form --config.key=value")
        parents, _, last = key.rpartition(".")
        section = _section(config, parents)
        if last in on_change and section is not None and section.get(last) != text:
            with section.unlocked():
                on_change[last](section, text)
        _override(config, key, text)
    _expand_home(config)
    return config


def _expand_home(config: ConfigDict) -> None:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_home(value)
        elif (new := _at_home(value)) != value:
            config[key] = new


def _at_home(value: Any) -> Any:
    if isinstance(value, str) and (found := HOME.match(value)):
        return f"{found[1] or ''}{home(found[2])}{value[found.end() :]}"
    if isinstance(value, (tuple, list)):
        return type(value)(_at_home(element) for element in value)
    if isinstance(value, Mapping):
        return {key: _at_home(element) for key, element in value.items()}
    return value


def _section(config: ConfigDict, key: str) -> ConfigDict | None:
    """The section with this dotted key; None if there is none."""
    section: Any = config
    for name in filter(None, key.split(".")):
        section = section.get(name) if isinstance(section, ConfigDict) else None
    return section if isinstance(section, ConfigDict) else None


def _find(name: str) -> Path:
    for path in (home(name), Workdir(home(name)).config):
        if path.is_file():
            return path
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


def is_run(name: str) -> bool:
    """Whether `load` would read a run's own configuration, not a Python file."""
    return home(name).suffix == ".json" or Workdir(home(name)).config.is_file()


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


def plain(value: Any) -> Any:
    """A typed run, or a part of it, as JSON holds it: sections by name, every setting with its
    value. A dataclass that is built from something else than
    its fields has a method `section`."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        value = value.section() if hasattr(value, "section") else fields
    if isinstance(value, SECTIONS):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(x) for x in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def save(config: ConfigDict, run: Any, workdir: Path, argv: Sequence[str]) -> dict[str, Any]:
    """Write `workdir/config.json` and return its content: every setting of the typed `run` (or of
    several, by name), the command and the folder it was given in, the commit and the versions.
    `references` are the settings that follow another one in `config`."""
    record = {
        "config": plain(run),
        "references": _references(config),
        "command": shlex.join(argv),
        "folder": os.getcwd(),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0], "jaxdeep": __version__} | _versions(),
    }
    text = json.dumps(record, indent=2)
    write_atomic(Workdir(workdir).config, text + "\n")
    return json.loads(text)


def read_record(file: Path) -> dict[str, Any]:
    """What `save` wrote; ConfigError where the file is something else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if isinstance(record, dict) and "model_type" in record:
        raise ConfigError(f"{file} is that of a model, not of a run: name it by model.path")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"{file} is not the configuration of a run")
    return record


QUICKSTART = {"sft", "grpo", "test"}
"""Sections of a quickstart's configuration; the first two are runs in folders of that name."""


def last_stage(path: Path) -> Path:
    """The folder of the run in `path`: of a quickstart that of its last stage with a checkpoint,
    else `path` itself. ConfigError where a quickstart has saved nothing yet."""
    file = Workdir(path).config
    if not file.is_file() or not set(read_record(file)["config"]) >= QUICKSTART:
        return path
    for stage in ("grpo", "sft"):
        if any(Workdir(path / stage).checkpoints.glob("[0-9]*")):
            return path / stage
    raise ConfigError(f"the quickstart in {path} has saved nothing yet: let it go on")


def written(record: Mapping[str, Any]) -> ConfigDict:
    """The configuration in a record of `save`: settings that followed another one do so again."""
    config = ConfigDict(record["config"])
    for key, source in record.get("references", {}).items():
        (section, name), (of, first) = (_place(config, k) for k in (key, source))
        if section is not None and of is not None and section.get(name) == of.get(first):
            section[name] = of.get_ref(first)
    return config


def _place(config: ConfigDict, key: str) -> tuple[ConfigDict | None, str]:
    parents, _, last = key.rpartition(".")
    return _section(config, parents), last


def _references(config: ConfigDict) -> dict[str, str]:
    """The keys whose value follows that of another key, with that key."""
    first: dict[int, str] = {}
    follows = {}
    config = copy.deepcopy(config)  # asking for a reference makes one
    for key, value in _flatten(config).items():
        section, name = _place(config, key)
        if value is None or section is None:
            continue
        source = first.setdefault(id(section.get_ref(name)), key)
        if source != key:
            follows[key] = source
    return follows


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
