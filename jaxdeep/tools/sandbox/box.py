"""A box that is kept: the many commands of an agent in one folder.

    async with Box(folder="checkout", level="full") as box:
        result = await box.run(["bash", "-c", "pytest -q"], seconds=60)

A small server runs in the box and starts each command. What a command leaves running is ended with
it; what it leaves in the folder stays until the box is closed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import threading
from collections.abc import Mapping, Sequence

import jaxdeep.tools.sandbox.slots as slots
from jaxdeep.errors import WorldError
from jaxdeep.tools.sandbox.limits import Level, Limits, Result
from jaxdeep.tools.sandbox.run import Content, Job, execute, python
from jaxdeep.tools.sandbox.supervise import Channel

_SERVE = pathlib.Path(__file__).with_name("serve.py")
_LATE = 30.0  # seconds that the server may take to answer after a command's own time


class Box:
    """A box for one command after the other. Its arguments are those of `Job`; `limits.seconds` is
    how long the box may live, and the other limits are of all commands together. It is opened and
    closed by `async with`. Raises `ConfigError` where the level does not work here, `WorldError`
    where the box cannot be made."""

    def __init__(
        self,
        files: Mapping[str, Content] | None = None,
        *,
        folder: str | os.PathLike | None = None,
        limits: Limits | None = None,
        level: Level = "full",
        environment: Mapping[str, str] | None = None,
        readable: Sequence[str] = (),
    ) -> None:
        self.limits = limits or Limits(seconds=3600.0, cpu_seconds=3600.0)
        settings = {
            "output_bytes": self.limits.output_bytes,
            "flood_bytes": self.limits.flood_bytes,
            # elsewhere `kill(-1)` would end what is ours
            "alone": level != "bare" or slots.available(),
        }
        interpreter = sys.executable if level == "full" else python()
        source = _SERVE.read_text("utf-8")
        self._job = Job(
            [interpreter, "-I", "-S", "-c", source, json.dumps(settings)],
            files or {},
            folder=folder,
            limits=self.limits,
            level=level,
            environment=environment or {},
            readable=readable,
        )
        self._cancel, self._lock = threading.Event(), asyncio.Lock()
        self._buffer, self._ended = bytearray(), None
        self._count = 0

    async def __aenter__(self) -> Box:
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[dict] = asyncio.Queue()
        reading, self._writing = os.pipe()
        channel = Channel(reading, self._take, self._cancel)
        self._closed = self._loop.create_future()
        # a thread of its own: a box may live as long as an episode
        self._thread = threading.Thread(target=self._live, args=(channel, reading), daemon=True)
        self._thread.start()
        try:
            first = await self._answer(120.0)
        except BaseException:
            await self._close()
            raise
        if "ready" not in first:
            await self._close()
            raise WorldError(f"the box cannot be made: {self._reason()}")
        return self

    async def __aexit__(self, *_) -> None:
        await self._close()

    async def run(self, command: Sequence[str], seconds: float, *, stdin: bytes = b"") -> Result:
        """Runs a command in the box's folder for at most `seconds`, one at a time, and ends what it
        leaves running. The result's `cpu` and `peak_mb` are not known. A command that ends the box
        itself, or goes over a limit of the whole box, gets the box's own status.

        Raises `WorldError` if the box has ended before."""
        async with self._lock:
            if self._ended is not None:
                raise WorldError(f"the box has ended: {self._reason()}")
            self._count += 1
            told = {
                "id": self._count,
                "command": list(command),
                "seconds": seconds,
                "stdin": base64.b64encode(stdin).decode(),
            }
            line = (json.dumps(told) + "\n").encode()
            try:
                await asyncio.to_thread(self._write, line)
                record = await self._answer(seconds + _LATE)
            except BaseException:
                await self._close()  # its server is in the middle of something
                raise
        if record.get("id") != self._count:
            ended = await self._closed
            if ended.status in ("exited", "infra"):
                detail = f"the box has ended: {self._reason()}"
                return dataclasses.replace(ended, status="signal", code=9, detail=detail)
            return ended
        output = base64.b64decode(record["output"]).decode("utf-8", "replace")
        return Result(
            record["status"], record["code"], output, b"", record["seconds"], 0.0, 0.0,
            self._job.level,
        )  # fmt: skip

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._writing, line) :]

    def _live(self, channel: Channel, reading: int) -> None:
        """The box's thread, from its beginning to its end."""
        try:
            ended: Result | BaseException = execute(self._job, channel)
        except BaseException as error:
            ended = error
        os.close(reading)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end, ended)

    def _end(self, ended: Result | BaseException) -> None:
        self._ended = ended
        if isinstance(ended, Result):
            self._closed.set_result(ended)
        else:
            self._closed.set_exception(ended)
            self._closed.exception()  # whoever opens the box raises it
        self._answers.put_nowait({"ended": True})

    def _take(self, data: bytes) -> None:
        """Answers of the server, in the box's thread."""
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            with contextlib.suppress(ValueError, RuntimeError):
                self._loop.call_soon_threadsafe(self._answers.put_nowait, json.loads(line))

    async def _answer(self, seconds: float) -> dict:
        try:
            record = await asyncio.wait_for(self._answers.get(), seconds)
        except TimeoutError:
            self._cancel.set()  # its server has been stopped by what it runs
            record = await self._answers.get()
        if isinstance(self._ended, BaseException):
            raise self._ended
        return record

    def _reason(self) -> str:
        ended = self._ended
        return f"{ended.status} {ended.detail or ended.output[-500:]}" if ended else "closed"

    async def _close(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            os.close(writing)  # the end of its input is the end of the server
            self._cancel.set()
        with contextlib.suppress(Exception):
            await asyncio.shield(self._closed)
        await asyncio.to_thread(self._thread.join)
