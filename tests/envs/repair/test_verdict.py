"""Verdicts: repairs are seen, tricks are not taken for one, the machine's failures are nobody's."""

import dataclasses
import json
import math
import sys

import pytest
from envs.repair import tricks

from jaxdeep.envs.repair import verdict
from jaxdeep.envs.repair.diff import between
from jaxdeep.envs.repair.runners import values
from jaxdeep.envs.repair.scan import scan
from jaxdeep.envs.repair.task import Call, RepairTask
from jaxdeep.envs.repair.verdict import equal, judge, judge_text
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.tools import sandbox

F2P = ("tests/test_calc.py::test_add[1-2-3]", "tests/test_calc.py::test_add[5--7--2]")
P2P = ("tests/test_calc.py::test_scale",)
PYTEST = RepairTask(
    "calc",
    tricks.BUGGY,
    "pytest",
    tests=tricks.TESTS,
    fail_to_pass=F2P,
    pass_to_pass=P2P,
    seconds=60,
)
UNITTEST = RepairTask(
    "calc", tricks.BUGGY, "unittest", tests=tricks.UNITTESTS, seconds=60,
    fail_to_pass=("tests/test_calc.py::Calc::test_add",),
    pass_to_pass=("tests/test_calc.py::Calc::test_scale",),
)  # fmt: skip
CALLS = RepairTask(
    "calc", tricks.BUGGY, "calls", tests=tricks.TESTS, seconds=60,
    calls=[
        Call("calc.py", "add", [1, 2], 3),
        Call("calc.py", "add", [5, -7], -2),
        Call("calc.py", "add", [2.5, 1], 3.5),
        Call("calc.py", "scale", [[1, 2], 3], [3, 6]),
    ],
)  # fmt: skip
TASKS = {"pytest": PYTEST, "unittest": UNITTEST, "calls": CALLS}


@pytest.fixture(scope="module")
def level():
    """The strongest level here that can run this interpreter."""
    level = sandbox.best()
    if level == "bare" or (level == "guarded" and sandbox.python() != sys.executable):
        pytest.skip(f"full and guarded do not work here: {sandbox.problem('full')}")
    return level


@pytest.mark.parametrize("runner", TASKS)
def test_the_right_repair_is_resolved_and_the_bug_is_not(runner, level):
    task = TASKS[runner]
    gold = judge(task, tricks.GOLD, level=level)
    assert gold.status == "resolved" and gold.reward == 1, gold
    assert {*gold.tests.values()} == {"passed"} and gold.flags == ()
    assert (gold.f2p, gold.p2p, gold.mechanism) == (1, 1, level)
    assert gold.verdict_level == (3 if runner == "calls" else 2)
    bug = judge(task, tricks.BUGGY, level=level)
    assert (bug.status, bug.reward) == ("unresolved", 0) and bug.flags == (), bug
    assert bug.f2p == (0.25 if runner == "calls" else 0) and bug.p2p == 1


EVERY = {**tricks.OPEN, **tricks.PYTEST, **tricks.UNITTEST}


@pytest.mark.parametrize("name", EVERY)
def test_no_trick_passes_where_values_go_out(name, level):
    after = EVERY[name] | tricks.TESTS  # with the tests in the box it would have something to read
    found = judge(CALLS, after, level=level)
    assert found.status in ("unresolved", "tampered") and found.f2p < 1, found
    assert found.verdict_level == 3


@pytest.mark.parametrize("name", tricks.PYTEST)
def test_tricks_are_seen_by_what_they_do_to_pytest(name, level, monkeypatch):
    monkeypatch.setattr(verdict, "scan", lambda *_: [])
    found = judge(PYTEST, tricks.PYTEST[name], level=level)
    assert found.status in ("unresolved", "tampered"), found
    assert found.reward == 0


@pytest.mark.parametrize("name", tricks.UNITTEST)
def test_tricks_are_seen_by_what_they_do_to_unittest(name, level, monkeypatch):
    monkeypatch.setattr(verdict, "scan", lambda *_: [])
    found = judge(UNITTEST, tricks.UNITTEST[name], level=level)
    assert found.status in ("unresolved", "tampered"), found


@pytest.mark.parametrize("name", tricks.OPEN)
def test_what_tests_in_one_process_cannot_see_is_seen_in_the_patch(name, level, monkeypatch):
    found = judge(PYTEST, tricks.OPEN[name], level=level)
    assert found.status == "tampered" and found.reward == 0 and found.flags, found
    assert found.f2p == 1  # the tests were fooled
    monkeypatch.setattr(verdict, "scan", lambda *_: [])
    assert judge(PYTEST, tricks.OPEN[name], level=level).status == "resolved"


def test_what_is_flagged_and_what_is_not():
    before = {"a.py": "import inspect\nx = 1\n", "tests/test_a.py": "", "conftest.py": "a"}
    tests = {"tests/test_a.py": ""}

    def flags(**changed):
        return [flag.what for flag in scan(before, {**before, **changed}, tests)]

    assert flags(**{"a.py": "import inspect\nx = 2\n# gc, os._exit, eval()\n"}) == []
    assert flags(**{"a.py": "import inspect, gc\n"}) == ["imports gc"]
    assert flags(**{"a.py": "import os\nos._exit(0)\n"}) == ["uses _exit"]
    assert flags(**{"a.py": "import inspect\n__import__('_pytest')\n"}) == [
        "has the text '_pytest'",
        "uses __import__",
    ]
    assert flags(**{"conftest.py": "b"}) == ["runner file"]
    assert flags(**{"tests/test_a.py": None}) == ["deleted test"]
    assert [flag.tampering for flag in scan(before, {**before, "tests/test_a.py": "x"}, tests)] == [
        False
    ]
    assert flags(**{"random.py": "x"}) == ["shadows a module"]
    assert (
        flags(**{"b.py": "class A:\n    def __eq__(self, o):\n        return self.x == o.x\n"})
        == []
    )
    assert flags(**{"b.py": "class A:\n    def __eq__(self, o):\n        return True\n"}) == [
        "__eq__ returns a constant"
    ]
    allowed = dataclasses.replace(PYTEST, allowed_flags=frozenset({"runner file"}))
    assert allowed.allowed_flags == {"runner file"}


def test_changed_tests_are_laid_again(level):
    after = {
        **tricks.BUGGY,
        "tests/test_calc.py": "def test_add():\n    pass\n",
        "tests/help.py": "",
    }
    found = judge(PYTEST, after, level=level)
    assert found.status == "unresolved"
    assert found.flags == ("tests/help.py: changed test", "tests/test_calc.py: changed test")
    gold = judge(PYTEST, {**after, **tricks.GOLD}, level=level)
    assert gold.status == "resolved"


@pytest.mark.parametrize("runner", ["pytest", "calls"])
def test_endless_loops_and_broken_modules_are_the_programs_own(runner, level):
    task = dataclasses.replace(TASKS[runner], seconds=3.0)
    loop = {"calc.py": tricks.GOLD["calc.py"] + "\nwhile True:\n    pass\n"}
    assert judge(task, loop, level=level).status == "timeout"
    task = TASKS[runner]
    for text in ("def add(:\n", "raise RuntimeError", "import no_such_module", "\0"):
        found = judge(task, {"calc.py": text}, level=level)
        assert found.status == "unresolved" and found.reward == 0, found
    assert judge(task, {"calc.py": None}, level=level).status == "unresolved"


def test_partly_right_is_said_by_test(level):
    half = {"calc.py": tricks.GOLD["calc.py"].replace("value * factor", "value")}
    found = judge(PYTEST, half, level=level)
    assert (found.status, found.f2p, found.p2p) == ("unresolved", 1, 0)
    assert found.tests == {F2P[0]: "passed", F2P[1]: "passed", P2P[0]: "failed"}


@pytest.mark.parametrize("runner", ["pytest", "calls"])
def test_the_machines_failures_have_no_reward(runner, level):
    found = judge(dataclasses.replace(TASKS[runner], python="/no/python"), tricks.GOLD, level=level)
    assert (found.status, found.reward) == ("infra", None)
    assert "/no/python" in found.detail


def test_an_interpreter_without_pytest_is_infra(level):
    without = sandbox.Job(["/usr/bin/python3", "-c", "import pytest"], level=level)
    if sandbox.execute(without).code != 1:
        pytest.skip("there is no /usr/bin/python3 without pytest")
    found = judge(dataclasses.replace(PYTEST, python="/usr/bin/python3"), tricks.GOLD, level=level)
    assert (found.status, found.reward) == ("infra", None) and "pytest" in found.detail


def test_statuses_of_texts(level):
    gold = between(tricks.BUGGY, tricks.GOLD, "blocks").text()
    cases = {
        "": "empty",
        "I do not know.": "unparsable",
        gold.replace("a - b", "a / b"): "not_applied",
        gold.replace("a + b", "a - b"): "empty",
        f"The sign is wrong.\n\n{gold}": "resolved",
    }
    for text, status in cases.items():
        found = judge_text(CALLS, text, "blocks", level=level)
        assert found.status == status, (text, found)
        assert found.reward == (status == "resolved")


def test_what_cannot_be_written_is_the_patchs_fault(level):
    for path, text in (
        ("x" * 300, ""),
        ("d/" * 2000 + "x", ""),
        ("a.py", "\ud800"),
        ("\ud800", ""),
    ):
        found = judge(CALLS, {**tricks.GOLD, path: text}, level=level)
        assert (found.status, found.reward) == ("not_applied", 0), path
    large = {**tricks.GOLD, "large.txt": "x" * (verdict.LARGEST_FILES + 1)}
    assert judge(CALLS, large, level=level).status == "not_applied"


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        "import os\nwhile True:\n    os.fork()",
        "import os\nwhile True:\n    os.write(int(os.environ['REPORT_FD']), b'x' * 9999)",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(600)",
        "x = [0]\nwhile True:\n    x += x",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    ],
)
@pytest.mark.parametrize("runner", TASKS)
def test_attacks_as_repairs_are_worth_nothing(runner, attack, level):
    task = dataclasses.replace(TASKS[runner], seconds=10.0)
    found = judge(task, {"calc.py": tricks.BUGGY["calc.py"] + "\n" + attack}, level=level)
    assert found.reward == 0, found  # never None: it is not the machine that failed


def test_nothing_is_run_below_the_level_that_is_asked_for(monkeypatch):
    from jaxdeep.tools.sandbox import levels

    monkeypatch.setattr(levels, "problem", lambda level: "none here" if level != "bare" else "")
    with pytest.raises(ConfigError, match="'full' does not work here"):
        judge(CALLS, tricks.GOLD)


VALUES = [
    None, True, False, 0, 1, -1, 2**63, -(2**80), 0.0, -0.0, 1.0, 1e300, math.inf, "", "1", "é\udcff",
    b"", b"a", bytearray(b"a"), 1j, [], [1], [1.0], [True], (), (1,), (1, (2, [3])), {}, {"a": 1}, {1: "a"},
    {"$type": "set"}, {1, 2}, {1, "a"}, frozenset({1}), [[]], [()], {"a": (1, 2)}, {(1, 2): {3: [4]}},
]  # fmt: skip


def test_values_keep_their_exact_types_through_json():
    forms = [json.loads(json.dumps(values.encode(value))) for value in VALUES]
    for n, (value, form) in enumerate(zip(VALUES, forms, strict=True)):
        again = values.decode(form)
        assert type(again) is type(value) and again == value
        assert [m for m, other in enumerate(forms) if equal(form, other)] == [n], value
    nan = values.encode(math.nan)
    assert equal(nan, nan) and not equal(nan, values.encode(math.inf))


def test_what_only_claims_to_be_equal_is_not():
    class Same(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    endless = []
    endless.append(endless)
    for value in (Same(3), [Same(3)], object(), endless, list(range(200_000)), int):
        form = json.loads(json.dumps(values.encode(value)))
        assert not equal(form, values.encode(3)) and not equal(form, form)


def test_tolerance_and_sequences():
    one = values.encode((0.1 + 0.2, [1]))
    assert not equal(one, values.encode((0.3, [1])))
    assert equal(one, values.encode((0.3, [1])), tolerance=1e-9)
    assert not equal(values.encode(1), values.encode(1.0), tolerance=1e-9)
    assert not equal(one, values.encode([0.3, (1,)]), tolerance=1e-9)
    assert equal(one, values.encode([0.3, (1,)]), tolerance=1e-9, same_sequences=True)
    assert equal(values.encode(iter([(1, 2)])), [[1, 2]], same_sequences=True)
    assert not equal(values.encode({1, 2}), [1, 2], same_sequences=True)


def test_exceptions_and_kinds_of_values_go_out(level):
    source = (
        "def f(x):\n    if x < 0:\n        raise ValueError(x)\n    yield from range(x)\n\n\n"
        + (
            "def g(x):\n    return {x: (x, {x})}\n\n\nclass C:\n    @staticmethod\n    def h(*a):\n"
            "        print('noise')\n        return a\n"
        )
    )
    calls = [
        Call("m/n.py", "f", [3], {"$type": "iterator", "value": [0, 1, 2]}),
        Call("m/n.py", "g", [{"$type": "tuple", "value": []}], values.encode({(): ((), {()})})),
        Call("m/n.py", "C.h", [1, 2], {"$type": "tuple", "value": [1, 2]}),
        Call("m/n.py", "g", [[]], {"$raises": "TypeError"}),
    ]
    task = RepairTask("kinds", {"m/n.py": source}, "calls", calls=calls, seconds=60)
    found = judge(task, task.files, level=level)
    assert found.status == "resolved", found


LINE = {
    "instance_id": "calc",
    "files": tricks.BUGGY,
    "test_patch": between({}, tricks.TESTS, "unified").text(),
    "FAIL_TO_PASS": json.dumps(list(F2P)),
    "PASS_TO_PASS": list(P2P),
}


def test_a_line_of_a_task_file_is_a_task():
    task = RepairTask.from_line(LINE)
    assert task == dataclasses.replace(PYTEST, seconds=20.0)
    task = RepairTask.from_line(
        {"instance_id": "c", "files": tricks.BUGGY, "calls": [["add", [1, 2], 3]], "timeout": 5}
    )
    assert (task.runner, task.calls[0].path, task.seconds) == ("calls", "calc.py", 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instance_id": ""}, "without instance_id"),
        ({"files": {}}, "has no files"),
        ({"FAIL_TO_PASS": []}, "nothing tells whether it is solved"),
        ({"FAIL_TO_PASS": "not json"}, "FAIL_TO_PASS is not a list of names"),
        ({"PASS_TO_PASS": list(F2P)}, "named twice"),
        ({"test_patch": ""}, "tests in files that it does not have"),
        ({"test_patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"}, "does not apply: not_found"),
        ({"parser": "junit"}, "runner 'junit' is not"),
        ({"calls": [["add", 1]]}, "a call is"),
        ({"calls": [["add", [1], 1]], "files": {"a.py": "", "b.py": ""}}, "of which file"),
        ({"calls": [["c.py:add", [1], 1]]}, "files that it does not have"),
    ],
)
def test_a_task_that_cannot_be_judged_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        RepairTask.from_line(LINE | change)
