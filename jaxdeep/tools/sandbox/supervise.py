"""Runs a prepared command with its pipes, its deadline and its watchdog, until nothing is left.

Reading never waits for the end of a pipe: what a program leaves behind may hold it open.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from jaxdeep.tools.sandbox.limits import Limits, Status

_TICK = 0.1  # seconds between looks of the watchdog
_GRACE = 5.0  # seconds to end in, once told to
_OWN_PROCESSES = 8  # of a box itself
_CHUNK = 65536
_RECORDS = 65536  # bytes of records that are read at most


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A command to supervise. `stop` is told to end everything below the process it is given.
    `memory_of` names the processes whose memory counts. `disk` gives the MB of the work folder,
    where nothing else bounds them."""

    command: Sequence[str]
    pass_fds: tuple[int, ...]
    stop: Callable[[int, list[dict]], None]
    memory_of: Callable[[int], list[int]]
    disk: Callable[[], float] | None = None


@dataclasses.dataclass
class Ended:
    """How a supervised command ended: the limit it was killed for, what was read from each pipe."""

    killed: Status | None = None
    cancelled: bool = False
    records: list[dict] = dataclasses.field(default_factory=list)
    output: bytes = b""
    report: bytes = b""
    seconds: float = 0.0
    cpu: float = 0.0
    peak_mb: float = 0.0


class Kept:
    """Output, of which the first and the last half of a cap are kept."""

    def __init__(self, cap: int) -> None:
        self.half, self.total = cap // 2, 0
        self._head, self._tail, self._size = bytearray(), collections.deque[bytes](), 0

    def add(self, data: bytes) -> None:
        """Takes the next bytes."""
        self.total += len(data)
        room = self.half - len(self._head)
        self._head += data[:room]
        if data[room:]:
            self._tail.append(data[room:])
            self._size += len(data[room:])
        while self._tail and self._size - len(self._tail[0]) >= self.half:
            self._size -= len(self._tail.popleft())

    def value(self) -> bytes:
        """What is kept, with a line between the halves that says how much is left out."""
        tail = b"".join(self._tail)[-self.half :]
        left_out = self.total - len(self._head) - len(tail)
        note = f"\n... {left_out} bytes left out ...\n".encode() if left_out else b""
        return bytes(self._head) + note + tail


@dataclasses.dataclass(frozen=True, slots=True)
class Channel:
    """What goes between a run and its caller: the input, as bytes or the end of a pipe; whoever
    takes the report as it comes (else it is kept); an event that ends the run."""

    stdin: bytes | int = b""
    on_report: Callable[[bytes], None] | None = None
    cancel: threading.Event | None = None


def supervise(prepare: Callable[[int, int], Prepared], limits: Limits, channel: Channel) -> Ended:
    """Runs what `prepare` makes of two file descriptors, for records of how it ended and for the
    report. Raises OSError if it cannot be started."""
    status_r, status_w = os.pipe()
    report_r, report_w = os.pipe()
    readers = [os.fdopen(status_r, "rb", 0), os.fdopen(report_r, "rb", 0)]
    try:
        try:
            prepared = prepare(status_w, report_w)
            process = subprocess.Popen(
                prepared.command,
                stdin=channel.stdin if isinstance(channel.stdin, int) else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=(status_w, report_w, *prepared.pass_fds),
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"
                },  # what starts the box is readable inside: it must not hold our variables
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(status_w)
            os.close(report_w)
        with process:
            try:
                return _Watch(process, prepared, limits, channel).run(*readers)
            finally:
                process.kill()  # only if something above raised: else it has ended
    finally:
        for reader in readers:
            reader.close()


class _Watch:
    def __init__(self, process, prepared, limits, channel) -> None:
        self.process, self.prepared, self.limits = process, prepared, limits
        self.channel = channel
        self.stdin = memoryview(b"" if isinstance(channel.stdin, int) else channel.stdin)
        self.ended, self.output = Ended(), Kept(limits.output_bytes)
        self.report, self.status = bytearray(), bytearray()
        self.selector = selectors.DefaultSelector()
        self.told: float | None = None  # when it was told to end

    def run(self, status, report) -> Ended:
        """Everything, until the process has ended and what it wrote is read."""
        start = time.monotonic()
        pid, ended = self.process.pid, self.ended
        sinks = {status: self._status, report: self._report, self.process.stdout: self._output}
        with self.selector, contextlib.ExitStack() as stack:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            for source in sinks:
                os.set_blocking(source.fileno(), False)
                self.selector.register(source, selectors.EVENT_READ, sinks[source])
            if self.process.stdin is not None:
                os.set_blocking(self.process.stdin.fileno(), False)
                self.selector.register(self.process.stdin, selectors.EVENT_WRITE, None)
            self.selector.register(pidfd, selectors.EVENT_READ, "ended")
            look = start + _TICK / 4
            while True:
                now = time.monotonic()
                wake = min(look, start + self.limits.seconds if self.told is None else look)
                events = self.selector.select(max(0.0, wake - now))
                if any(key.data == "ended" for key, _ in events):
                    break
                for key, _ in events:
                    self._feed() if key.data is None else self._read(key.fileobj, key.data)
                now = time.monotonic()
                if now >= start + self.limits.seconds:
                    self._end("timeout")
                if self.channel.cancel is not None and self.channel.cancel.is_set():
                    ended.cancelled = True
                    self._end(None)
                if now >= look:
                    self._look()
                    look = time.monotonic() + _TICK
            _, code, usage = os.wait4(pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(code)
            for source, sink in sinks.items():  # what is there already, never what may come
                if source in self.selector.get_map():
                    self._read(source, sink, limit=64)
        ended.seconds = time.monotonic() - start
        ended.cpu = max(ended.cpu, usage.ru_utime + usage.ru_stime)
        ended.peak_mb = max(ended.peak_mb, usage.ru_maxrss / 1024)
        ended.records = self._records()
        ended.output, ended.report = self.output.value(), bytes(self.report)
        return ended

    def _records(self) -> list[dict]:
        records = []
        for line in bytes(self.status).decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def _read(self, source, sink, limit: int = 1) -> None:
        for _ in range(limit):
            data = source.read(_CHUNK)
            if data is None:
                return
            if not data:
                self.selector.unregister(source)
                return
            sink(data)

    def _status(self, data: bytes) -> None:
        self.status += data[: _RECORDS - len(self.status)]

    def _report(self, data: bytes) -> None:
        if self.channel.on_report is not None:
            self.channel.on_report(data)
            return
        self.report += data[: self.limits.report_bytes - len(self.report)]
        if len(data) and len(self.report) >= self.limits.report_bytes:
            self._end("output")

    def _output(self, data: bytes) -> None:
        self.output.add(data)
        if self.output.total > self.limits.flood_bytes:
            self._end("output")

    def _feed(self) -> None:
        try:
            if self.stdin:
                self.stdin = self.stdin[
                    os.write(self.process.stdin.fileno(), self.stdin[:_CHUNK]) :
                ]
        except BlockingIOError:
            return
        except OSError:
            self.stdin = memoryview(b"")  # nobody reads it any more
        if not self.stdin:
            self.selector.unregister(self.process.stdin)
            self.process.stdin.close()

    def _look(self) -> None:
        pids = self.prepared.memory_of(self.process.pid)
        total = sum(memory_mb(pid) for pid in pids)
        self.ended.cpu = max(self.ended.cpu, sum(cpu_seconds(pid) for pid in pids))
        self.ended.peak_mb = max(self.ended.peak_mb, total)
        threads = sum(threads_of(pid) for pid in pids)
        # the kernel does not bound those of root, even of a root without any capability
        crowd = threads > self.limits.processes + _OWN_PROCESSES
        if crowd or total > (self.limits.total_mb or self.limits.memory_mb):
            self._end("memory")
        if self.prepared.disk is not None and self.prepared.disk() > self.limits.disk_mb:
            self._end("disk")
        if self.told is not None and time.monotonic() > self.told + _GRACE:
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()

    def _end(self, why: Status | None) -> None:
        if self.told is None:
            self.told, self.ended.killed = time.monotonic(), why
            self.prepared.stop(self.process.pid, self._records())


def descendants(pid: int) -> list[int]:
    """The processes below a process, in no order."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                todo += children
    return found


def threads_of(pid: int) -> int:
    """The number of threads of a process; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def memory_mb(pid: int) -> float:
    """The memory of a process, shared pages by its part of them; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):
        pass
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm") as file:
        resident, shared = (int(word) for word in file.read().split()[1:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of the children it has waited for; 0 if it has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return sum(int(fields[i]) for i in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")
    return 0.0
