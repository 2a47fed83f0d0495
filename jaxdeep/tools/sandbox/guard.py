"""The levels `guarded` (Landlock and a filter of system calls) and `bare` (limits alone).

Both run in a folder of the host, through `launch.py`. `guarded` needs no privilege and no
namespace: the kernel lets a program lock itself in. It can write its own folder only, reads the
system's files and the interpreter's, has no network, and can neither signal nor trace what is
outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence

import jaxdeep.tools.sandbox.bubblewrap as bubblewrap
import jaxdeep.tools.sandbox.seccomp as seccomp
from jaxdeep.tools.sandbox.limits import Level, Limits

LAUNCH = pathlib.Path(__file__).with_name("launch.py")
_READABLE = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_ABI_TRUNCATE, _ABI_SCOPES = 3, 6


def probe(user: int | None) -> str:
    """Why `guarded` does not work here for this user; "" if it does."""
    try:
        import landlockpy
    except ImportError:
        return "the package landlockpy is not installed"
    if not seccomp.supported():
        return f"no filter of system calls for {os.uname().machine}"
    version = landlockpy.abi_version()
    if version == 0:
        return "the kernel has no Landlock (Linux 5.13 or later, enabled at boot)"
    # without a user of its own, only the kernel's scopes keep a program from signalling us
    needed = _ABI_TRUNCATE if user is not None else _ABI_SCOPES
    if version < needed:
        return f"the kernel's Landlock is version {version}, {needed} is needed (Linux 6.12 has 6)"
    return ""


def command(
    program: Sequence[str],
    *,
    level: Level,
    user: int | None,
    folder: pathlib.Path,
    temporary: pathlib.Path,
    limits: Limits,
    environment: Mapping[str, str],
    readable: Sequence[str],
    status_fd: int,
    report_fd: int,
) -> list[str]:
    """The command that runs a program at one of these levels."""
    locked = level == "guarded"
    landlock = ""
    if locked:
        import landlockpy

        landlock = str(pathlib.Path(landlockpy.__file__).parent.parent)
    settings = {
        "command": list(program),
        "environment": dict(environment),
        "folder": str(folder),
        "uid": user,
        "parent": os.getpid(),
        "rlimits": _rlimits(limits, user),
        "landlock": landlock,
        "readable": [*_READABLE, *bubblewrap.prefixes(program), *readable],
        "writable": [str(folder), str(temporary)],
        "devices": list(_DEVICES),
        "filter": seccomp.program(network=False).hex() if locked else "",
        "status_fd": status_fd,
        "close": [report_fd],
    }
    return [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(settings)]


def _rlimits(limits: Limits, user: int | None) -> dict[str, int]:
    # the kernel counts the processes of a user, and ours are among them where it has no own
    others = 0 if user is not None else _threads_of(os.getuid())
    size = limits.disk_mb << 20
    return {
        "RLIMIT_CORE": 0,
        "RLIMIT_AS": limits.memory_mb << 20,
        "RLIMIT_CPU": int(limits.cpu_seconds or limits.seconds + 1),
        "RLIMIT_NOFILE": limits.files,
        "RLIMIT_FSIZE": size,
        "RLIMIT_NPROC": others + limits.processes,
    }


def _threads_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def stop(pid: int, records: list[dict]) -> None:
    """Tells the launcher to end all that it started."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGTERM)


def folder_mb(folder: pathlib.Path) -> float:
    """MB that the files below a folder take, links not followed; what vanishes meanwhile is 0."""
    total, todo = 0, [str(folder)]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
    return total / 2**20
