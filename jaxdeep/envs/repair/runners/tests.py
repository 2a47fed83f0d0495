"""Runs inside a box: runs test files with pytest or unittest and sends out each test's outcome.

The input is one line of JSON: a nonce, the runner, the test files in order, options. Records go to
the report channel, one a line: the nonce and the JSON of {"test": ID, "outcome": ...}, at the end
{"end": exit code}. An id is PATH::NAME or PATH::CLASS::NAME. What it needs is imported before
anything of the repository can be.
"""

import json
import os
import sys


def main():
    sys.path[:] = [path for path in sys.path if path]
    told = json.loads(sys.stdin.readline())
    nonce = told["nonce"]
    report = os.fdopen(int(os.environ["REPORT_FD"]), "w", encoding="ascii")
    write, flush, dumps = report.write, report.flush, json.dumps

    def record(**entry):
        write(nonce + " " + dumps(entry) + "\n")
        flush()

    runner = {"pytest": run_pytest, "unittest": run_unittest}[told["runner"]]
    code = runner(told, record)
    record(end=int(code))
    sys.stdout.flush()
    os._exit(int(code))  # what the code under test registered for the exit is not run


def run_pytest(told, record):
    try:
        import pytest
    except ImportError as error:
        record(failed=f"there is no pytest: {error}")
        return 3

    record(began=True)  # before anything of the repository can be imported

    class Recorder:
        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logreport(self, report):
            if report.outcome == "skipped":
                outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            else:
                outcome = report.outcome
                if hasattr(report, "wasxfail") and report.when == "call" and report.passed:
                    outcome = "xpassed"
            record(test=report.nodeid, when=report.when, outcome=outcome)

        @pytest.hookimpl(trylast=True)
        def pytest_collectreport(self, report):
            if report.failed:
                record(collection=report.nodeid, error=str(report.longrepr)[-2000:])

    sys.path.insert(0, os.getcwd())
    for path in reversed(told["path"]):
        sys.path.insert(0, os.path.join(os.getcwd(), path))
    arguments = ["-c", told["configuration"], "--rootdir", os.getcwd(), "-o", "addopts="]
    arguments += ["-p", "no:cacheprovider", "--import-mode=importlib", "-q", "--tb=short"]
    arguments += ["--continue-on-collection-errors"]
    return pytest.main([*arguments, *told["files"]], plugins=[Recorder()])


def run_unittest(told, record):
    import importlib.util
    import unittest

    root = os.getcwd()
    sys.path.insert(0, root)
    for path in reversed(told["path"]):
        sys.path.insert(0, os.path.join(root, path))
    paths = {}

    class Recorder(unittest.TextTestResult):
        def note(self, test, outcome):
            inner = getattr(test, "test_case", test)  # of a subtest
            path = paths.get(type(inner).__module__)
            if path is None:
                record(collection=str(test), error=outcome)
                return
            name = f"{path}::{type(inner).__qualname__}::{inner._testMethodName}"
            record(test=name, when="sub" if inner is not test else "call", outcome=outcome)

        def addSuccess(self, test):
            super().addSuccess(test)
            self.note(test, "passed")

        def addFailure(self, test, err):
            super().addFailure(test, err)
            self.note(test, "failed")

        def addError(self, test, err):
            super().addError(test, err)
            self.note(test, "failed")

        def addSkip(self, test, reason):
            super().addSkip(test, reason)
            self.note(test, "skipped")

        def addExpectedFailure(self, test, err):
            super().addExpectedFailure(test, err)
            self.note(test, "xfailed")

        def addUnexpectedSuccess(self, test):
            super().addUnexpectedSuccess(test)
            self.note(test, "xpassed")

        def addSubTest(self, test, subtest, err):
            super().addSubTest(test, subtest, err)
            if err is not None:
                self.note(subtest, "failed")

    loader, suite = unittest.TestLoader(), unittest.TestSuite()
    for path in told["files"]:
        module = path[:-3].replace("/", ".")
        try:
            spec = importlib.util.spec_from_file_location(module, os.path.join(root, path))
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[module] = loaded
            spec.loader.exec_module(loaded)
        except BaseException as error:
            record(collection=path, error=f"{type(error).__name__}: {error}")
            continue
        paths[module] = path
        suite.addTests(loader.loadTestsFromModule(loaded))
    result = unittest.TextTestRunner(resultclass=Recorder).run(suite)
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    main()
