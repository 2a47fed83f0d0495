"""Where the time of a run goes: seconds by stage for the metrics, and a trace to look at.

    timer = Timer(Trace(workdir))
    with timer("rollout"): ...                 a stage of the run
    with span("tools", "search"): ...          a part of it, from anywhere below, nothing passed along

A span that overlaps others of its name, as the tool calls of many conversations do, counts once: its
seconds are those in which at least one was open. `workdir/trace.json.gz` opens in ui.perfetto.dev.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "trace.json.gz"
LIMIT = 32 * 2**20  # bytes of a trace; then it becomes the old one and another is begun
BUFFERED = 5000  # events that a kill may cost

_inside: contextvars.ContextVar[_Span | None] = contextvars.ContextVar("_inside", default=None)


@dataclasses.dataclass(eq=False, slots=True)
class _Span:
    """One that is open: its stage and those around it, and its lane in the trace."""

    timer: Timer
    path: str
    lane: int
    thread: int = dataclasses.field(default_factory=threading.get_ident)
    busy: bool = False  # whether a span inside it has its lane


class Timer:
    """Seconds spent by stage: `with timer("rollout"): ...`, then `take()`."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._lock = threading.Lock()  # stages may be of several threads
        self._open: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._lanes: set[int] = set()

    @contextlib.contextmanager
    def __call__(self, stage: str, name: str = "", **about: Any) -> Iterator[None]:
        """Adds the time spent inside to the stage, whether or not it raises; one that is part of another
        is "rollout/tools". `name` and `about` are for the trace, and without a stage it is all for it."""
        around = _inside.get()
        path = "/".join(filter(None, (around.path if around else "", stage)))
        start = time.perf_counter()
        with self._lock:
            # another thread may go on when the span around it has ended
            own = around is None or around.busy or around.thread != threading.get_ident()
            lane = self._free_lane() if own else around.lane
            if not own:
                around.busy = True
            if stage:
                self._enter(path, start)
        token = _inside.set(_Span(self, path, lane))
        try:
            yield
        finally:
            _inside.reset(token)
            end = time.perf_counter()
            with self._lock:
                if own:
                    self._lanes.discard(lane)
                else:
                    around.busy = False
                if stage:
                    self._leave(path, end)
            if self.trace is not None:
                kind = path.rpartition("/")[2]
                self.trace.add(kind, name or kind, start, end, lane, about)

    def take(self) -> dict[str, float]:
        """`{"time/<stage>": seconds}` since the last call, and starts again from nothing; of what is still
        open, the seconds until now."""
        now = time.perf_counter()
        with self._lock:
            for path, count in self._open.items():
                if count:
                    self._count(path, now)
                    self._since[path] = now
            taken, self._seconds = self._seconds, {}
        if self.trace is not None:
            self.trace.flush()
        return {f"time/{stage}": seconds for stage, seconds in taken.items()}

    def _enter(self, path: str, now: float) -> None:
        if not self._open.get(path):
            self._since[path] = now
        self._open[path] = self._open.get(path, 0) + 1

    def _leave(self, path: str, now: float) -> None:
        self._open[path] -= 1
        if not self._open[path]:
            self._count(path, now)

    def _count(self, path: str, now: float) -> None:
        self._seconds[path] = self._seconds.get(path, 0.0) + now - self._since[path]

    def _free_lane(self) -> int:
        lane = next(n for n in range(len(self._lanes) + 1) if n not in self._lanes)
        self._lanes.add(lane)
        return lane


def span(stage: str, name: str = "", **about: Any) -> contextlib.AbstractContextManager[None]:
    """A part of whichever stage is being timed here; nothing where none is."""
    around = _inside.get()
    return around.timer(stage, name, **about) if around else contextlib.nullcontext()


class Trace:
    """`workdir/trace.json.gz`, Chrome's trace events: whole after every `flush`, so that a kill leaves one
    that opens. The trace of a run before, or one that has grown to `limit` bytes, becomes
    `old-trace.json.gz`: the two newest are kept."""

    def __init__(self, workdir: Path, limit: int = LIMIT) -> None:
        self.path, self.limit = workdir / FILE, limit
        # events have the time of day, so that those of several processes can be put together
        self._epoch = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._events: list[str] = []
        self._packer: Any = None  # until the first event, when the file is begun
        self._size = 0

    def add(
        self, kind: str, name: str, start: float, end: float, lane: int, about: Mapping[str, Any]
    ) -> None:
        """One span, from `start` to `end` by `time.perf_counter`."""
        event = {"name": name, "cat": kind, "ph": "X", "pid": os.getpid(), "tid": lane}
        # both ends rounded alike: what lay within another still does
        event["ts"] = round((self._epoch + start) * 1e6)
        event["dur"] = round((self._epoch + end) * 1e6) - event["ts"]
        if about:
            event["args"] = about
        with self._lock:
            self._events.append(json.dumps(event, default=str))
            full = len(self._events) >= BUFFERED
        if full:
            self.flush()

    def flush(self) -> None:
        """Brings the file up to date."""
        with self._lock:
            if not self._events:
                return
            text = ",\n".join(self._events)
            self._events.clear()
            if self._packer is None or self._size > self.limit:
                self._begin()
                text = f"[\n{text}"
            else:
                text = f",\n{text}"
            data = self._packer.compress(text.encode()) + self._packer.flush(zlib.Z_SYNC_FLUSH)
            end = self._packer.copy()  # an end that the next events will be written over
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.write(data + end.compress(b"\n]\n") + end.flush())
            self._size += len(data)

    def _begin(self) -> None:
        if self.path.exists():
            self.path.replace(self.path.with_name(f"old-{FILE}"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._packer, self._size = zlib.compressobj(wbits=31), 0  # gzip
