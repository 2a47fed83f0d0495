"""Heartbeats between the processes of a run: when one dies, the others end, and name it.

What goes wrong without it: every collective (summing gradients, an all-gather) waits for all
processes. When one is killed or its machine freezes, the others wait for ever, inside native code
that neither an exception nor a Python signal handler interrupts. Only another thread of the waiting
process can notice, and all it can do is end the process.

Who notices, and when:

    a process fails           it writes its reason to the key-value store of jax's coordination
                              service, which lives in process 0; the others read it at their next
                              beat (3 s) and leave with the same exit status
    process 1, 2, ... dies    each process counts up under a key of its own in that store. Process 0
                              sees a counter that has not changed for MISSED_BEATS (45 s), and
                              writes that down for the others
    process 0 dies or hangs   the store is gone with it, or does not answer. Each of the others
                              finds out alone: no request answered for MISSED_BEATS

Time is counted in the watcher's own beats, not by the clock: when all machines of a run are
suspended together, no watcher beats either, and nobody is missed when they go on. A beat says that
a process exists, not that it makes progress: one whose main thread waits for ever still beats.

Why not jax's own heartbeats: they go by the clock, so a suspension would end a healthy run; and on
any failure jax aborts the surviving processes from C++, before this module could print which
process died or choose the exit status. `hosts.connect` therefore gives them a timeout so long that
they are only a last resort, and `proxy` hides the connection that breaks when process 0 dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 3.0  # between two beats of a process
MISSED_BEATS = 15  # beats of the watcher without one of the watched, which then counts as dead
BEATS_KEY, ENDED_KEY = "jaxdeep/beats/", "jaxdeep/ended/"
CONTINUE = "The same command in all processes continues from the last checkpoint"


class Heartbeat:
    """Sends this process's heartbeats, and ends the process when another one failed or died.

    All processes must create theirs together, because it waits for all first beats. `client` is the
    client of jax's coordination service.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._index, self._count = jax.process_index(), jax.process_count()
        self._beats = 0  # this process's own, which is also the time by which it watches others
        self._answered_at = 0  # the own beat at which the service last answered
        self._last_seen: dict[str, tuple[str, int]] = {}  # index: counter, own beat when it was new
        self._stopped = threading.Event()
        self._exit_lock = threading.Lock()
        self._exit_asked, self._exit_ready = threading.Event(), threading.Event()
        self._send()
        multihost_utils.sync_global_devices("every process has sent its first heartbeat")
        for work in (self._count_beats, self._watch, self._prepare_exit):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer: from now on others may end without ending this process."""
        self._stopped.set()

    def report(self, status: int, reason: str, index: int | None = None) -> None:
        """Tell all processes that this one, or the one with `index`, is ending, so that they end
        with the same exit status."""
        index = self._index if index is None else index
        value = json.dumps([status, f"process {index} of {self._count} {reason}"])
        # the store may be what failed; then each of the others finds out by itself
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{ENDED_KEY}{index}", value, True)

    def exit(self, status: int) -> None:
        """End this process at once, without jax's own shutdown, which waits for every process.
        Process 0 lets the others go first: the store with the reason lives in it."""
        self._exit_asked.set()
        # not for ever: a service that is gone never answers
        self._exit_ready.wait((1 if self._index else 4) * HEARTBEAT_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def confirm_others(self) -> None:
        """Return once each other process has sent a new heartbeat and none has reported its end;
        otherwise end this process. For an error that may be the consequence of another's death."""
        before, pause = self._counters(), threading.Event()
        for _ in range(MISSED_BEATS):
            pause.wait(HEARTBEAT_SECONDS)
            now = self._counters()
            silent = [i for i in before if now.get(i) == before[i] and i != str(self._index)]
            if not silent:
                return self._exit_if_another_ended()
        self._exit_without(int(silent[0]))

    def _count_beats(self) -> None:
        # A thread of its own, because a request of `_watch` to a process 0 that hangs, rather than
        # being dead, never returns.
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            self._beats += 1
            if self._beats - self._answered_at >= MISSED_BEATS:
                self._exit_without(0)

    def _watch(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                self._send()
                missing = self._missing()
                self._exit_if_another_ended()
            except jax.errors.JaxRuntimeError:
                continue  # the service did not answer: `_count_beats` decides for how long
            self._answered_at = self._beats
            if missing is not None:
                self._exit_without(missing)

    def _prepare_exit(self) -> None:
        # Started with the others and then waiting: while the interpreter shuts down, which is when
        # `exit` may be called, Python starts no new thread. Its requests may hang; `exit` does not
        # wait for it longer than a few beats.
        self._exit_asked.wait()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            # a process that leaves on purpose must not be missed afterwards
            self._client.key_value_delete(f"{BEATS_KEY}{self._index}")
            pause = threading.Event()
            for _ in range(3 if self._index == 0 else 0):
                ended = self._client.key_value_dir_get(ENDED_KEY)
                if not self._counters().keys() - {key.removeprefix(ENDED_KEY) for key, _ in ended}:
                    break
                pause.wait(HEARTBEAT_SECONDS)
        self._exit_ready.set()

    def _exit_if_another_ended(self) -> None:
        ended = self._client.key_value_dir_get(ENDED_KEY)
        if ended and not self._stopped.is_set():
            self._exit_with_message(*json.loads(ended[0][1]))

    def _send(self) -> None:
        self._client.key_value_set(f"{BEATS_KEY}{self._index}", str(self._beats), True)

    def _counters(self) -> dict[str, str]:
        """The counter of each process that has not left, by its index."""
        found = self._client.key_value_dir_get(BEATS_KEY)
        return {key.removeprefix(BEATS_KEY): counter for key, counter in found}

    def _missing(self) -> int | None:
        """The index of a watched process whose counter has not changed for too long, or None."""
        for index, counter in self._counters().items():
            # Process 0 watches the others, and they watch process 0: a death is reported once, not
            # by everyone to everyone.
            if (index == "0") == (self._index == 0):
                continue
            if self._last_seen.get(index, ("",))[0] != counter:
                self._last_seen[index] = (counter, self._beats)
            elif self._beats - self._last_seen[index][1] >= MISSED_BEATS:
                return int(index)
        return None

    def _exit_without(self, index: int) -> None:
        """End this process because the one with `index` sends no heartbeats any more."""
        seconds = MISSED_BEATS * HEARTBEAT_SECONDS
        reason = f"is gone, or hangs: no heartbeat from it for {seconds:.0f} s"
        if index:  # the store is in process 0: of its death nobody can be told
            self.report(1, reason, index)
        self._exit_with_message(1, f"process {index} of {self._count} {reason}")

    def _exit_with_message(self, status: int, reason: str) -> None:
        # Two threads may notice, and one message is enough. `exit` does not return, so the lock is
        # never released.
        with self._exit_lock:
            # status 2 is a command that cannot be run: it would fail again
            hint = "" if status == 2 else f". {CONTINUE}"
            print(f"error: {reason}{hint}", file=sys.stderr, flush=True)
            self.exit(status)
