"""Whether a repaired program does what its task asks, told by running it in a box.

Level 3, for tasks with calls: the box is given the calls and gives out values, which are compared
here. What the program does in its process does not matter, for the expected values are not there.

Level 2, for tasks with tests: the tests share their process with the code under test, so the
verdict can be attacked, and attacks are looked for. The runner's configuration is the task's own,
the test files are laid last and read-only, outcomes come through a channel with a nonce, and among
the tests are canaries, some that pass and some that fail, under names of chance. Anything that does
not agree, as an exit code, a canary or a record too many, makes the status "tampered". So does what
`scan` finds in the patch. Level 2 detects and cannot prove.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import random
import secrets
import sys
from typing import Any, Literal

from jaxdeep.envs.repair.diff import DiffError, Files, Form, parse
from jaxdeep.envs.repair.grading import Rule, report
from jaxdeep.envs.repair.scan import Flag, is_runner_file, is_shadow, is_test_file, scan
from jaxdeep.envs.repair.task import RepairTask
from jaxdeep.tools import sandbox

Status = Literal[
    "resolved", "unresolved", "empty", "unparsable", "not_applied", "tampered", "timeout", "infra"
]
Outcome = Literal["passed", "failed", "error", "skipped", "xfailed", "missing"]

_RUNNERS = pathlib.Path(__file__).with_name("runners")
_CALLS = "\n".join((_RUNNERS / name).read_text("utf-8") for name in ("values.py", "calls.py"))
_TESTS = (_RUNNERS / "tests.py").read_text("utf-8")
LARGEST_FILES = 32 * 2**20
"""Bytes of all files of a task together, above which a change is not applied."""

_NO_CONFIGURATION = ".no-pytest-configuration.ini"
CONFIGURATIONS = {  # where pytest is configured, and the section that says so; in its order
    "pytest.ini": "",
    ".pytest.ini": "",
    "pyproject.toml": "[tool.pytest",
    "tox.ini": "[pytest]",
    "setup.cfg": "[tool:pytest]",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one attempt.

    `tests` has an outcome for every test, or call by its number, that the task names: one that was
    not seen is "missing", which is failed. `flags` are suspicions. `verdict_level` is 3 for values,
    2 for tests, 0 where nothing was run. `detail` says more to people: the error of the patch, the
    end of the output.
    """

    instance_id: str
    status: Status
    tests: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    f2p: float = 0.0  # share of FAIL_TO_PASS, or of calls, that passed
    p2p: float = 0.0  # share of PASS_TO_PASS that was kept; 1 where there are none
    verdict_level: int = 0
    mechanism: str = ""  # the sandbox's level
    flags: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu: float = 0.0
    peak_mb: float = 0.0
    detail: str = ""
    tree: str = ""  # git's id of the repository's files after the patch
    apply_level: int = 0  # which command of the chain applied the patch, from 1

    @property
    def reward(self) -> float | None:
        """1 for resolved, None where the machine failed, else 0."""
        if self.status == "infra":
            return None
        return float(self.status == "resolved")


def judge_text(
    task: RepairTask, text: str, form: Form, *, level: sandbox.Level = "full", seed: int = 0
) -> Verdict:
    """The verdict on a model's text with a patch in it."""
    if not text.strip():
        return Verdict(task.instance_id, "empty")
    try:
        patch = parse(text, form)
    except DiffError as error:
        return Verdict(task.instance_id, "unparsable", detail=f"{error.code}: {error}")
    try:
        after = patch.apply(task.files)
    except DiffError as error:
        status: Status = "empty" if error.code == "no_change" else "not_applied"
        return Verdict(task.instance_id, status, detail=f"{error.code}: {error}")
    return judge(task, after, level=level, seed=seed)


def judge(
    task: RepairTask, after: Files, *, level: sandbox.Level = "full", seed: int = 0
) -> Verdict:
    """The verdict on the files of a task after a change. `seed` orders the calls. Raises
    `ConfigError` where the sandbox's level does not work here."""
    unwritable = _unwritable(after)
    if unwritable:
        return Verdict(task.instance_id, "not_applied", detail=unwritable)
    flags = scan(task.files, after, task.tests)
    kept = [flag for flag in flags if flag.what not in task.allowed_flags]
    if task.runner == "calls":
        return _judge_calls(task, after, kept, level, seed)
    return judge_tests(task, after, kept, level, seed)


def _unwritable(files: Files) -> str:
    """Why files cannot be written, which is the fault of the patch and not of the machine; "" if
    they can."""
    size = 0
    for path, text in files.items():
        try:
            names = path.encode("utf-8", "surrogateescape").split(b"/")
            size += len((text or "").encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            return f"{path!r} cannot be encoded: {error}"
        if max(map(len, names)) > 255 or sum(map(len, names)) + len(names) > 3000:
            return f"a path of {len(path)} characters"
    if size > LARGEST_FILES:
        return f"files of {size / 2**20:.0f} MB"
    return ""


def _run(
    task: RepairTask, source: str, files: Files, fixed, told: dict, level, folder=None
) -> sandbox.Result:
    python = task.python or (sys.executable if level == "full" else sandbox.python())
    limits = sandbox.Limits(seconds=task.seconds, memory_mb=task.memory_mb)
    if folder is not None:
        size = sum(file.lstat().st_size for file in folder.rglob("*")) >> 20
        limits = dataclasses.replace(limits, disk_mb=limits.disk_mb + 2 * size)
    return sandbox.execute(
        sandbox.Job(
            # not from a file in the folder of the program, of which nothing may be imported first
            [python, "-s", "-B", "-c", source],
            {path: text for path, text in files.items() if text is not None},
            folder=folder,
            fixed=fixed,
            limits=limits,
            level=level,
            stdin=(json.dumps(told) + "\n").encode(),
            environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
    )


def _records(result: sandbox.Result, nonce: str) -> tuple[list[dict[str, Any]], int]:
    """What the runner sent, and how many lines were not its own."""
    records, forged = [], 0
    lines = result.report.decode("utf-8", "replace").split("\n")
    if lines and not (result.status == "exited" and lines[-1]):
        lines.pop()  # empty, or cut off where the program was killed
    for line in lines:
        key, _, text = line.partition(" ")
        try:
            record = json.loads(text) if secrets.compare_digest(key.encode(), nonce.encode()) else 0
        except ValueError:
            record = 0
        if isinstance(record, dict):
            records.append(record)
        else:
            forged += 1
    return records, forged


def _measured(task: RepairTask, result: sandbox.Result, verdict_level: int) -> dict[str, Any]:
    return {
        "instance_id": task.instance_id,
        "verdict_level": verdict_level,
        "mechanism": result.level,
        "seconds": result.seconds,
        "cpu": result.cpu,
        "peak_mb": result.peak_mb,
    }


def _judge_calls(
    task: RepairTask, after: Files, flags: list[Flag], level: sandbox.Level, seed: int
) -> Verdict:
    order = list(range(len(task.calls)))
    random.Random(f"{seed} {task.instance_id}").shuffle(order)
    nonce = secrets.token_hex(16)
    calls = [
        [n, task.calls[n].path, task.calls[n].function, list(task.calls[n].arguments)]
        for n in order
    ]
    files = {path: text for path, text in after.items() if path not in task.tests}
    result = _run(task, _CALLS, files, {}, {"nonce": nonce, "calls": calls}, level)
    measured = _measured(task, result, 3) | {"flags": tuple(map(str, flags))}
    if result.status == "infra":
        return Verdict(**measured, status="infra", detail=result.detail)
    records, forged = _records(result, nonce)
    seen: dict[int, list[dict]] = collections.defaultdict(list)
    for record in records:
        if isinstance(record.get("call"), int):
            seen[record["call"]].append(record)
    tests: dict[str, Outcome] = {}
    for number, call in enumerate(task.calls):
        tests[str(number)] = _outcome_of_call(task, call.expected, seen.get(number, []))
    passed = sum(outcome == "passed" for outcome in tests.values()) / len(tests)
    status: Status = "resolved" if passed == 1 else "unresolved"
    if forged or any(len(entries) > 1 for entries in seen.values()):
        status = "tampered"
    elif result.status == "timeout":
        status = "timeout"
    return Verdict(
        **measured, status=status, tests=tests, f2p=passed, p2p=1.0, detail=result.output[-2000:]
    )


def _outcome_of_call(task: RepairTask, expected: Any, entries: list[dict]) -> Outcome:
    if not entries:
        return "missing"
    entry = entries[0]
    if isinstance(expected, dict) and "$raises" in expected:
        return "passed" if entry.get("raised") == expected["$raises"] else "failed"
    if "value" not in entry:
        return "error"
    same = equal(entry["value"], expected, task.tolerance, task.same_sequences)
    return "passed" if same else "failed"


def equal(value: Any, expected: Any, tolerance: float = 0.0, same_sequences: bool = False) -> bool:
    """Whether two values in JSON form are equal, exactly by type: True is not 1, 1.0 is not 1.
    Floats may differ by `tolerance`, relative to the larger and absolute; nan equals nan.
    `same_sequences`: lists, tuples and iterators of equal items are equal."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(
            equal(a, b, tolerance, same_sequences) for a, b in zip(value, expected, strict=True)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        kinds = value.get("$type"), expected.get("$type")
        if kinds == (None, None):
            return value.keys() == expected.keys() and all(
                equal(value[key], expected[key], tolerance, same_sequences) for key in value
            )
        if "object" in kinds or kinds[0] != kinds[1]:
            sequences = {"tuple", "iterator"}
            alike = same_sequences and {*kinds} <= sequences
            return alike and equal(value["value"], expected["value"], tolerance, same_sequences)
        if kinds[0] in ("set", "frozenset", "dict"):
            first, second = (
                sorted(form["value"], key=lambda item: json.dumps(item, sort_keys=True))
                for form in (value, expected)
            )
            return equal(first, second, tolerance, same_sequences)
        return equal(value["value"], expected["value"], tolerance, same_sequences)
    if same_sequences and isinstance(value, dict | list) and isinstance(expected, dict | list):
        plain = [
            form["value"]
            if isinstance(form, dict) and form.get("$type") in ("tuple", "iterator")
            else form
            for form in (value, expected)
        ]
        both = all(isinstance(form, list) for form in plain)
        return both and equal(*plain, tolerance, same_sequences)
    if type(value) is not type(expected):
        return False
    if isinstance(value, float) and tolerance:
        return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(value, float):
        return value == expected and math.copysign(1, value) == math.copysign(1, expected)
    return value == expected


@dataclasses.dataclass(frozen=True, slots=True)
class _Canary:
    """A test file of chance, and the outcome of each of its tests."""

    path: str
    text: str
    outcomes: dict[str, Outcome]


def _canary(runner: str) -> _Canary:
    path = f"test_{secrets.token_hex(6)}.py"
    names = [f"test_{secrets.token_hex(6)}" for _ in range(3)]
    good = [True, False, secrets.randbelow(2) == 0]  # at least one of each
    random.SystemRandom().shuffle(good)
    lines, outcomes = [], {}
    group = f"T{secrets.token_hex(4)}"
    if runner == "unittest":
        lines += ["import unittest", f"class {group}(unittest.TestCase):"]
    for name, right in zip(names, good, strict=True):
        left = secrets.randbelow(10**6)
        other = left if right else left + 1 + secrets.randbelow(9)
        if runner == "unittest":
            lines.append(f"    def {name}(self): self.assertEqual({left}, {other})")
        else:
            lines.append(f"def {name}():\n    assert {left} == {other}")
        key = f"{path}::{group}::{name}" if runner == "unittest" else f"{path}::{name}"
        outcomes[key] = "passed" if right else "failed"
    return _Canary(path, "\n".join(lines) + "\n", outcomes)


def _laid(task: RepairTask, after: Files) -> dict[str, str | None]:
    """The files for a run of tests: the candidate's, but what the task has of runner files, of
    tests and of what tests need is the task's own, and there is no more of it."""
    files = dict(after)
    for path in {*task.files, *after}:
        original = task.files.get(path)
        if (
            is_runner_file(path)
            or is_test_file(path, task.tests)
            or (original is None and is_shadow(path))
        ):
            files[path] = original
    return {path: text for path, text in files.items() if path not in task.tests}


def _configuration(task: RepairTask) -> str:
    """The file of the task's own that configures pytest."""
    for path, section in CONFIGURATIONS.items():
        text = task.files.get(path)
        if text is not None and section in text:
            return path
    return _NO_CONFIGURATION


def judge_tests(
    task: RepairTask,
    after: Files,
    flags: list[Flag],
    level: sandbox.Level,
    seed: int,
    *,
    folder: pathlib.Path | None = None,
    rule: Rule = "strict",
) -> Verdict:
    """The verdict of tests, for `flags` that a scan has found. `folder` holds files that are there
    besides, as a checkout does, changed as they are to be judged."""
    canaries = [_canary(task.runner) for _ in range(2)]
    nonce = secrets.token_hex(16)
    expected = [*task.fail_to_pass, *task.pass_to_pass]
    paths = list(dict.fromkeys(test.partition("::")[0] for test in expected))
    random.Random(f"{seed} {task.instance_id}").shuffle(paths)
    fixed = task.tests | {canary.path: canary.text for canary in canaries}
    told = {
        "nonce": nonce,
        "runner": task.runner,
        "files": [canaries[0].path, *paths, canaries[1].path],
        "path": list(task.path),
        "configuration": _configuration(task),
    }
    if told["configuration"] == _NO_CONFIGURATION:
        fixed[_NO_CONFIGURATION] = "[pytest]\n"
    result = _run(task, _TESTS, _laid(task, after), fixed, told, level, folder)
    measured = _measured(task, result, 2)
    if result.status == "infra":
        return Verdict(**measured, status="infra", detail=result.detail)
    records, forged = _records(result, nonce)
    if len(records) in (1, 2) and "failed" in records[0]:
        return Verdict(**measured, status="infra", detail=str(records[0]["failed"]))
    seen, twice = _outcomes(records)
    tests = {test: seen.get(test, "missing") for test in expected}
    reasons = [str(flag) for flag in flags if flag.tampering]
    reasons += _disagreements(result, records, forged, twice, seen, canaries, expected)
    found = report(seen, task.fail_to_pass, task.pass_to_pass, rule)
    status: Status = "resolved" if found.resolution == "full" else "unresolved"
    if reasons:
        status = "tampered"
    elif result.status == "timeout":
        status = "timeout"
    noted = [str(flag) for flag in flags if not flag.tampering]
    return Verdict(
        **measured,
        status=status,
        tests=tests,
        f2p=found.f2p,
        p2p=found.p2p,
        flags=(*reasons, *noted),
        detail=result.output[-2000:],
    )


def _outcomes(records: list[dict]) -> tuple[dict[str, Outcome], list[str]]:
    """The outcome of each test, from those of its parts, and the tests with too many records."""
    parts: dict[str, dict[str, str]] = collections.defaultdict(dict)
    twice = []
    for record in records:
        if isinstance(record.get("test"), str):
            test, when = record["test"], str(record.get("when"))
            if when in parts[test] and when != "sub":
                twice.append(test)
            if parts[test].get(when) != "failed":
                parts[test][when] = str(record.get("outcome"))
    outcomes: dict[str, Outcome] = {}
    for test, by_part in parts.items():
        call = by_part.get("call")
        if by_part.get("setup") == "failed" or by_part.get("teardown") == "failed":
            outcomes[test] = "error"
        elif "failed" in by_part.values():
            outcomes[test] = "failed"
        elif "skipped" in by_part.values():
            outcomes[test] = "skipped"
        elif "xfailed" in by_part.values():
            outcomes[test] = "xfailed"
        else:
            outcomes[test] = "passed" if call == "passed" else "failed"
    return outcomes, twice


def _disagreements(
    result: sandbox.Result,
    records: list[dict],
    forged: int,
    twice: list[str],
    seen: dict[str, Outcome],
    canaries: list[_Canary],
    expected: list[str],
) -> list[str]:
    """What in the records cannot come from an honest run."""
    reasons = []
    if forged:
        reasons.append(f"{forged} records that are not the runner's")
    watched = {*expected, *(key for canary in canaries for key in canary.outcomes)}
    reasons += [f"{test} reported twice" for test in sorted({*twice} & watched)]
    ends = [record["end"] for record in records if "end" in record]
    ended = result.status == "exited" and len(ends) == 1
    for canary in canaries:
        for key, right in canary.outcomes.items():
            # a run that was cut off has not got to all of them
            if seen.get(key, "missing" if ended else right) != right:
                reasons.append(f"a test that must have {right} has {seen.get(key, 'vanished')}")
    if result.status == "exited":
        # a canary fails, so an honest run says 1; without an end it may have crashed
        crashed = not ends and result.code not in (0, 1)
        if not crashed and (ends != [1] or result.code != 1):
            told = ", ".join(map(str, ends)) or "no end"
            reasons.append(f"exit code {result.code} with {told} reported")
    return reasons
