"""An all-gather of small messages over the network instead of the devices.

A collective on devices occupies them, must be started in the same order everywhere, and belongs to
the thread that runs the programs. Threads that load data or schedule calls agree through the
key-value store of jax's coordination service instead (8 ms a round for 8 processes on 2 cores).
"""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import jax

from jaxdeep.parallel import heartbeat, hosts

_created = itertools.count()


class Rounds:
    """Calling it with a message (JSON) returns the messages of all processes, by process index.

    All processes must create the same `Rounds` in the same order and call each equally often; calls
    may come from any thread. A call waits for every process without a timeout: if one is dead,
    `Heartbeat` ends the run.

    As a context manager: if the block raises, a thread that still waits in a call gets an
    InterruptedError, so that the process can exit.
    """

    def __init__(self, name: str) -> None:
        # The number keeps the messages of an earlier `Rounds` of this name apart: a process
        # may still find those in the store.
        self._prefix, self._round = f"jaxdeep/rounds/{name}-{next(_created)}", 0
        self.index, self.count = jax.process_index(), jax.process_count()
        self._one_call, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self._closed.set()
            with self._one_call:
                pass  # whoever was waiting has returned

    def __call__(self, message: Any) -> list[Any]:
        if self.count == 1:
            return [message]
        with self._one_call:
            client, key = hosts.coordination_client(), f"{self._prefix}/{self._round}"
            if self.index:
                client.key_value_set(f"{key}/{self.index}", json.dumps(message))
                messages = self._wait(client, f"{key}/all")
            else:
                # Process 0 collects and answers: 2 messages per process, not one from each to each
                others = [self._wait(client, f"{key}/{i}") for i in range(1, self.count)]
                messages = f"[{', '.join([json.dumps(message), *others])}]"
                client.key_value_set(f"{key}/all", messages)
                # all processes are in this round, so none still reads the one before
                client.key_value_delete(f"{self._prefix}/{self._round - 1}")
            self._round += 1
        return json.loads(messages)

    def _wait(self, client: Any, key: str) -> str:
        # in short waits, since one inside the client cannot be interrupted
        milliseconds = round(1000 * heartbeat.HEARTBEAT_SECONDS)
        while not self._closed.is_set():
            try:
                return client.blocking_key_value_get(key, milliseconds)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise InterruptedError(f"stopped waiting for {key}: this process is ending")
