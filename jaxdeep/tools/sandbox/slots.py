"""A user id for each box, where we are root: what root's own processes cannot be held to, another
user's can.

The number of processes is bounded per user, and not at all for root; and `kill(-1)` as a user ends
all that the user left, daemons included. Ids are taken from a range that no account uses, each by
one box at a time on the machine (a lock file each).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator

from jaxdeep.errors import WorldError

FIRST, COUNT = 58_000, 512
TRIAL = FIRST + COUNT
"""The user that mechanisms are tried as. It is no slot's: those of a slot are killed without
notice."""

_CLEAR_SECONDS = 20.0


@functools.cache
def available() -> bool:
    """Whether we may become other users."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    # root of a container may be left without the capability, or without the id
    change = ["setpriv", f"--reuid={TRIAL}", f"--regid={TRIAL}", "--clear-groups", "true"]
    return subprocess.run(change, check=False, capture_output=True).returncode == 0


def _folder() -> pathlib.Path:
    # one for the machine, whatever TMPDIR says: two holders of a slot would kill each other's
    place = "/run" if os.access("/run", os.W_OK) else "/tmp"
    folder = pathlib.Path(place) / "jaxdeep-sandbox-slots"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != 0:
        raise WorldError(f"{folder} is not root's: remove it")
    return folder


def lock_file(uid: int) -> pathlib.Path:
    """The file whose lock is the right to a slot."""
    return _folder() / f"{uid}.lock"


@contextlib.contextmanager
def slot() -> Iterator[int | None]:
    """A user id for one box, free of processes at the beginning and at the end; None where we are
    not root, and everything runs as ourselves. Raises `WorldError` if none is free, or what runs
    as it cannot be ended."""
    if not available():
        yield None
        return
    # containers of one machine may share its users: each begins elsewhere, by its name
    first = zlib.crc32(os.uname().nodename.encode()) % COUNT
    for uid in (FIRST + (first + n) % COUNT for n in range(COUNT)):
        with open(lock_file(uid), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            with contextlib.suppress(KeyError):
                pwd.getpwuid(uid)
                continue  # somebody's account
            clear(uid)
            try:
                yield uid
            finally:
                clear(uid)
            return
    raise WorldError(f"all {COUNT} user ids for boxes are in use")


def processes_of(uid: int) -> list[int]:
    """The processes of a user, those that have ended but were not waited for left out."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                # what changed its own id is root's in /proc, while the user may still signal it
                own = os.stat(f"/proc/{name}").st_uid == uid or _real_uid(name) == uid
                if own and _state(name) not in "ZX":
                    found.append(int(name))
    return found


def _real_uid(pid: str) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))


def _state(pid: str) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def clear(uid: int) -> None:
    """Ends every process of a slot's user, and waits until none is left."""
    deadline = time.monotonic() + _CLEAR_SECONDS
    while processes_of(uid):
        # as that user and all at once: it cannot fork away from it
        change = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        kill = [*change, "/bin/sh", "-c", "kill -KILL -1"]
        subprocess.run(kill, check=False, capture_output=True, stdin=subprocess.DEVNULL)
        for pid in processes_of(uid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise WorldError(f"processes of user {uid} do not end: {processes_of(uid)}")
        time.sleep(0.002)
