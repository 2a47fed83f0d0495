"""SIGTERM as an orderly end: a run finishes its step, saves and exits with status 0."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDED = "terminated after step {step}, which is saved: the same command continues"


class Terminated(BaseException):
    """SIGTERM arrived during work that may be dropped. Not an Exception, so that no handler for
    errors of a tool or a reward swallows it."""


class Termination:
    """Handles SIGTERM, which schedulers send before they take a machine away. `asked` becomes True,
    for the training loop to see between two steps; work inside `droppable()` ends immediately with
    Terminated. A Termination inside another one passes the request on when it ends. Outside the
    main thread, where Python allows no handler, SIGTERM does what it did before."""

    def __init__(self) -> None:
        self.asked, self._droppable = False, False

    def __enter__(self) -> Termination:
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handles:
            return
        signal.signal(signal.SIGTERM, self._before)
        # the handler before was another Termination's method, if this one is inside it
        outer = getattr(self._before, "__self__", None)
        if self.asked and isinstance(outer, Termination):
            outer.asked = True

    def _handle(self, *_: object) -> None:
        self.asked = True
        if self._droppable:
            raise Terminated

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """For work without effects until it is complete, such as rollouts: SIGTERM raises
        Terminated in it, and at its start if SIGTERM came before."""
        self._droppable = True
        try:
            if self.asked:
                raise Terminated
            yield
        finally:
            self._droppable = False
