"""One run of a program in a box of its own, from its files to its result, with nothing left."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence

import jaxdeep.tools.sandbox.bubblewrap as bubblewrap
import jaxdeep.tools.sandbox.guard as guard
import jaxdeep.tools.sandbox.levels as levels
import jaxdeep.tools.sandbox.slots as slots
from jaxdeep.errors import ConfigError, DataError, WorldError
from jaxdeep.tools.sandbox.limits import Level, Limits, Result
from jaxdeep.tools.sandbox.supervise import Channel, Ended, Prepared, descendants, supervise

Content = str | bytes

_FIXED_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "USER": "box",
    "LOGNAME": "box",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",  # threads are counted as processes
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A program to run and what it is given.

    The work folder, where the command begins, holds a copy of `folder` and the `files` (path to
    contents). `fixed` are files that the program cannot change: read-only mounts at `full`; at
    `guarded`, where we are root, another user's files that it can neither write, move nor remove.
    `environment` is added to a few fixed values; nothing of ours is in it. `readable`: absolute
    paths of the host to show, besides the system and the command's interpreter.

    The program finds in REPORT_FD the number of an open pipe; what it writes there is the result's
    `report`.
    """

    command: Sequence[str]
    files: Mapping[str, Content] = dataclasses.field(default_factory=dict)
    folder: str | os.PathLike | None = None
    fixed: Mapping[str, Content] = dataclasses.field(default_factory=dict)
    limits: Limits = dataclasses.field(default_factory=Limits)
    level: Level = "full"
    stdin: bytes = b""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    readable: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.command, str) or not self.command:
            raise ConfigError(f"a command is a list of words, not {self.command!r}")
        for path in (*self.files, *self.fixed):
            parts = pathlib.PurePosixPath(path).parts
            if not parts or path.startswith("/") or ".." in parts or "\0" in path:
                raise DataError(f"{path!r} is not a path inside the box's folder")
        for path in self.readable:
            if not os.path.isabs(path) or not os.path.exists(path):
                raise DataError(f"{path!r}, to be shown in the box, is not an absolute path here")


async def run(job: Job) -> Result:
    """Runs a job in a new box; see `execute`. As many run at one time as there are cores.
    Cancelling it ends the run, and waits until nothing is left of it."""
    cancel = threading.Event()
    channel = Channel(job.stdin, cancel=cancel)
    future = asyncio.wrap_future(_pool().submit(execute, job, channel))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel.set()
        await asyncio.wait([future])
        raise


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    # more boxes than cores only make each other's clocks run out
    return concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)), "sandbox")


def execute(job: Job, channel: Channel | None = None) -> Result:
    """Runs a job in a new box and waits for it. When it returns, no process and no file of the run
    is left. `channel` takes the place of the job's input and may end it early, which has the status
    "infra".

    Raises `ConfigError` where the job's level does not work here, `DataError` for a folder that is
    not there and for files that do not fit. All else is in the `Result`: a run that could not be
    made, or that ended without a record of how, has the status "infra"."""
    levels.need(job.level)
    channel = channel or Channel(job.stdin)
    try:
        with slots.slot() as user, _staging() as staging:
            source = staging / "src"
            _fill(source, job)
            if job.level == "full":
                ended = _boxed(job, staging, user, channel)
            else:
                ended = _guarded(job, staging, user, channel)
            if user is not None:
                slots.clear(user)  # before its files are removed
    except (OSError, WorldError) as error:
        detail = f"{type(error).__name__}: {error}"
        return Result("infra", None, "", b"", 0.0, 0.0, 0.0, job.level, detail)
    return _result(ended, job)


@contextlib.contextmanager
def _staging() -> Iterator[pathlib.Path]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"jaxdeep-box-{os.getpid()}-"))
    try:
        folder.chmod(0o711)  # the slot's user passes through it
        yield folder
    finally:
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(folder)
        if folder.exists():  # folders in it were closed, or are nested too deep
            subprocess.run(["chmod", "-R", "u+rwx", str(folder)], capture_output=True)
            subprocess.run(["rm", "-rf", str(folder)], check=True, capture_output=True)


def _fill(source: pathlib.Path, job: Job) -> None:
    """Writes the files of a job."""
    if job.folder is None:
        source.mkdir()
    elif not os.path.isdir(job.folder):
        raise DataError(f"the box's folder {os.fspath(job.folder)!r} is not a folder")
    else:
        shutil.copytree(job.folder, source, symlinks=True, ignore=_special)
    for path in job.fixed:
        (source / path).unlink(missing_ok=True)
    for path, content in job.files.items():
        if path not in job.fixed:
            _write(source, path, content)
    size = guard.folder_mb(source)
    if size > job.limits.disk_mb:
        raise DataError(
            f"files of {size:.1f} MB do not fit in the box's disk_mb={job.limits.disk_mb}"
        )


def _special(folder: str, names: list[str]) -> list[str]:
    """What is neither file, folder nor link: a copy of a pipe would wait for ever."""
    paths = {name: os.path.join(folder, name) for name in names}
    return [
        n
        for n, p in paths.items()
        if not (os.path.isfile(p) or os.path.isdir(p) or os.path.islink(p))
    ]


def _write(folder: pathlib.Path, path: str, content: Content) -> pathlib.Path:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if any(place.is_symlink() for place in (target, *target.parents) if place != folder):
        real = target.parent.resolve()
        if target.is_symlink() or not real.is_relative_to(folder.resolve()):
            raise DataError(f"{path!r} is or passes a symbolic link of the folder")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    target.write_bytes(data)
    return target


def _own(folder: pathlib.Path, user: int | None) -> None:
    """Gives a folder and all in it to the slot's user."""
    if user is not None:
        for place, _, names in os.walk(folder):
            for path in (place, *(os.path.join(place, name) for name in names)):
                os.lchown(path, user, user)


def _environment(job: Job, home: str, temporary: str, report_fd: int) -> dict[str, str]:
    folders = [str(pathlib.Path(job.command[0]).parent)] if job.command[0].startswith("/") else []
    path = ":".join([*folders, "/usr/local/bin", "/usr/bin", "/bin"])
    own = {"PATH": path, "HOME": home, "TMPDIR": temporary, "REPORT_FD": str(report_fd)}
    return {**_FIXED_ENVIRONMENT, **own, **job.environment}


def _memory_of(user: int | None):
    return descendants if user is None else (lambda _: slots.processes_of(user))


def _boxed(job: Job, staging: pathlib.Path, user: int | None, channel: Channel) -> Ended:
    fixed = {path: _write(staging / "fixed", path, job.fixed[path]) for path in job.fixed}
    _own(staging / "src", user)
    with contextlib.ExitStack() as stack:

        def prepare(status_fd: int, report_fd: int) -> Prepared:
            box = bubblewrap.Box(
                job.command,
                source=staging / "src",
                fixed=fixed,
                limits=job.limits,
                environment=_environment(job, bubblewrap.WORK, "/tmp", report_fd),
                readable=job.readable,
                status_fd=status_fd,
                user=user,
            )
            stack.callback(box.close)
            return Prepared(box.command, tuple(box.fds), bubblewrap.stop, _memory_of(user))

        ended = supervise(prepare, job.limits, channel)
    bubblewrap.wait_until_empty(ended.records)
    return ended


def _guarded(job: Job, staging: pathlib.Path, user: int | None, channel: Channel) -> Ended:
    source, temporary = staging / "src", staging / "tmp"
    temporary.mkdir()
    if user is not None and not bubblewrap.reachable(job.command[0]):
        raise WorldError(
            f"{job.command[0]} cannot be run by a box's own user {user}, because a folder above it "
            "is closed to others: use an interpreter outside it, or the level full"
        )
    _own(source, user)
    _own(temporary, user)
    for path, content in job.fixed.items():
        target = _write(source, path, content)
        target.chmod(0o444)
        for place in target.parents:
            if user is not None:
                os.chown(place, 0, 0)
                place.chmod(0o1777)  # sticky: only root moves or removes root's file in it
            if place == source:
                break

    def prepare(status_fd: int, report_fd: int) -> Prepared:
        command = guard.command(
            job.command,
            level=job.level,
            user=user,
            folder=source,
            temporary=temporary,
            limits=job.limits,
            environment=_environment(job, str(source), str(temporary), report_fd),
            readable=job.readable,
            status_fd=status_fd,
            report_fd=report_fd,
        )

        def disk() -> float:
            return guard.folder_mb(staging)

        return Prepared(command, (), guard.stop, _memory_of(user), disk)

    return supervise(prepare, job.limits, channel)


def _result(ended: Ended, job: Job) -> Result:
    """What the records say of how the program ended."""
    began, output, setup = True, ended.output, b""
    if job.level == "full":
        setup, mark, output = ended.output.partition(bubblewrap.READY)
        began = bool(mark)
    record = {key: value for entry in ended.records for key, value in entry.items()}
    code, detail = record.get("exit-code"), record.get("failed", "")
    cpu = max(ended.cpu, record.get("cpu", 0.0))
    if job.level == "full" and code is not None and 128 < code <= 128 + 64:
        code = 128 - code  # how a shell, and bubblewrap, say that a signal ended it
    if ended.cancelled:
        status, code, detail = "infra", None, "cancelled"
    elif not began or (code is None and ended.killed is None):
        lines = (setup if job.level == "full" else b"").decode("utf-8", "replace").strip()
        detail = detail or lines or "it ended without a record of how"
        status, code, output = "infra", None, output if began else b""
    elif ended.killed is not None:
        status, code = ended.killed, None
    elif code >= 0:
        status = "exited"
    else:
        status, code = "signal", -code
        if code == signal.SIGXFSZ:
            status, code = "disk", None
        elif code in (signal.SIGXCPU, signal.SIGKILL) and cpu >= _cpu_limit(job.limits):
            status, code = "timeout", None
    text = output.decode("utf-8", "replace")
    return Result(
        status, code, text, ended.report, ended.seconds, cpu, ended.peak_mb, job.level, detail
    )


def _cpu_limit(limits: Limits) -> float:
    return limits.cpu_seconds or limits.seconds + 1


def python() -> str:
    """An interpreter that boxes of every level can run: this one, or the system's where this one
    lies in a folder that the user of a box cannot enter."""
    if slots.available() and not bubblewrap.reachable(sys.executable):
        return shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
    return sys.executable
