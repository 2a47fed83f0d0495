"""The command line: `python -m jaxdeep VERB --config=FILE.py --config.a.b=value --workdir=DIR`.

Each verb is a module of `jaxdeep.run` with a docstring, `DEFAULT_CONFIG`, `EXAMPLE`, optionally
`FLAGS` (name -> help text, for flags of its own), `KEYS` (the dataclasses of its configuration in
`setup.runs`, by the key they are under), `NEEDS` (what the example needs that does not come with
the package) and `main(config, workdir, **flags) -> int`.

    RUN = "optional"    the folder of a run in place of a configuration: its policy is opened as it
                        was trained
    PROCESSES = True    several processes may run it together: `main` also gets PROCESS_FLAGS
    ARGUMENTS = "..."   words in place of a configuration: `main(*words, **flags)`

Help and the checks of flags parse a verb's source without importing it: importing jax takes
seconds, and a typing mistake should be answered at once. The module is imported when it is run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxdeep import __version__, compiled, metrics
from jaxdeep import config as configs
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.setup.tasksets import load_config, override
from jaxdeep.workdir import DISK_FULL, check_writable, home

VERBS = (
    *("quickstart", "new", "data", "validate", "sft", "grpo", "eval", "ask", "chat", "check"),
    *("export", "plan", "view", "doctor"),
)
RESUMED = ("quickstart", "sft", "grpo")  # verbs whose command goes on where it was stopped
READERS = ("chat", "export", "validate")  # verbs that write nothing to a workdir
PROCESS_FLAGS = {
    "coordinator": "host:port of the first of several processes, where no launcher says so",
    "processes": "how many there are; 1: this one is a run of its own",
    "process": "which of them this is, from 0",
}
BEST = "the checkpoint with the best score in place of the newest (train.best)"
SWITCHES = ("json", "best")  # flags without a value
OVERRIDES = {"best": "--config.train.best=True"}  # switches that stand for one
STATUSES = {
    0: "done, or stopped by SIGTERM",
    1: "memory or disk is full",
    2: "the command cannot be run or could not do its work, and would end so again",
    130: "interrupted",
}


CONSTANTS = ("DEFAULT_CONFIG", "EXAMPLE", "FLAGS", "ARGUMENTS", "KEYS", "NEEDS", "RUN", "PROCESSES")


class Verb(NamedTuple):
    """A verb as its source describes it."""

    name: str
    doc: str
    default_config: str | None
    example: str
    flags: Mapping[str, str]
    arguments: str = ""
    keys: Mapping[str, Sequence[str]] = MappingProxyType({})
    needs: str = ""
    takes_run: bool = False


class Command(NamedTuple):
    """A parsed command line, whose overrides are not yet checked against the configuration.
    `config` is "" where the run's own is used."""

    config: str
    overrides: tuple[str, ...]
    workdir: Path
    flags: Mapping[str, str]
    run: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit status: the verb's own, normally 0, or else one of
    `STATUSES`."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _main(list(argv))
    except JaxdeepError as error:
        return _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        goes_on = "; the same command continues from the last checkpoint, if there is one"
        return _fail(f"interrupted{goes_on if argv[0] in RESUMED else ''}", 130)
    except MemoryError:
        return _fail("error: this machine ran out of memory: use a smaller batch or model", 1)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        place = f" at {error.filename}" if error.filename else ""
        return _fail(
            f"error: the disk is full{place}: free some space and run the command again", 1
        )


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, *rest = argv
    described = verb(name)
    if "-h" in rest or "--help" in rest:
        print(usage(described))
        return 0
    for word in rest:
        if word.startswith("--help="):
            rest.remove(word)
            print(help_on(word.removeprefix("--help="), described, rest))
            return 0
    if described.arguments:
        words, flags = split(described, rest)
        return importlib.import_module(f"jaxdeep.run.{name}").main(*words, **flags)
    command = parse(described, rest)
    loaded = configuration(command)
    if name not in READERS:
        check_writable(command.workdir)
    compiled.keep()
    module = importlib.import_module(f"jaxdeep.run.{name}")
    return module.main(loaded, command.workdir, **command.flags)


def verb(name: str) -> Verb:
    """The verb of this name; ConfigError where there is none."""
    if name not in VERBS:
        raise ConfigError(
            f"{name!r} is not a verb.{configs.suggest(name, VERBS)} "
            f"The verbs are {', '.join(VERBS)}"
        )
    return describe(name)


def configuration(command: Command) -> ConfigDict:
    """The configuration that a command asks for: of its file, or of its run."""
    if command.config:
        return load_config(command.config, command.overrides)
    from jaxdeep.setup import past

    return override(past.policy_config(command.run), command.overrides)


def describe(name: str) -> Verb:
    """Reads the description of a verb from its source, without importing it."""
    path = Path(importlib.util.find_spec(f"jaxdeep.run.{name}").origin)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {}
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=target)], value=value)
                | ast.AnnAssign(target=ast.Name(id=target), value=value)
            ) if target in CONSTANTS:
                constants[target] = ast.literal_eval(value)
    return Verb(
        name=name,
        doc=ast.get_docstring(tree),
        default_config=constants["DEFAULT_CONFIG"],
        example=constants["EXAMPLE"],
        flags=constants.get("FLAGS", {})
        | (PROCESS_FLAGS if constants.get("PROCESSES") else {})
        | ({"best": BEST} if "RUN" in constants else {}),
        arguments=constants.get("ARGUMENTS", ""),
        keys=constants.get("KEYS", {}),
        needs=constants.get("NEEDS", ""),
        takes_run="RUN" in constants,
    )


def help_on(topic: str, verb: Verb, argv: Sequence[str]) -> str:
    """The text of `--help=TOPIC`: every key of the verb's configuration ("config"), those of a
    section ("config.optim"), or every metric ("metrics"). ConfigError for anything else."""
    if topic == "metrics":
        return metrics.text()
    name, _, part = topic.partition(".")
    if name != "config" or not verb.keys:
        topics = "config, config.SECTION and metrics" if verb.keys else "metrics"
        raise ConfigError(f"--help={topic}: {verb.name} has help on {topics}")
    keys = importlib.import_module("jaxdeep.setup.keys")
    config = None
    if any(word.startswith(("--config=", "--config.")) for word in argv):
        command = parse(verb, argv)
        config = configuration(command)
    sections = keys.keys_of(verb.keys, config)
    return keys.text(keys.chosen(sections, part) if part else sections)


def split(verb: Verb, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words after the verb that are not flags, and the flags by name, from `--name=value` or
    `--name value`; ConfigError for a flag that the verb does not have."""
    given: dict[str, str] = {}
    plain = []
    own = ("config", "workdir", *verb.flags) if not verb.arguments else tuple(verb.flags)
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            plain.append(word)
            continue
        if name not in own and (verb.arguments or not name.startswith("config.")):
            suggestion = configs.suggest(name, (*own, "help"))
            raise ConfigError(f"{verb.name} has no flag --{name}.{suggestion}")
        if name in SWITCHES and not equals:
            value = "True"
        elif not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name}=...")
        given[name] = value
    return plain, given


def parse(verb: Verb, argv: Sequence[str]) -> Command:
    """The flags after the verb, and its run; ConfigError for any other word."""
    plain, given = split(verb, argv)
    run = plain.pop(0) if plain and verb.takes_run else ""
    if plain:
        raise ConfigError(f"{plain[0]!r} is not a flag: flags are written --name=value")
    names = [name for name in given if name.startswith("config.")]
    overrides = [f"--{name}={given.pop(name)}" for name in names]
    for name, meaning in OVERRIDES.items():
        if (value := given.pop(name, "False")) not in ("True", "False"):
            raise ConfigError(f"--{name}={value}: write --{name} alone")
        overrides += [meaning] * (value == "True")
    path = given.pop("config", "" if run else verb.default_config)
    if path is None:
        what = "the folder of a run, or " if verb.takes_run else ""
        raise ConfigError(f"{verb.name} needs {what}--config=FILE.py, as in\n  {verb.example}")
    if run and path:
        overrides.insert(0, f"--config.train.start={run}")
    workdir = given.pop("workdir", _workdir(verb.name, run or path))
    if "://" in workdir:
        raise ConfigError(
            f"--workdir={workdir} is not a local folder, and a run appends to files there. Give "
            f"a local one, with --config.train.checkpoints={workdir} for the checkpoints, or "
            "mount the bucket"
        )
    flags = {name.replace("-", "_"): value for name, value in given.items()}
    return Command(path, tuple(overrides), home(workdir), flags, run)


def _workdir(verb: str, path: str) -> str:
    if "://" in path:
        path = path.rstrip("/").rpartition("/")[2]
    file, _, arg = path.partition(":")
    return "-".join(part for part in (f"runs/{verb}", Path(file).stem, arg) if part)


def overview() -> str:
    """The help for all verbs."""
    width = max(map(len, VERBS))
    lines = [
        textwrap.fill(
            describe(name).doc.splitlines()[0],
            width=80,
            initial_indent=f"  {name:<{width}}  ",
            subsequent_indent=" " * (width + 4),
        )
        for name in VERBS
    ]
    return "\n".join(
        [
            "jaxdeep VERB --config=FILE.py [--config.KEY=VALUE ...] [--workdir=DIR]",
            "",
            *lines,
            "",
            "jaxdeep VERB --help explains a verb and shows an example, --help=config lists",
            "every key of its configuration, --help=metrics every metric.",
            "",
            "Exit status:",
            *(f"  {status:<4}{meaning}" for status, meaning in STATUSES.items()),
        ]
    )


def usage(verb: Verb) -> str:
    """The help for one verb."""
    default = f" (default {verb.default_config})" if verb.default_config else ""
    workdir = _workdir(verb.name, verb.default_config or "CONFIG")
    common = {
        "config=FILE.py": f"configuration file; FILE.py:ARG calls get_config(ARG){default}",
        "config.KEY=VALUE": "override of one value in the configuration",
        "workdir=DIR": f"folder for the state and the results of the run (default {workdir})",
    }
    flags = {} if verb.arguments else common
    flags |= {name + "=..." * (name not in SWITCHES): text for name, text in verb.flags.items()}
    if verb.keys:
        flags["help=config"] = "every key of the configuration; help=config.KEY: those below it"
    width = max(map(len, flags), default=0)
    lines = [f"  --{flag:<{width}}  {text}" for flag, text in flags.items()]
    words = ["", f"  jaxdeep {verb.name} {verb.arguments}"] if verb.arguments else []
    if verb.takes_run:
        words = ["", f"  jaxdeep {verb.name} RUN [--config.KEY=VALUE ...]"]
    needs = textwrap.wrap(f"It needs {verb.needs}.", 98) if verb.needs else []
    example = [f"  {verb.example}", *(f"  {line}" for line in needs)]
    head = [verb.doc, *words, "", "Example:", *example]
    return "\n".join([*head, *(["", "Flags:", *lines] if lines else [])])
