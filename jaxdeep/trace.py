"""Where the time of a run goes: seconds by stage for the metrics, and a trace to look at.

    timer = Timer(Trace(workdir))
    with timer("rollout"): ...                 a stage of the run
    with span("tools", "search"): ...          a part of it, from any function called inside

Spans of one stage may overlap, as the tool calls of many conversations do. The seconds of a stage
are those in which at least one of its spans was open. `workdir/trace.json.gz` opens in
ui.perfetto.dev.
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

from jaxdeep.workdir import Workdir

MAX_BYTES = 32 * 2**20  # of a trace file; then a new one is begun
MAX_BUFFERED = 5000  # events in memory, which a kill may cost

# A context variable rather than an argument: asyncio's tasks and `to_thread` inherit it, so that a
# tool deep inside a rollout finds its stage without everything between passing it on.
_current: contextvars.ContextVar[_Span | None] = contextvars.ContextVar("_current", default=None)


@dataclasses.dataclass(eq=False, slots=True)
class _Span:
    """An open span. `path` is its stage below the stages around it, "rollout/tools"; `lane` its row
    in the trace, where spans may only be nested, not overlap."""

    timer: Timer
    path: str
    lane: int
    thread: int = dataclasses.field(default_factory=threading.get_ident)
    lane_taken: bool = False  # by a span inside it


class Timer:
    """Measures seconds by stage: `with timer("rollout"): ...`, then `take()`."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._lock = threading.Lock()  # several threads may have spans
        self._open: dict[str, int] = {}  # path: number of open spans
        self._since: dict[str, float] = {}  # path: from when its seconds are not yet counted
        self._seconds: dict[str, float] = {}
        self._lanes: set[int] = set()  # in use

    @contextlib.contextmanager
    def __call__(self, stage: str, name: str = "", **details: Any) -> Iterator[None]:
        """Adds the seconds spent inside to the stage, also when it raises; a stage inside another
        is "rollout/tools". `name` and `details` appear in the trace. With stage "" nothing is
        timed, and the span is for the trace only."""
        outer = _current.get()
        path = "/".join(filter(None, (outer.path if outer else "", stage)))
        start = time.perf_counter()
        with self._lock:
            # A span continues the lane of the one around it if it is nested in that. In another
            # thread it may outlive it, and beside a sibling that has the lane it overlaps.
            new_lane = outer is None or outer.lane_taken or outer.thread != threading.get_ident()
            lane = self._free_lane() if new_lane else outer.lane
            if not new_lane:
                outer.lane_taken = True
            if stage:
                self._enter(path, start)
        token = _current.set(_Span(self, path, lane))
        try:
            yield
        finally:
            _current.reset(token)
            end = time.perf_counter()
            with self._lock:
                if new_lane:
                    self._lanes.discard(lane)
                else:
                    outer.lane_taken = False
                if stage:
                    self._leave(path, end)
            if self.trace is not None:
                kind = path.rpartition("/")[2]
                self.trace.add(kind, name or kind, start, end, lane, details)

    def take(self) -> dict[str, float]:
        """`{"time/<stage>": seconds}` since the last call. Of spans that are still open it has the
        seconds until now, and the next call the rest."""
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


def span(stage: str, name: str = "", **details: Any) -> contextlib.AbstractContextManager[None]:
    """A part of the stage that is being timed here; nothing is timed outside any stage."""
    outer = _current.get()
    return outer.timer(stage, name, **details) if outer else contextlib.nullcontext()


class Trace:
    """`workdir/trace.json.gz`, in Chrome's trace event format. The file is complete after every
    `flush`, so that a killed run leaves one that opens. An earlier run's trace, or one that has
    grown to `limit` bytes, is renamed to `old-trace.json.gz`: the two newest are kept."""

    def __init__(self, workdir: Path, limit: int = MAX_BYTES) -> None:
        self.path, self.limit = Workdir(workdir).trace, limit
        # Events carry the time of day, so that traces of several processes can be merged.
        self._epoch = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._events: list[str] = []
        # None until the first event: a run with nothing to do leaves the earlier trace in place.
        self._compressor: Any = None
        self._size = 0

    def add(
        self, kind: str, name: str, start: float, end: float, lane: int, details: Mapping[str, Any]
    ) -> None:
        """Adds one span, from `start` to `end` in seconds of `time.perf_counter`."""
        event = {"name": name, "cat": kind, "ph": "X", "pid": os.getpid(), "tid": lane}
        # Both ends are rounded the same way, so that nested spans stay nested.
        event["ts"] = round((self._epoch + start) * 1e6)
        event["dur"] = round((self._epoch + end) * 1e6) - event["ts"]
        if details:
            event["args"] = details
        with self._lock:
            self._events.append(json.dumps(event, default=str))
            full = len(self._events) >= MAX_BUFFERED
        if full:
            self.flush()

    def flush(self) -> None:
        """Writes all events so far to the file."""
        with self._lock:
            if not self._events:
                return
            text = ",\n".join(self._events)
            self._events.clear()
            if self._compressor is None or self._size > self.limit:
                self._begin()
                text = f"[\n{text}"
            else:
                text = f",\n{text}"
            data = self._compressor.compress(text.encode())
            data += self._compressor.flush(zlib.Z_SYNC_FLUSH)
            # The closing bracket comes from a copy of the compressor, and the next flush overwrites
            # it.
            end = self._compressor.copy()
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.write(data + end.compress(b"\n]\n") + end.flush())
            self._size += len(data)

    def _begin(self) -> None:
        if self.path.exists():
            self.path.replace(self.path.with_name(f"old-{self.path.name}"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._compressor, self._size = zlib.compressobj(wbits=31), 0  # 31: a gzip header
