"""A local proxy for jax's coordination service, which outlives the death of process 0.

jax keeps a connection from each process to the coordination service in process 0. When it breaks,
jax aborts the process immediately, with a page of C++ text ("another task died ..."). That would
come before `Heartbeat` can say which process died, and hide the reason that process 0 gave.

So every other process connects to a socket on its own machine, and threads copy what arrives there
to the service and its answers back. When the service's end closes, the local end stays open: to jax
the service is then merely slow, and `Heartbeat` decides what happens.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from typing import Any

CONNECT_SECONDS = 20  # for one attempt to reach the service
COPY_BYTES = 1 << 16


class CoordinatorProxy:
    """Forwards connections from `address`, a socket of this machine, to the coordination service at
    HOST:PORT. A broken connection is passed on until `hide_disconnects`."""

    @classmethod
    def open(cls, coordinator: str) -> CoordinatorProxy | None:
        """A proxy for the service at `coordinator`; None where no socket can be created. jax then
        connects directly, and the death of process 0 is reported in jax's own way."""
        try:
            return cls(coordinator)
        except OSError:
            return None

    def __init__(self, coordinator: str) -> None:
        host, _, port = coordinator.rpartition(":")
        self._service = host.strip("[]"), int(port)
        self._hiding, self._lock = False, threading.Lock()
        self._broken: list[socket.socket] = []  # local ends whose other end closed unseen
        # /tmp, because a socket's path may have 107 characters and TMPDIR may be longer. Not a TCP
        # port: gRPC would look for it behind the proxy that http_proxy names, where that is set.
        self._folder = tempfile.mkdtemp(prefix="jaxdeep-", dir="/tmp")
        path = f"{self._folder}/coordinator"
        self.address = f"unix:{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._start(self._accept)

    def remove_socket(self) -> None:
        """Delete the socket's file, after which nothing new connects; open connections stay. To be
        called when jax is connected, or has given up."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def hide_disconnects(self) -> None:
        """Keep local connections open from now on when the service's end closes."""
        self._hiding = True

    def pass_on_disconnects(self) -> None:
        """Close the local ends that were kept open, and keep none from now on."""
        with self._lock:
            self._hiding = False
            for local in self._broken:
                _shut_down(local)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=work, args=args, name="coordinator-proxy", daemon=True).start()

    def _accept(self) -> None:
        while True:
            local, _ = self._listener.accept()
            self._start(self._forward, local)

    def _forward(self, local: socket.socket) -> None:
        try:
            service = socket.create_connection(self._service, timeout=CONNECT_SECONDS)
            service.settimeout(None)
            service.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # process 0 has not started yet: jax's client tries again
            local.close()
            return
        self._start(self._return_answers, service, local)
        _copy(local, service)
        _shut_down(service)

    def _return_answers(self, service: socket.socket, local: socket.socket) -> None:
        _copy(service, local)
        with self._lock:
            if self._hiding:
                self._broken.append(local)
            else:
                _shut_down(local)


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until either end closes."""
    with contextlib.suppress(OSError):
        while data := source.recv(COPY_BYTES):
            target.sendall(data)


def _shut_down(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
