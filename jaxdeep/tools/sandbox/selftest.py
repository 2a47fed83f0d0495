"""Attacks on a box of this machine, which tell what its level really holds here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jaxdeep.tools.sandbox.levels as levels
from jaxdeep.tools.sandbox.limits import LEVELS, Level, Limits, Result
from jaxdeep.tools.sandbox.run import Job, execute, python

ATTACKS = pathlib.Path(__file__).with_name("attacks.py")
LIMITS = Limits(
    seconds=10.0, memory_mb=128, total_mb=192, processes=24, disk_mb=8, temporary_mb=4,
    output_bytes=4096, flood_bytes=2**20, report_bytes=2**18,
)  # fmt: skip
SHORT = dataclasses.replace(LIMITS, seconds=1.0)

TOGETHER = (
    *("memory", "raised_limits", "become_root", "make_device"),
    *("write_outside", "read_host", "symlink_out", "variables", "tcp", "udp", "local_sockets"),
    *("other_sockets", "signal_host", "trace_host", "list_processes", "user_namespace"),
    "fill_temporary",
)
"""Attacks that end by themselves, run one after the other in one box."""

ALONE = {
    "fork_bomb": (LIMITS, None),
    "thread_bomb": (LIMITS, None),
    "daemon": (LIMITS, "exited"),
    "memory_of_many": (LIMITS, "memory"),
    "endless_loop": (SHORT, "timeout"),
    "ignored_signals": (SHORT, "timeout"),
    "output_flood": (LIMITS, "output"),
    "report_flood": (LIMITS, "output"),
    "fill_work": (LIMITS, None),
}
"""Attacks that a limit has to end, each in a box of its own, with the status that says so."""

_QUICK = ("fork_bomb", "daemon", "endless_loop", "memory_of_many", "output_flood", "fill_work")
_VARIABLE = "JAXDEEP_SANDBOX_SECRET"


@dataclasses.dataclass(frozen=True, slots=True)
class SelfTest:
    """What works here. `level` is the strongest, `problems` says why each other one does not;
    `escaped` has a sentence for each attack that the level did not hold."""

    level: Level
    problems: dict[Level, str]
    held: tuple[str, ...]
    escaped: dict[str, str]
    seconds: float

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"sandbox: {self.level} ({len(self.held)} attacks held, {self.seconds:.1f} s)"]
        lines += [f"  escaped: {name}: {what}" for name, what in self.escaped.items()]
        for level in reversed(LEVELS):
            if self.problems[level]:
                lines += [f"  {level} does not work: {self.problems[level]}", levels.remedy(level)]
        return "\n".join(lines)


def self_test(level: Level | None = None, *, quick: bool = True) -> SelfTest:
    """Attacks a box of a level, by default of the strongest that works here; about 5 s on two
    cores. `quick=False` tries everything. Raises `ConfigError` for a level that does not work
    here."""
    start = time.monotonic()
    level = level or levels.best()
    levels.need(level)
    alone = _QUICK if quick else tuple(ALONE)
    escaped: dict[str, str] = {}
    with host() as settings:
        for names in (TOGETHER, *((name,) for name in alone)):
            escaped |= try_attacks(names, level, settings)
    held = tuple(name for name in (*TOGETHER, *alone) if name not in escaped)
    problems = {each: levels.problem(each) for each in LEVELS}
    return SelfTest(level, problems, held, escaped, time.monotonic() - start)


@contextlib.contextmanager
def host() -> Iterator[dict]:
    """Something to attack: a secret, a file that all may write, listening sockets, a process with a
    secret variable. The settings that `attacks.py` reads."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxdeep-attacked-"))
        os.chmod(folder, 0o777)
        paths = {name: f"{folder}/{name}" for name in ("secret", "outside", "socket")}
        for name in ("secret", "outside"):
            pathlib.Path(paths[name]).write_text(name)
            os.chmod(paths[name], 0o666)
        abstract = secrets.token_hex(8)
        listening = {}
        for name, kind, address in (
            ("tcp", (socket.AF_INET, socket.SOCK_STREAM), ("127.0.0.1", 0)),
            ("udp", (socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", 0)),
            ("abstract", (socket.AF_UNIX, socket.SOCK_STREAM), "\0" + abstract),
            ("socket", (socket.AF_UNIX, socket.SOCK_STREAM), paths["socket"]),
        ):
            listening[name] = stack.enter_context(socket.socket(*kind))
            listening[name].bind(address)
            listening[name].setblocking(False)
            if kind[1] == socket.SOCK_STREAM:
                listening[name].listen(64)
        os.chmod(paths["socket"], 0o777)
        victim = subprocess.Popen(["sleep", "600"], env={_VARIABLE: "secret", "PATH": os.defpath})
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        yield {
            **paths,
            "tcp": listening["tcp"].getsockname()[1],
            "udp": listening["udp"].getsockname()[1],
            "abstract": abstract,
            "pid": victim.pid,
            "variable": _VARIABLE,
            "marker": f"attack-{secrets.token_hex(8)}",
            "arrived": lambda: _arrived(listening["udp"]),
        }


def _arrived(receiver: socket.socket) -> bool:
    try:
        return bool(receiver.recv(10))
    except BlockingIOError:
        return False


def try_attacks(names: Sequence[str], level: Level, settings: dict) -> dict[str, str]:
    """Runs attacks in one box; of those that the level did not hold, what they got."""
    limits, expected = (
        ALONE[names[0]] if len(names) == 1 and names[0] in ALONE else (LIMITS, "exited")
    )
    sizes = {
        name: getattr(limits, name)
        for name in ("processes", "memory_mb", "disk_mb", "temporary_mb")
    }
    told = {k: v for k, v in settings.items() if not callable(v)} | sizes
    command = [sys.executable if level == "full" else python(), "attacks.py", *names]
    job = Job(
        command,
        {"attacks.py": ATTACKS.read_text(encoding="utf-8")},
        limits=limits,
        level=level,
        stdin=json.dumps(told).encode(),
    )
    result = execute(job)
    escaped = _outcomes(result, names)
    if expected is not None and result.status != expected:
        last = f"ended as {result.status} {result.code} {result.detail} {result.output[-500:]}"
        escaped |= {
            name: last for name in names if name not in escaped and name not in _done(result)
        }
    if "udp" in names and settings["arrived"]():
        escaped["udp"] = "a packet arrived"
    if pathlib.Path(settings["outside"]).read_text() != "outside":
        escaped["write_outside"] = "changed a file of the host"
    left = _left(settings["marker"])
    if left:
        escaped[names[0]] = f"processes are left: {left}"
    return escaped


def _done(result: Result) -> dict[str, str | None]:
    done = {}
    for line in result.report.decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            done |= json.loads(line)
    return done


def _outcomes(result: Result, names: Sequence[str]) -> dict[str, str]:
    return {name: what for name, what in _done(result).items() if what and name in names}


def _left(marker: str) -> list[int]:
    """Processes whose command line has the marker."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if (
                name.isdecimal()
                and marker.encode() in pathlib.Path(f"/proc/{name}/cmdline").read_bytes()
            ):
                found.append(int(name))
    return found
