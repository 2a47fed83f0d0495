"""Rules of grading: `swebench5` is what the package does, `strict` counts what has passed alone."""

import random

import pytest

from jaxdeep.envs.repair.grading import read_log, report, resolve_id
from jaxdeep.errors import ConfigError

OUTCOMES = {
    "PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped",
    "XFAIL": "xfailed", "XPASS": "xpass",
}  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "strict", "swebench5"),
    [
        ("passed", ("good", "good"), ("good", "good")),
        ("xfailed", ("bad", "bad"), ("good", "good")),
        ("skipped", ("bad", "bad"), ("bad", "good")),
        ("failed", ("bad", "bad"), ("bad", "bad")),
        ("error", ("bad", "bad"), ("bad", "bad")),
        ("xpassed", ("bad", "bad"), (None, None)),
        ("missing", ("bad", "bad"), ("bad", "bad")),
    ],
)
def test_each_outcome_by_both_rules(outcome, strict, swebench5):
    outcomes = {} if outcome == "missing" else {"a": outcome, "b": outcome}
    for rule, (first, second) in (("strict", strict), ("swebench5", swebench5)):
        found = report(outcomes, ["a"], ["b"], rule)
        assert (found.f2p_passed, found.f2p_failed) == {
            "good": (("a",), ()), "bad": ((), ("a",)), None: ((), ())
        }[first]  # fmt: skip
        assert (found.p2p_kept, found.p2p_broken) == {
            "good": (("b",), ()), "bad": ((), ("b",)), None: ((), ())
        }[second]  # fmt: skip


def test_a_skip_is_kept_where_it_was_one_before():
    found = report({"a": "passed", "b": "skipped"}, ["a"], ["b"], "strict", skipped_before=["b"])
    assert found.resolution == "full"
    found = report({"a": "skipped"}, ["a"], [], "strict", skipped_before=["a"])
    assert (found.resolution, found.f2p, found.p2p) == ("no", 0, 1)
    assert report({"a": "passed"}, ["a", "b"], [], "strict").resolution == "partial"
    assert report({"a": "passed"}, ["a"], ["b"], "strict").resolution == "no"


def test_ids_that_were_cut_off_stand_for_those_that_begin_so():
    outcomes = {"t[a b]": "passed", "t[a c]": "xfailed", "u[a b]": "passed", "u[a c]": "failed"}
    assert resolve_id("t[a", outcomes) == "t[a b]"
    assert resolve_id("u[a", outcomes) is None  # they disagree
    assert resolve_id("t", outcomes) is None  # it is not cut off
    assert resolve_id("u[a c]", outcomes) == "u[a c]"
    assert report(outcomes, ["t[a"], [], "strict").f2p == 0
    assert report(outcomes, ["t[a"], [], "swebench5").f2p == 1


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="must be strict or swebench5"):
        report({}, ["a"], [], "lenient")


def test_the_package_and_we_agree_on_random_outcomes():
    harness = pytest.importorskip("swebench.harness.grading", exc_type=ImportError)
    rng = random.Random(0)
    names = [f"tests/test_{a}.py::t[{b}{c}]" for a in "ab" for b in "xy" for c in ("", " z", "-1")]
    cut = [name[:-2] for name in names] + ["a docstring with [ in it", "plain"]
    for _ in range(500):
        statuses = {
            name: rng.choice(list(OUTCOMES)) for name in rng.sample(names, rng.randint(0, 12))
        }
        both = rng.sample(names + cut, rng.randint(1, 12))
        f2p, p2p = both[: len(both) // 2], both[len(both) // 2 :]
        theirs = harness.get_eval_tests_report(statuses, {"FAIL_TO_PASS": f2p, "PASS_TO_PASS": p2p})
        ours = report({k: OUTCOMES[v] for k, v in statuses.items()}, f2p, p2p, "swebench5")
        assert list(ours.f2p_passed) == theirs["FAIL_TO_PASS"]["success"]
        assert list(ours.f2p_failed) == theirs["FAIL_TO_PASS"]["failure"]
        assert list(ours.p2p_kept) == theirs["PASS_TO_PASS"]["success"]
        assert list(ours.p2p_broken) == theirs["PASS_TO_PASS"]["failure"]
        assert f"RESOLVED_{ours.resolution.upper()}" == harness.get_resolution_status(theirs)


LOG = """\
>>>>> Start Test Output
PASSED tests/test_a.py::test_one
{second} tests/test_a.py::test_two
>>>>> End Test Output
>>>>> Test Exit Code: {code}
"""


@pytest.mark.parametrize(
    ("log", "outcomes"),
    [
        (LOG.format(second="FAILED", code=1), {"one": "passed", "two": "failed"}),
        (LOG.format(second="PASSED", code=0), {"one": "passed", "two": "passed"}),
        (LOG.format(second="PASSED", code=1), None),
        (LOG.format(second="PASSED", code=0) + ">>>>> Patch Apply Failed\n", None),
        ("PASSED tests/test_a.py::test_one\n", None),
    ],
)
def test_logs_are_read_as_the_package_reads_them(log, outcomes, tmp_path):
    pytest.importorskip("swebench.harness.grading", exc_type=ImportError)
    (tmp_path / "log").write_text(log)
    found = read_log(tmp_path / "log", "parse_log_pytest")
    assert found == (outcomes and {f"tests/test_a.py::test_{k}": v for k, v in outcomes.items()})
    with pytest.raises(ConfigError, match="no log parser 'none'"):
        read_log(tmp_path / "log", "none")


def test_without_the_package_logs_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "swebench.harness.grading", None)
    with pytest.raises(ConfigError, match="pip install 'swebench"):
        read_log(tmp_path / "log", "parse_log_pytest")
