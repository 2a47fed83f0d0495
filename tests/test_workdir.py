"""Metrics that survive a kill, progress, and one run per folder."""

import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxdeep import console
from jaxdeep.console import progress
from jaxdeep.errors import ConfigError, DataError, JaxdeepError
from jaxdeep.metrics import Metrics, read_metrics
from jaxdeep.signals import Termination
from jaxdeep.workdir import home, lock_workdir, write_atomic


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]


def test_what_is_written_is_read_back(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(0, {"eval/em": 0.5})
        metrics.write(3, {"train/loss": np.float32(0.25), "tokens": 7, "note": "a\nb"})
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 0, "eval/em": 0.5},
            {"step": 3, "train/loss": 0.25, "tokens": 7, "note": "a\nb"},
        ]


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(1, {"loss": float("nan"), "norm": np.float32("inf"), "lr": 0.1})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "loss": None, "norm": None, "lr": 0.1, "nonfinite": ["loss", "norm"]}


@pytest.mark.parametrize("step", [4, 5])
def test_steps_only_grow(tmp_path, step):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(5, {})
        with pytest.raises(ValueError, match="not after the last row"):
            metrics.write(step, {})
    assert steps(tmp_path) == [5]


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert steps(tmp_path) == list(range(1, 8))  # readable as it is
    with Metrics(tmp_path, step=4) as metrics:
        assert steps(tmp_path) == [1, 2, 3, 4]
        with pytest.raises(ValueError, match="not after"):
            metrics.write(4, {})
        metrics.write(5, {"loss": 2.0})
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_killed_while_writing_leaves_whole_rows(tmp_path):
    program = (
        "import pathlib, sys\nfrom jaxdeep.metrics import Metrics\n"
        "metrics = Metrics(pathlib.Path(sys.argv[1]), step=0)\n"
        "for step in range(1, 10**9): metrics.write(step, {'x': 1.0}); print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        seen = [int(run.stdout.readline()) for _ in range(20)][-1]
        os.kill(run.pid, signal.SIGKILL)
    found = steps(tmp_path)
    assert found == list(range(1, len(found) + 1)) and len(found) >= seen


def test_a_file_that_is_not_metrics_is_refused_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not a row"):
        read_metrics(path)
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "absent.jsonl")


def test_an_atomic_write_that_fails_leaves_the_old_text(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_progress_in_a_log_file_is_whole_lines(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 600.0)
    assert list(progress(range(1000), "rollouts", "it")) == list(range(1000))
    text = capsys.readouterr().err
    lines = text.split("\n")
    assert "\r" not in text
    # the start and the end, and nothing between in the first ten minutes
    assert [line.split(" [")[0] for line in lines] == [
        "rollouts: 0/1000",
        "rollouts: 1000/1000",
        "",
    ]
    assert "left" in lines[1] and "it/s" in lines[1]


def test_progress_in_a_log_file_is_spaced(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.1)
    start = time.perf_counter()
    with progress(40, "steps", "step") as bar:
        for _ in range(40):
            time.sleep(0.01)
            bar.update()
    # a line at least every ten steps, and at most one in a tenth of a second, however long it took
    limit = (time.perf_counter() - start) / 0.1
    assert 3 <= capsys.readouterr().err.count("\n") <= limit + 2


def test_progress_of_a_resumed_run_starts_where_it_was_and_shows_the_postfix(capsys):
    with progress(10, "sft", "step", done=7) as bar:
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update(3)
    first, last, _ = capsys.readouterr().err.split("\n")
    assert first.startswith("sft: 7/10 [") and last.startswith("sft: 10/10 [")
    assert last.endswith(", loss=0.5]")


def test_progress_without_a_known_total_counts(capsys):
    list(progress(iter(range(3)), "rows", "row"))
    assert capsys.readouterr().err.split("\n")[-2].startswith("rows: 3/?")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress(range(3), "rollouts", "it"))
    assert "\r" in sys.stderr.getvalue() and "100%" in sys.stderr.getvalue()


def test_an_end_that_came_to_an_inner_run_is_known_to_the_outer_one():
    with Termination() as outer:
        with Termination() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.asked and outer.asked
        with Termination() as other:
            pass
        assert not other.asked


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with lock_workdir(tmp_path / "run"):
        with (
            pytest.raises(JaxdeepError, match=f"in use by another run .process {os.getpid()}"),
            lock_workdir(tmp_path / "run"),
        ):
            pass
        with lock_workdir(tmp_path / "other"):
            pass
    with lock_workdir(tmp_path / "run"):
        pass


def test_a_killed_run_holds_no_lock(tmp_path):
    program = (
        "import pathlib, sys\nfrom jaxdeep.workdir import lock_workdir\n"
        "with lock_workdir(pathlib.Path(sys.argv[1])): print('held', flush=True); input()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as run:
        assert run.stdout.readline() == "held\n"
        with pytest.raises(JaxdeepError, match=f"process {run.pid}"), lock_workdir(tmp_path):
            pass
        os.kill(run.pid, signal.SIGKILL)
    with lock_workdir(tmp_path):
        pass


@pytest.mark.parametrize(
    ("name", "says"),
    [("file", "--workdir=.*file is a file"), ("file/a/b", "lies below .*file, which is a file")],
)
def test_a_workdir_that_is_a_file_or_below_one_is_refused(tmp_path, name, says):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=says), lock_workdir(tmp_path / name):
        pass


@pytest.mark.parametrize("where", ["folder", "parent"])
def test_a_workdir_that_may_not_be_written_to_is_refused(tmp_path, where, monkeypatch):
    """Said by the system, since tests may run as root, who may write anywhere."""
    workdir = tmp_path if where == "folder" else tmp_path / "a" / "b"
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path} may not be written to"):
        lock_workdir(workdir).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_refuses_to_be_written_is_named_and_a_full_one_is_full(
    tmp_path, monkeypatch
):
    for number, kind in ((errno.EROFS, ConfigError), (errno.ENOSPC, OSError)):

        def refuse(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
        with pytest.raises(kind, match=os.strerror(number)), lock_workdir(tmp_path / "run"):
            pass


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(home("~/runs")) == "/home/me/runs" and str(home("a/~")) == "a/~"
    with pytest.raises(ConfigError, match="no home folder of that name"):
        home("~nobody-of-this-name/x")
