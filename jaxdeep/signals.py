"""SIGTERM as an orderly end: a run finishes its step, saves, and exits with 0."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

ENDED = "terminated after step {step}, which is saved: the same command continues"


class Terminated(BaseException):
    """SIGTERM came while work was done that may be dropped."""


class Termination:
    """Makes SIGTERM, what machines that are taken away get, an end in good order: `asked` becomes true
    for the loop to see between two steps, and work inside `droppable()` ends at once by Terminated. One
    inside another tells that one when it ends."""

    def __init__(self) -> None:
        self.asked, self._droppable = False, False

    def __enter__(self) -> Termination:
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        around = getattr(self._before, "__self__", None)
        if self.asked and isinstance(around, Termination):
            around.asked = True

    def _handle(self, *_: object) -> None:
        self.asked = True
        if self._droppable:
            raise Terminated

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """Work that is as if never begun when it is cut off."""
        self._droppable = True
        try:
            if self.asked:
                raise Terminated
            yield
        finally:
            self._droppable = False
