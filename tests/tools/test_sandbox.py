"""Boxes: what they hold, what they report, and that nothing is left of a run."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time

import pytest

from jaxdeep.errors import ConfigError, DataError
from jaxdeep.tools import sandbox
from jaxdeep.tools.sandbox import levels, selftest, slots
from jaxdeep.tools.sandbox.supervise import Kept

LIMITS = sandbox.Limits(seconds=60, memory_mb=256)


@pytest.fixture(params=["full", "guarded"])
def level(request):
    problem = sandbox.problem(request.param)
    if problem:
        pytest.skip(f"the level {request.param} does not work here: {problem}")
    return request.param


def traces():
    """Folders of boxes that this process made."""
    own = f"jaxdeep-box-{os.getpid()}-"
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(own)}


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    used, slot = set(), slots.slot

    @contextlib.contextmanager
    def noted():
        with slot() as user:
            used.add(user)
            yield user

    monkeypatch.setattr(slots, "slot", noted)
    yield
    assert not traces()
    for user in used - {None}:
        # suppressed: somebody else has it by now
        with open(slots.lock_file(user), "w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert slots.processes_of(user) == []


def python(level, source, files=None, **options):
    options = {"limits": LIMITS, **options}
    command = [sys.executable if level == "full" else sandbox.python(), "main.py"]
    job = sandbox.Job(command, {"main.py": source, **(files or {})}, level=level, **options)
    return sandbox.execute(job)


@pytest.fixture(scope="module")
def victim():
    with selftest.host() as settings:
        yield settings


def test_no_attack_that_ends_by_itself_gets_what_it_wants(level, victim):
    assert selftest.try_attacks(selftest.TOGETHER, level, victim) == {}


@pytest.mark.parametrize("name", selftest.ALONE)
def test_a_limit_ends_what_would_not_end(level, name, victim):
    assert selftest.try_attacks([name], level, victim) == {}


@pytest.mark.slow
def test_many_files_are_held_by_time(level, victim, monkeypatch):
    monkeypatch.setitem(selftest.ALONE, "many_files", (selftest.SHORT, None))
    assert selftest.try_attacks(["many_files"], level, victim) == {}


def test_the_self_test_sees_what_a_level_does_not_hold():
    report = sandbox.self_test("bare")
    assert {"read_host", "tcp", "udp", "local_sockets", "user_namespace"} <= {*report.escaped}
    assert {"endless_loop", "daemon", "output_flood"} <= {*report.held}
    assert "escaped: tcp" in report.text()


def test_a_run_below_the_required_level_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(levels, "problem", lambda level: "" if level == "bare" else "no namespaces")
    with pytest.raises(
        ConfigError, match=r"'full' does not work here: no namespaces[\s\S]*AppArmor"
    ):
        sandbox.execute(sandbox.Job(["true"]))
    with pytest.raises(ConfigError, match=r"'guarded' does not work here[\s\S]*landlockpy"):
        sandbox.execute(sandbox.Job(["true"], level="guarded"))
    with pytest.raises(ConfigError, match="must be one of bare, guarded, full"):
        sandbox.execute(sandbox.Job(["true"], level="strong"))
    assert sandbox.best() == "bare"


def test_a_program_gets_its_files_its_input_and_a_report(level, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("from the folder")
    (tmp_path / "deep" / "link").symlink_to("a.txt")
    os.mkfifo(tmp_path / "pipe")
    source = """
import os, sys
text = sys.stdin.read()
os.write(int(os.environ["REPORT_FD"]), b"%d" % len(text))
print(sorted(os.listdir(".")), open("deep/link").read(), open("b.bin", "rb").read(), os.environ["A"])
print(os.path.samefile(os.environ["HOME"], "."), file=sys.stderr)
sys.exit(7)
"""
    result = python(
        level, source, {"b.bin": b"\xff\0"}, folder=tmp_path, stdin=b"x" * 300_000,
        environment={"A": "value"},
    )  # fmt: skip
    assert (result.status, result.code, result.report) == ("exited", 7, b"300000")
    assert "['b.bin', 'deep', 'main.py'] from the folder b'\\xff\\x00' value" in result.output
    assert "True" in result.output
    assert result.level == level and result.cpu > 0 and result.peak_mb > 0


def test_fixed_files_stay_as_they_are(level):
    if level == "guarded" and not slots.available():
        pytest.skip("fixed files at the level guarded need root")
    source = """
import os, shutil
for act in (lambda: open("tests/a.py", "w"), lambda: os.remove("tests/a.py"),
            lambda: os.rename("tests/a.py", "b.py"), lambda: os.chmod("tests/a.py", 0o777),
            lambda: os.replace("main.py", "tests/a.py")):
    try:
        act()
        print("changed")
    except OSError:
        pass
open("tests/other.txt", "w").close()
print(open("tests/a.py").read(), os.listdir("tests"))
"""
    result = python(level, source, {"tests/a.py": "overwritten"}, fixed={"tests/a.py": "kept"})
    assert result.output.startswith("kept") and "other.txt" in result.output, result


def test_secrets_of_our_environment_are_not_in_the_box(level, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    source = """
import glob, os
print(sorted(os.environ))
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
print(sorted(int(fd) for fd in os.listdir("/proc/self/fd")) if os.access("/proc/self/fd", 4) else "")
"""
    result = python(level, source)
    assert result.status == "exited" and "LANG" in result.output
    assert "HF_TOKEN" not in result.output and "secret-value" not in result.output


def test_a_signal_is_told_from_an_exit_code(level):
    result = python(level, "import os; os.kill(os.getpid(), 11)")
    assert (result.status, result.code) == ("signal", signal.SIGSEGV)
    assert python(level, "raise SystemExit(1)").code == 1


def test_output_keeps_its_beginning_and_its_end(level):
    limits = dataclasses.replace(LIMITS, output_bytes=2000)
    source = "print('first'); print('x' * 100_000); print('last')"
    result = python(level, source, limits=limits)
    assert result.output.startswith("first") and result.output.endswith("last\n")
    assert "bytes left out" in result.output and len(result.output) < 2100


def test_what_holds_the_pipe_open_does_not_hold_up_the_result(level):
    source = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(500)"], start_new_session=True)
print("done", flush=True)
"""
    result = python(level, source)
    assert (result.status, result.output) == ("exited", "done\n")
    assert result.seconds < 50  # not the 60 s of the limit


@pytest.mark.parametrize("kind", ["missing", "killed", "broken"])
def test_what_says_nothing_about_the_program_is_infra(level, kind, monkeypatch):
    if kind == "missing":
        result = sandbox.execute(sandbox.Job(["/no/such/python"], level=level))
        assert "/no/such/python" in result.detail
    elif kind == "killed":  # the process outside that watches over the box

        def kill():
            mark = b"--die-with-parent" if level == "full" else b"launch.py"
            for _ in range(600):
                for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):
                        line = path.read_bytes()
                        if mark in line and b"wait-to-be-killed" in line:
                            time.sleep(0.3)
                            os.kill(int(path.parent.name), signal.SIGKILL)
                            return
                time.sleep(0.05)

        killer = threading.Thread(target=kill)
        killer.start()
        command = [sys.executable if level == "full" else sandbox.python(), "-c"]
        program = "import time; 'wait-to-be-killed'; time.sleep(50)"
        result = sandbox.execute(sandbox.Job([*command, program], limits=LIMITS, level=level))
        killer.join()
    else:

        def fail(*_, **__):
            raise OSError(24, "too many open files")

        monkeypatch.setattr("subprocess.Popen", fail)
        result = python(level, "")
    assert (result.status, result.code) == ("infra", None), result
    assert result.detail


def test_a_run_can_be_cancelled(level):
    command = [sys.executable if level == "full" else sandbox.python(), "-c"]
    job = sandbox.Job([*command, "import time; time.sleep(50)"], limits=LIMITS, level=level)

    async def cancelled():
        task = asyncio.create_task(sandbox.run(job))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_runs_beside_each_other_do_not_meet(level):
    async def several():
        command = [sys.executable if level == "full" else sandbox.python(), "-c"]
        source = "import os; open('n', 'x').write(os.environ['N']); print(open('n').read())"
        jobs = [
            sandbox.Job([*command, source], level=level, limits=LIMITS, environment={"N": str(n)})
            for n in range(6)
        ]
        return await asyncio.gather(*map(sandbox.run, jobs))

    assert [result.output for result in asyncio.run(several())] == [f"{n}\n" for n in range(6)]


def test_what_is_killed_with_a_slot_is_nobody_else():
    # mechanisms are tried as a user while boxes of other threads begin and end
    assert slots.TRIAL not in range(slots.FIRST, slots.FIRST + slots.COUNT)
    if slots.available():
        with slots.slot() as first, slots.slot() as second:
            assert len({first, second, slots.TRIAL}) == 3


@pytest.mark.slow
def test_hostile_programs_among_many_change_no_result(level):
    hostile = (
        "import os\nwhile True:\n    os.fork()",
        "import os\nos.setsid()\nwhile True:\n    os.write(1, b'x' * 9999)",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(99)",
        "x = [0]\nwhile True:\n    x += x",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
    )
    limits = sandbox.Limits(seconds=20, memory_mb=128, flood_bytes=2**20)
    command = [sys.executable if level == "full" else sandbox.python(), "-S", "-c"]

    def one(n):
        program = hostile[n // 20 % len(hostile)] if n % 20 == 0 else f"print({n} ** 2)"
        return sandbox.execute(sandbox.Job([*command, program], limits=limits, level=level))

    def memory():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(1, 20)))
        before = memory()
        results = list(pool.map(one, range(400)))
    assert [r.output for n, r in enumerate(results) if n % 20] == [
        f"{n**2}\n" for n in range(400) if n % 20
    ]
    assert {r.status for n, r in enumerate(results) if n % 20} == {"exited"}
    assert memory() < 1.2 * before + 4096  # pages


def test_what_a_program_leaves_on_disk_is_removed(level):
    source = """
import os
for n in range(3000):
    os.mkdir("d")
    os.chdir("d")
open("file", "w").close()
os.chmod(".", 0)
"""
    result = python(level, source)
    assert result.status == "exited" and result.code == 0, result


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", ""])
def test_paths_stay_inside(path):
    with pytest.raises(DataError, match="not a path inside"):
        sandbox.Job(["true"], {path: ""})


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="list of words"):
        sandbox.Job("ls -l")
    with pytest.raises(ConfigError, match="box's seconds=0 "):
        sandbox.Limits(seconds=0)
    with pytest.raises(ConfigError, match="box's memory_mb=nan "):
        sandbox.Limits(memory_mb=float("nan"))
    with pytest.raises(DataError, match="not an absolute path"):
        sandbox.Job(["true"], readable=["no/such"])
    if not sandbox.problem("guarded"):
        with pytest.raises(DataError, match="is not a folder"):
            sandbox.execute(sandbox.Job(["true"], folder=tmp_path / "none", level="guarded"))
        with pytest.raises(DataError, match="do not fit in the box's disk_mb=1"):
            limits = sandbox.Limits(disk_mb=1)
            sandbox.execute(
                sandbox.Job(["true"], {"a": b"x" * 2**21}, limits=limits, level="guarded")
            )
        (tmp_path / "link").symlink_to("/tmp")
        with pytest.raises(DataError, match="symbolic link"):
            sandbox.execute(sandbox.Job(["true"], {"link/x": ""}, folder=tmp_path, level="guarded"))


@pytest.mark.parametrize("sizes", [[3], [10], [4, 4, 4, 4], [1] * 30, [50, 1]])
def test_what_is_kept_is_the_first_and_the_last_half(sizes):
    text, kept = bytes(range(sum(sizes))), Kept(10)
    for size in sizes:
        kept.add(text[kept.total : kept.total + size])
    if len(text) <= 10:
        assert kept.value() == text
    else:
        assert kept.value().startswith(text[:5]) and kept.value().endswith(text[-5:])
        assert f"{len(text) - 10} bytes left out".encode() in kept.value()
