"""Several processes, one a host, as one run: how they find each other, and what one's end is to the others.

    --coordinator=HOST:PORT --processes=N --process=I            said so, whatever else is there
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   the same, of those that no flag says
    Slurm            the step that srun started
    TPUs             the variables of GKE (slices, too), or the metadata of a TPU VM
    Kubernetes       an Indexed Job or a JobSet: with the package `kubernetes`, or an address and a number in
                     its manifest, to which Kubernetes adds JOB_COMPLETION_INDEX

What is not said is asked of the cluster; --processes=1 is a run of its own anywhere.

Collectives wait for ever for a process that was killed. So each process counts up under a key of jax's
coordination service; the first one watches the others' counts, and they watch its own. Time is measured in
the watcher's own ticks: when all were stopped together, as machines are, nobody is missed.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from jaxdeep.errors import ConfigError, JaxdeepError

ADDRESS, COUNT, INDEX = SAID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
POD = "JOB_COMPLETION_INDEX"
CLUSTERS = (
    clusters.SlurmCluster,
    clusters.GkeTpuCluster,
    clusters.GceTpuCluster,
    clusters.K8sCluster,
)
JOIN_SECONDS = 300  # seconds for all to come together
HEARTBEAT_SECONDS = 3.0  # seconds between two counts
MISSED_BEATS = 15  # ticks without a count after which a process is gone
ALIVE, LEFT = "jaxdeep/alive/", "jaxdeep/left/"
_rounds_made = itertools.count()
AGAIN = "The same command in all processes continues from the last checkpoint"


class Place(NamedTuple):
    """Where process 0 is (host:port), how many processes there are, and which one this is. `devices` of
    this host's are its own where it shares the host with others; None: all."""

    address: str
    count: int
    index: int
    devices: list[int] | None = None


def place(coordinator: str = "", processes: str = "", process: str = "") -> Place | None:
    """What these flags and the environment say about this process; None where it is on its own.
    ConfigError where only half of it is said."""
    flags = (coordinator, processes, process)
    said = [flag or os.environ.get(name, "") for flag, name in zip(flags, SAID, strict=True)]
    if said[1] == "1":
        return None
    if all(said):
        return _read(*said)
    found = next((kind for kind in CLUSTERS if _is_in(kind)), None)
    if found is not None and (count := found.get_process_count()) > 1:
        address = said[0] or found.get_coordinator_address(
            timeout_secs=JOIN_SECONDS,
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
        )
        index = said[2] or str(found.get_process_id())
        return _read(address, said[1] or str(count), index)._replace(devices=_devices(found))
    if found is None and POD in os.environ:
        if not (said[0] and said[1]):
            raise ConfigError(
                f"this pod is number {os.environ[POD]} of a Job and cannot know the others: set {ADDRESS} "
                f"and {COUNT} in the manifest, or install the package kubernetes; {COUNT}=1 where each pod "
                "is a run of its own"
            )
        return _read(said[0], said[1], said[2] or os.environ[POD])
    return _read(*said) if any(said) else None


def connect(*flags: str) -> CoordinatorProxy | None:
    """Bring the processes of a run together where the flags (as of `place`) or the environment speak of
    several, and give this one's line to the first. To be called before any device is used; where they do
    not all come, SystemExit."""
    if jax.distributed.is_initialized() or (here := place(*flags)) is None:
        return None
    line = CoordinatorProxy.open(here.address) if here.index else None
    # SIGTERM is seen between two steps: no second handler, which keeps it from ending a start
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            line.near if line else here.address,
            here.count,
            here.index,
            here.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=600,  # by a clock that goes on when all are stopped; see Watch
        )
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(
            f"error: process {here.index} of {here.count}: not all came to {here.address} within {JOIN_SECONDS} s. "
            f"Do all run this command, and can they reach that port? ({str(error).splitlines()[0]:.200})"
        ) from error
    finally:
        if line:
            line.close_door()
    return line


@contextlib.contextmanager
def joined(*flags: str) -> Iterator[None]:
    """The processes of a run, connected by `flags` as of `place`: they end together. One that fails tells the others why; one that
    is gone is missed. They leave then with a line on stderr, and the status of the one that failed."""
    line = connect(*flags)
    if jax.process_count() == 1:
        yield
        return
    watch = Heartbeat(distributed.global_state.client)
    if line:
        line.hold()
    try:
        yield
        multihost_utils.sync_global_devices("the end")  # one may have more to write than others
        if line:
            line.let_go()
    except BaseException as error:
        if not isinstance(error, (JaxdeepError, KeyboardInterrupt)):
            watch.find_missing()  # a collective breaks where its other end does, by errors of many kinds
        kinds = ((JaxdeepError, 2), (KeyboardInterrupt, 130), (BaseException, 1))
        status = next(status for kind, status in kinds if isinstance(error, kind))
        why = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        watch.tell(status, f"failed ({why})")
        # jax's own end would wait for the others; the message of this error comes before it
        atexit.register(watch.go, status)
        raise
    finally:
        watch.stopped.set()


class Heartbeat:
    """Counts up for this process, and ends it when another one is gone."""

    def __init__(self, client: Any) -> None:
        self.client, self.stopped = client, threading.Event()
        self.ticks = self.answered = 0  # answered: my tick when the service last did
        self.leaving = threading.Lock()
        self.parting, self.parted = threading.Event(), threading.Event()
        self.index, self.count = jax.process_index(), jax.process_count()
        self.seen: dict[str, tuple[str, int]] = {}  # the count of each, and my tick when it was new
        self._count()
        multihost_utils.sync_global_devices("all count")
        for work in (self._tick, self._run, self._part):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def tell(self, status: int, why: str, index: int | None = None) -> None:
        """Let the others know that this process ends, or the one with `index` did."""
        index = self.index if index is None else index
        said = json.dumps([status, f"process {index} of {self.count} {why}"])
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{LEFT}{index}", said, True)

    def go(self, status: int) -> None:
        """End this process; the first one when the others have, for they would miss its service."""
        self.parting.set()
        self.parted.wait(
            HEARTBEAT_SECONDS if self.index else 4 * HEARTBEAT_SECONDS
        )  # a service that is gone never answers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def find_missing(self) -> None:
        """Return when every other process was heard of anew, and none told of its end; else end this one."""
        before, waiting = self._counts(), threading.Event()
        for _ in range(MISSED_BEATS):
            waiting.wait(HEARTBEAT_SECONDS)
            now = self._counts()
            silent = [i for i in before if now.get(i) == before[i] and i != str(self.index)]
            if not silent:
                return self._hear()
        self._miss(int(silent[0]))

    def _part(self) -> None:
        self.parting.wait()  # made beforehand: Python begins no thread while it ends
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_delete(f"{ALIVE}{self.index}")
            waiting = threading.Event()
            for _ in range(3 if self.index == 0 else 0):
                gone = {key.removeprefix(LEFT) for key, _ in self.client.key_value_dir_get(LEFT)}
                if not self._counts().keys() - gone:
                    break
                waiting.wait(HEARTBEAT_SECONDS)
        self.parted.set()

    def _tick(self) -> None:
        while not self.stopped.wait(HEARTBEAT_SECONDS):
            self.ticks += 1
            if self.ticks - self.answered >= MISSED_BEATS:
                self._miss(0)  # which has the service

    def _run(self) -> None:
        while not self.stopped.wait(HEARTBEAT_SECONDS):
            try:
                self._count()
                missing = self._silent()
                self._hear()
            except jax.errors.JaxRuntimeError:
                continue
            self.answered = self.ticks
            if missing is not None:
                self._miss(missing)

    def _hear(self) -> None:
        """End this process where another one told of its end."""
        left = self.client.key_value_dir_get(LEFT)
        if left and not self.stopped.is_set():
            self._leave(*json.loads(left[0][1]))

    def _count(self) -> None:
        self.client.key_value_set(f"{ALIVE}{self.index}", str(self.ticks), True)

    def _counts(self) -> dict[str, str]:
        found = self.client.key_value_dir_get(ALIVE)
        return {key.removeprefix(ALIVE): count for key, count in found}

    def _silent(self) -> int | None:
        """A process that has not counted for too long."""
        for index, count in self._counts().items():
            if (index == "0") == (self.index == 0):
                continue  # the first watches the others, and they the first
            if self.seen.get(index, ("",))[0] != count:
                self.seen[index] = (count, self.ticks)
            elif self.ticks - self.seen[index][1] >= MISSED_BEATS:
                return int(index)
        return None

    def _miss(self, index: int) -> None:
        why = f"is gone, or hangs: nothing was heard of it for {MISSED_BEATS * HEARTBEAT_SECONDS:.0f} s"
        if index:  # the first holds what is told; without it each of the others sees for itself
            self.tell(1, why, index)
        self._leave(1, f"process {index} of {self.count} {why}")

    def _leave(self, status: int, why: str) -> None:
        with self.leaving:  # never given back: both threads may know
            again = "" if status == 2 else f". {AGAIN}"
            print(f"error: {why}{again}", file=sys.stderr, flush=True)
            self.go(status)


class CoordinatorProxy:
    """A way to the coordination service, in the first process, that stays whole when that one ends: jax
    aborts a process at once, with a long message, whose connection to it breaks. What arrives at a socket of
    this machine (`near`) is handed on, and what comes back; while the line is held, an end there is not."""

    @classmethod
    def open(cls, address: str) -> CoordinatorProxy | None:
        """None where there is no place for a socket: jax then has its way."""
        try:
            return cls(address)
        except OSError:
            return None

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.far = host.strip("[]"), int(port)
        self.held, self.lock, self.broken = False, threading.Lock(), []
        # its name must be short, which TMPDIR may not be; a port would be asked of a proxy, where one is set
        self.folder = tempfile.mkdtemp(prefix="jaxdeep-", dir="/tmp")
        self.near, self.door = f"unix:{self.folder}/line", socket.socket(socket.AF_UNIX)
        self.door.bind(f"{self.folder}/line")
        self.door.listen()
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    def close_door(self) -> None:
        """Nothing new comes in; to be called once the processes are together, or will not be."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def hold(self) -> None:
        """Hide from now on that the other end broke."""
        self.held = True

    def let_go(self) -> None:
        """Hide it no longer."""
        with self.lock:
            self.held = False
            for end in self.broken:
                _hang_up(end)

    def _accept(self) -> None:
        while True:
            near, _ = self.door.accept()
            threading.Thread(target=self._join, args=(near,), name="line", daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self.far, timeout=20)
            far.settimeout(None)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # not there yet: the client comes again
            near.close()
            return
        threading.Thread(target=self._back, args=(far, near), name="line", daemon=True).start()
        _hand_on(near, far)
        _hang_up(far)

    def _back(self, far: socket.socket, near: socket.socket) -> None:
        _hand_on(far, near)
        with self.lock:
            if self.held:
                self.broken.append(near)
            else:
                _hang_up(near)


def _hand_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class Rounds:
    """Rounds in which each process says something small (JSON) and hears what all said, in their order:
    over the network, not the devices, so in any thread. All make the same ones in the same order, and take
    the same rounds; one that does not come is waited for, and missed by `Watch`. An error that leaves it
    as a context ends the waiting: a process does not end before its threads."""

    def __init__(self, name: str) -> None:
        made = next(_rounds_made)  # what was said in an earlier one of this name is not heard again
        self.name, self.round = f"jaxdeep/circle/{name}-{made}", 0
        self.index, self.count = jax.process_index(), jax.process_count()
        self.turn, self.closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.closed.set()
            with self.turn:
                pass  # no thread waits any more

    def __call__(self, said: Any) -> list[Any]:
        if self.count == 1:
            return [said]
        with self.turn:
            client, at = distributed.global_state.client, f"{self.name}/{self.round}"
            if self.index:
                client.key_value_set(f"{at}/{self.index}", json.dumps(said))
                heard = self._wait(client, f"{at}/all")
            else:
                rest = [self._wait(client, f"{at}/{i}") for i in range(1, self.count)]
                heard = f"[{', '.join([json.dumps(said), *rest])}]"
                client.key_value_set(f"{at}/all", heard)
                # all are in this round, so none still reads the one before
                client.key_value_delete(f"{self.name}/{self.round - 1}")
            self.round += 1
        return json.loads(heard)

    def _wait(self, client: Any, key: str) -> str:
        while not self.closed.is_set():
            try:
                return client.blocking_key_value_get(key, round(1000 * HEARTBEAT_SECONDS))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise InterruptedError(f"{key} is no longer waited for: this process ends")


def _is_in(kind: type[clusters.ClusterEnv]) -> bool:
    # jax warns in every pod that lacks the package, also where there is nothing to ask
    told = os.environ.get(ADDRESS) and os.environ.get(COUNT)
    if kind is clusters.K8sCluster and (told or POD not in os.environ):
        return False
    return kind.is_env_present()


def _read(address: str, count: str, index: str) -> Place:
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and count.isdigit() and index.isdigit() and int(index) < int(count):
        return Place(address, int(count), int(index))
    said = ", ".join(
        f"{name}={value!r}" for name, value in zip(SAID, (address, count, index), strict=True)
    )
    raise ConfigError(
        f"several processes need the address host:port of the first, their number and their own: {said}"
    )


def _devices(kind: type[clusters.ClusterEnv]) -> list[int] | None:
    """jax gives a process of Slurm one device; the only one on its node has all."""
    if kind is not clusters.SlurmCluster or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    layout = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")
    return None if set(layout) == {"1"} else [kind.get_local_process_id()]
