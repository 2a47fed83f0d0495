"""From the outcomes of tests to whether a task is resolved, by two rules.

`strict`, for training: a test of FAIL_TO_PASS or PASS_TO_PASS must have passed. A skipped one
counts only where it was skipped before the change, and only for PASS_TO_PASS.

`swebench5`, to report scores that can be compared: what the package `swebench` 5 does with the log
of a run, parsers included, which come from the installed package.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from jaxdeep.errors import ConfigError

Rule = Literal["strict", "swebench5"]
Resolution = Literal["full", "partial", "no"]

_PASSED = frozenset({"passed", "xfailed"})
_FAILED = frozenset({"failed", "error", "skipped"})
_NAMES = {
    "PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped",
    "XFAIL": "xfailed",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The tests of a task by what became of them. A test with an outcome that a rule does not
    count, as one that passed although it was expected to fail under `swebench5`, is in no list."""

    f2p_passed: tuple[str, ...]
    f2p_failed: tuple[str, ...]
    p2p_kept: tuple[str, ...]
    p2p_broken: tuple[str, ...]

    @property
    def f2p(self) -> float:
        """Share of FAIL_TO_PASS that passed; 1 where there are none."""
        return _share(self.f2p_passed, self.f2p_failed)

    @property
    def p2p(self) -> float:
        """Share of PASS_TO_PASS that was kept; 1 where there are none."""
        return _share(self.p2p_kept, self.p2p_broken)

    @property
    def resolution(self) -> Resolution:
        """Full if everything is as it should be; partial if some of FAIL_TO_PASS passes and nothing
        is broken."""
        if self.f2p == self.p2p == 1:
            return "full"
        return "partial" if self.f2p > 0 and self.p2p == 1 else "no"


def _share(good: Sequence[str], bad: Sequence[str]) -> float:
    return len(good) / (len(good) + len(bad)) if good or bad else 1.0


def report(
    outcomes: Mapping[str, str],
    fail_to_pass: Sequence[str],
    pass_to_pass: Sequence[str],
    rule: Rule,
    *,
    skipped_before: Collection[str] = (),
) -> Report:
    """What a rule makes of the outcomes of tests: passed, failed, error, skipped, xfailed or
    others, by id; a test that is not there is missing. `skipped_before`: tests that were skipped
    before the change too. Raises `ConfigError` for an unknown rule."""
    if rule == "strict":

        def good(test: str) -> bool:
            return outcomes.get(test) == "passed"

        def kept(test: str) -> bool:
            return good(test) or (outcomes.get(test) == "skipped" and test in skipped_before)

        def bad(test: str) -> bool:
            return True

    elif rule == "swebench5":

        def outcome(test: str) -> str | None:
            key = resolve_id(test, outcomes)
            return None if key is None else outcomes[key]

        def good(test: str) -> bool:
            return outcome(test) in _PASSED

        def kept(test: str) -> bool:
            return outcome(test) in _PASSED | {"skipped"}

        def bad(test: str) -> bool:
            return outcome(test) is None or outcome(test) in _FAILED

    else:
        raise ConfigError(f"the rule of grading {rule!r} must be strict or swebench5")
    lists: list[list[str]] = [[], [], [], []]
    for tests, right, first in ((fail_to_pass, good, 0), (pass_to_pass, kept, 2)):
        for test in tests:
            if right(test):
                lists[first].append(test)
            elif bad(test):
                lists[first + 1].append(test)
    return Report(*map(tuple, lists))


def resolve_id(test: str, outcomes: Mapping[str, str]) -> str | None:
    """The id that a test has among the outcomes. 676 ids of SWE-bench Verified are cut off inside
    the brackets of their parameters: they stand for those that begin so, if these agree."""
    if test in outcomes:
        return test
    if test.count("[") <= test.count("]"):
        return None
    found = [key for key in outcomes if key.startswith(test)]
    agree = len({outcomes[key] in _PASSED for key in found}) == 1
    return found[0] if agree else None


def read_log(
    log: str | os.PathLike, parser: str, spec: Mapping[str, object] = {}
) -> dict[str, str] | None:
    """The outcomes that `swebench` reads from a log of its evaluation script; None where it says
    that the log cannot be graded. `parser` is a name of its registry, `spec` has what that parser
    asks for besides. Raises `ConfigError` where the package is missing or has no such parser."""
    try:
        harness = importlib.import_module("swebench.harness.grading")
    except ImportError as error:
        remedy = "pip install 'swebench>=5.0.2,<6'"
        raise ConfigError(f"the rule swebench5 needs swebench: {remedy} ({error})") from error
    if parser not in harness.PARSER_REGISTRY:
        known = ", ".join(sorted(harness.PARSER_REGISTRY))
        raise ConfigError(f"swebench has no log parser {parser!r}; it has {known}")
    statuses, graded = harness.get_logs_eval(
        types.SimpleNamespace(log_parser=parser, **spec), os.fspath(log)
    )
    if not graded:
        return None
    return {test: _NAMES.get(status, status.lower()) for test, status in statuses.items()}
