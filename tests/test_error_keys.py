"""Every configuration key that an error message names can be set under that name."""

import ast
import collections
import collections.abc
import dataclasses
import pathlib
import re
import types
import typing

import pytest

import jaxdeep
from jaxdeep.setup import builders, tasksets
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun

# the dataclasses of each section: those of the runs, and for `env` those of the task sets too
SECTIONS = collections.defaultdict(list)
for run in (SftRun, GrpoRun, EvalRun):
    for name, hint in typing.get_type_hints(run).items():
        SECTIONS[name].append(hint)
for name in tasksets.BUILT_IN:
    SECTIONS["env"].append(tasksets.settings_class(name, "env.taskset"))
SECTIONS["data"] += [builders.BuilderConfig, *map(builders.builder_class, builders.BUILT_IN)]

ERRORS = {
    *("ConfigError", "DataError", "CheckpointError", "MismatchError", "DivergedError"),
    "ValueError",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGE = pathlib.Path(jaxdeep.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
VALUE = "\0"  # stands in a message for what an f-string puts in
KEY = re.compile(r"(?<![\w./-])(?:--config\.)?([a-z]\w*(?:\.(?:[a-z]\w*|\0))+)(=?)")
NOT_KEYS = re.compile(  # names of files, and of tensors of a checkpoint
    r"\.(json|jsonl|py|npy|safetensors|html|parquet)$|^model\.layers"
)


def inner_types(hint):
    """The members of a union; of another annotation, itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for arg in typing.get_args(hint) for kind in inner_types(arg)]
    return [hint]


def exists(hint, parts):
    """Whether the keys `parts` lead from a section to one of its settings."""
    if not parts:
        return True
    for kind in inner_types(hint):
        args = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            fields = typing.get_type_hints(kind)
            names = fields if parts[0] == VALUE else {parts[0]} & {*fields}
            if any(exists(fields[name], parts[1:]) for name in names):
                return True
        elif typing.get_origin(kind) in (dict, collections.abc.Mapping):
            if exists(args[1], parts[1:]):
                return True
        elif kind is typing.Any:
            return True
    return False


def nested_sections(hint):
    """The names of sections inside a section, at any depth."""
    names = set()
    for kind in filter(dataclasses.is_dataclass, inner_types(hint)):
        for name, inner in typing.get_type_hints(kind).items():
            if any(map(dataclasses.is_dataclass, inner_types(inner))):
                names |= {name} | nested_sections(inner)
    return names


HINTS = [hint for hints in SECTIONS.values() for hint in hints]
NESTED = set().union(*map(nested_sections, HINTS)) - {*SECTIONS}
BARE = re.compile(rf"(?<![\w.])(?:{'|'.join(sorted(NESTED))}) [a-z]\w*=")


def wrong_keys(message):
    """The keys in a message that cannot be set: unknown, or named without their section."""
    wrong = BARE.findall(message)
    for key, value in KEY.findall(message):
        section, *parts = key.split(".")
        if NOT_KEYS.search(key):
            continue
        if section in SECTIONS:
            wrong += [] if any(exists(hint, parts) for hint in SECTIONS[section]) else [key]
        elif section in NESTED or value:
            wrong.append(key)
    return [key.replace(VALUE, "*") for key in wrong]


def text_of(node):
    """The text of a string or f-string, with VALUE for each value put in."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(v.value if isinstance(v, ast.Constant) else VALUE for v in node.values)


def messages(tree):
    """(line, text) of all strings in functions that make an error."""
    for function in ast.walk(tree):
        if not isinstance(function, FUNCTIONS):
            continue
        nodes = [node for statement in function.body for node in ast.walk(statement)]
        if not any(
            isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS for node in nodes
        ):
            continue
        docstring = ast.get_docstring(function) and function.body[0].value
        inside = {
            id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values
        }
        for node in nodes:
            constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if node is docstring or id(node) in inside:
                continue
            if constant or isinstance(node, ast.JoinedStr):
                yield node.lineno, text_of(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_keys_that_errors_name_can_be_set(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = {(line, key) for line, text in messages(tree) for key in wrong_keys(text)}
    assert not wrong


def test_the_check_finds_what_it_looks_for():
    source = '''
def check(self):
    """Of engine.chunk=3."""
    raise ConfigError(
        f"rollout.chunk={self.chunk} must be tiles of engine.tile={self.tile}, not"
        f" {dict(a=1)}, see grpo.norm.std and norm.std and train.kep in config.json"
    )

def other():
    return "train.kep"
'''
    found = [key for _, text in messages(ast.parse(source)) for key in wrong_keys(text)]
    assert found == ["engine.tile", "norm.std", "train.kep"]
    for text in ("--config.train.steps=3", "env.rows", f"guard.{VALUE}=", "mesh.data is"):
        assert wrong_keys(text) == [], text
    for text in ("env.row", "train.steps.x", f"train.{VALUE}.x", "clip.low", "clip low=", "a.b=3"):
        assert len(wrong_keys(text)) == 1, text
