"""math-verify, for formulas that no reader here understands, in processes that can be killed.

Alone it accepts wrong answers, so it is asked only where gold and answer have the same letters, and
a process that does not answer in time is killed: the answer is then unknown, never right. Such a
process runs this file: a JSON pair [gold, answer] a line in, true or false a line out."""

from __future__ import annotations

import atexit
import json
import queue
import select
import subprocess
import sys
import threading
from typing import Literal

Outcome = Literal["equal", "different", "timeout", "absent"]

PROCESSES = 2
SECONDS = 2.0
START_SECONDS = 120.0  # to import sympy, on a slow machine
MEMORY = 2 * 2**30  # bytes of a process


class _Process:
    """One child, started when it is first asked and again after it was killed."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None

    def ask(self, gold: str, answer: str, seconds: float) -> Outcome:
        if self.child is None or self.child.poll() is not None:
            self.child = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            ready = self.line(START_SECONDS)
            if ready is None or json.loads(ready) != "ready":
                self.stop()
                return "absent" if ready is not None else "timeout"
        try:
            self.child.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.child.stdin.flush()
        except OSError:
            self.stop()
            return "timeout"
        reply = self.line(seconds)
        if reply is None:
            self.stop()
            return "timeout"
        return "equal" if json.loads(reply) is True else "different"

    def line(self, seconds: float) -> bytes | None:
        """The next line of the child; None where it takes longer, or where the child has ended."""
        ready, _, _ = select.select([self.child.stdout], [], [], seconds)
        return (self.child.stdout.readline() or None) if ready else None

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child.stdin.close()
            self.child.stdout.close()
            self.child = None


_idle: queue.LifoQueue[_Process] = queue.LifoQueue()
_all: list[_Process] = []
_lock = threading.Lock()


def verify(gold: str, answer: str, seconds: float = SECONDS) -> Outcome:
    """What math-verify says of two formulas in LaTeX, within `seconds`. "timeout" also where its
    process died; "absent" where math-verify is not installed. Safe to call from several threads."""
    with _lock:
        if not _all:
            _all.extend(_Process() for _ in range(PROCESSES))
            for process in _all:
                _idle.put(process)
    process = _idle.get()
    try:
        return process.ask(gold, answer, seconds)
    finally:
        _idle.put(process)


@atexit.register
def close() -> None:
    """End all processes; the next call starts them again."""
    for process in _all:
        process.stop()


def _serve() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        import math_verify
    except ImportError:
        print(json.dumps("absent"), flush=True)
        return
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        gold, answer = (f"${one}$" for one in json.loads(line))
        try:
            sides = [math_verify.parse(one, parsing_timeout=None) for one in (gold, answer)]
            found = all(sides) and math_verify.verify(*sides, timeout_seconds=None)
        except Exception:  # whatever sympy raises: the pair is not known to be equal
            found = False
        print(json.dumps(bool(found)), flush=True)


if __name__ == "__main__":
    _serve()
