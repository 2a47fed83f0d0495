"""A repair task: files with a bug, and what tells that it is gone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxdeep.envs.repair.diff import DiffError, parse
from jaxdeep.errors import DataError

Runner = Literal["calls", "pytest", "unittest"]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A call and what it must return. `function` is NAME or CLASS.NAME in the file `path`.
    Arguments and the expected value are in the JSON form of `runners/values.py`; an expected
    exception is `{"$raises": "ValueError"}`."""

    path: str
    function: str
    arguments: Sequence[Any]
    expected: Any


@dataclasses.dataclass(frozen=True)
class RepairTask:
    """One task. `files` maps paths to texts; `tests` has the test files as they are laid for
    grading, which whoever repairs does not see. Ids of tests are PATH::NAME or PATH::CLASS::NAME.

    `tolerance` is by how much two floats may differ, relative to the larger and absolute.
    `same_sequences`: lists, tuples and iterators of equal items are equal. `allowed_flags`: what
    the right patch would be flagged for as well, so that it says nothing. `python` is the
    interpreter that runs it, None for the one that runs this."""

    instance_id: str
    files: Mapping[str, str | None]
    runner: Runner
    calls: Sequence[Call] = ()
    tests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fail_to_pass: Sequence[str] = ()
    pass_to_pass: Sequence[str] = ()
    path: Sequence[str] = ()  # folders beside the root that modules are imported from, as "src"
    seconds: float = 20.0
    memory_mb: int = 512
    tolerance: float = 0.0
    same_sequences: bool = False
    allowed_flags: frozenset[str] = frozenset()
    python: str | None = None

    def __post_init__(self) -> None:
        name = f"task {self.instance_id!r}"
        if self.runner not in ("calls", "pytest", "unittest"):
            raise DataError(f"{name}: runner {self.runner!r} is not calls, pytest or unittest")
        if self.runner == "calls":
            if not self.calls:
                raise DataError(f"{name} has no calls: nothing tells whether it is solved")
            missing = {call.path for call in self.calls} - {*self.files}
            if missing:
                raise DataError(f"{name}: calls of files that it does not have: {sorted(missing)}")
            return
        if not self.fail_to_pass:
            raise DataError(f"{name} has no FAIL_TO_PASS: nothing tells whether it is solved")
        ids = [*self.fail_to_pass, *self.pass_to_pass]
        if len(ids) != len({*ids}):
            raise DataError(f"{name}: a test is named twice in FAIL_TO_PASS and PASS_TO_PASS")
        unknown = sorted({test.partition("::")[0] for test in ids} - {*self.tests})
        if unknown:
            raise DataError(f"{name}: tests in files that it does not have: {unknown}")

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> RepairTask:
        """A task from a line of a task file. Raises `DataError` that names what is missing or
        wrong, also where `test_patch` does not apply to `files`."""
        name = line.get("instance_id")
        if not isinstance(name, str) or not name:
            raise DataError(f"a task without instance_id: {json.dumps(line)[:200]}")
        files = line.get("files")
        if not isinstance(files, Mapping) or not files:
            raise DataError(f"task {name!r} has no files")
        calls = [_call(name, call, files) for call in line.get("calls") or ()]
        laid = dict(files)
        if line.get("test_patch"):
            try:
                laid = parse(line["test_patch"], "unified").apply(files)
            except DiffError as error:
                message = f"task {name!r}: its test_patch does not apply: {error.code}: {error}"
                raise DataError(message) from error
        listed = _names(line, "test_files")
        changed = [path for path in laid if laid[path] != files.get(path)]
        ids = {key: _names(line, key) for key in ("FAIL_TO_PASS", "PASS_TO_PASS")}
        named = [test.partition("::")[0] for tests in ids.values() for test in tests]
        paths = dict.fromkeys([*listed, *changed, *named])
        tests = {path: laid[path] for path in paths if laid.get(path) is not None}
        runner = line.get("parser") or ("calls" if calls else "pytest")
        return cls(
            instance_id=name,
            files={path: text for path, text in files.items() if path not in tests or not calls},
            runner="calls" if runner == "values" else runner,
            calls=tuple(calls),
            tests=tests,
            fail_to_pass=tuple(ids["FAIL_TO_PASS"]),
            pass_to_pass=tuple(ids["PASS_TO_PASS"]),
            seconds=float(line.get("timeout") or 20.0),
        )


def _names(line: Mapping[str, Any], key: str) -> list[str]:
    """A list of names, which may be written as JSON text."""
    value = line.get(key) or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"task {line['instance_id']!r}: {key} is not a list of names")
    return value


def _call(name: str, call: Any, files: Mapping[str, Any]) -> Call:
    """`[FUNCTION, ARGUMENTS, EXPECTED]`; FUNCTION is PATH:NAME, or NAME where there is one file."""
    if (
        not isinstance(call, list | tuple)
        or len(call) != 3
        or not isinstance(call[1], list | tuple)
    ):
        raise DataError(f"task {name!r}: a call is [function, arguments, expected], not {call!r}")
    path, colon, function = str(call[0]).rpartition(":")
    sources = [file for file in files if file.endswith(".py")]
    if not colon and len(sources) != 1:
        raise DataError(f"task {name!r}: of which file is {function!r}? Write PATH:{function}")
    return Call(path or sources[0], function, list(call[1]), call[2])
