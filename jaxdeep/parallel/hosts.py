"""Several processes, one per host, as one run: how they find each other and end together.

    --coordinator=HOST:PORT --processes=N --process=I            flags, which come before all else
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   variables, for flags not given
    Slurm            the step that srun started
    TPUs             the variables of GKE (also for several slices), or the metadata of a TPU VM
    Kubernetes       an Indexed Job or a JobSet: with the package `kubernetes`, or with an address
                     and a count in its manifest; Kubernetes itself adds JOB_COMPLETION_INDEX

What neither flags nor variables say is asked of the cluster. --processes=1 makes a run of its own
anywhere, for example inside a Slurm step of several tasks.

This is the only module that imports jax's private parts: no public function tells which cluster a
process is in without also connecting, or gives access to the coordination service's key-value
store.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.parallel.heartbeat import Heartbeat
from jaxdeep.parallel.proxy import CoordinatorProxy

ADDRESS, COUNT, INDEX = VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
POD_INDEX = "JOB_COMPLETION_INDEX"  # set by Kubernetes in each pod of an Indexed Job
CLUSTERS = (
    clusters.SlurmCluster,
    clusters.GkeTpuCluster,
    clusters.GceTpuCluster,
    clusters.K8sCluster,
)
JOIN_SECONDS = 300  # for all processes to come together
JAX_HEARTBEAT_SECONDS = 600  # a last resort; see `heartbeat` for what notices a death, and when


class Process(NamedTuple):
    """This process among those of its run. `coordinator` is the address host:port in process 0
    where all meet; `local_devices` are the numbers of its devices on a host that it shares with
    other processes, None for all devices of the host."""

    coordinator: str
    count: int
    index: int
    local_devices: list[int] | None = None


def find_process(coordinator: str = "", processes: str = "", process: str = "") -> Process | None:
    """What these flags, the environment and the cluster say about this process; None where it is a
    run of its own. ConfigError where they say only a part of it."""
    flags = (coordinator, processes, process)
    address, count, index = (
        flag or os.environ.get(name, "") for flag, name in zip(flags, VARIABLES, strict=True)
    )
    if count == "1":
        return None
    if address and count and index:
        return _parse(address, count, index)
    cluster = next((kind for kind in CLUSTERS if _runs_in(kind)), None)
    if cluster is not None and (tasks := cluster.get_process_count()) > 1:
        address = address or cluster.get_coordinator_address(
            timeout_secs=JOIN_SECONDS,
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
        )
        found = _parse(address, count or str(tasks), index or str(cluster.get_process_id()))
        return found._replace(local_devices=_local_devices(cluster))
    if cluster is None and POD_INDEX in os.environ:
        if not (address and count):
            raise ConfigError(
                f"this pod is number {os.environ[POD_INDEX]} of a Job and cannot find the others: "
                f"set {ADDRESS} and {COUNT} in the manifest, or install the package kubernetes; "
                f"set {COUNT}=1 where each pod is a run of its own"
            )
        return _parse(address, count, index or os.environ[POD_INDEX])
    return _parse(address, count, index) if address or count or index else None


def connect(**flags: str) -> CoordinatorProxy | None:
    """Connect the processes of a run, where the flags (those of `find_process`) or the environment
    say that there are several; SystemExit where not all of them come within JOIN_SECONDS. To be
    called before any device is used. Returns the proxy through which this process reaches the first
    one, None in the first one itself and where there is only one."""
    if jax.distributed.is_initialized() or (here := find_process(**flags)) is None:
        return None
    proxy = CoordinatorProxy.open(here.coordinator) if here.index else None
    # jax would install its own handler of SIGTERM, which also makes a process deaf to it while it
    # starts. A run looks for SIGTERM itself, between two steps.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            proxy.address if proxy else here.coordinator,
            here.count,
            here.index,
            here.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(
            f"error: process {here.index} of {here.count}: not all processes reached "
            f"{here.coordinator} within {JOIN_SECONDS} s. Does every host run this command, and "
            f"can it reach that port? ({str(error).splitlines()[0]:.200})"
        ) from error
    finally:
        if proxy:
            proxy.remove_socket()
    return proxy


@contextlib.contextmanager
def joined(**flags: str) -> Iterator[None]:
    """Connect the processes of a run as `connect` does, and end them together: when one fails or
    dies, the others print a line that says so and exit, with the status of the one that failed.
    Nothing special happens where there is only one process."""
    proxy = connect(**flags)
    if jax.process_count() == 1:
        yield
        return
    heartbeat = Heartbeat(coordination_client())
    if proxy:
        proxy.hide_disconnects()
    try:
        yield
        # one process may have more to write than the others, which must not be missed meanwhile
        multihost_utils.sync_global_devices("every process is done")
        if proxy:
            proxy.pass_on_disconnects()
    except BaseException as error:
        if not isinstance(error, (JaxdeepError, KeyboardInterrupt)):
            # The death of another process breaks the collective that this one is in, by errors of
            # many kinds. Then the other is to be named, not this error.
            heartbeat.confirm_others()
        status = _exit_status(error)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        heartbeat.report(status, f"failed ({reason})")
        # At exit, after this error's traceback is printed, and before jax's own shutdown (atexit
        # calls the last registered first), which would wait for processes that are stuck.
        atexit.register(heartbeat.exit, status)
        raise
    finally:
        heartbeat.stop()


def coordination_client() -> Any:
    """This process's client of jax's coordination service: its key-value store is in process 0."""
    return distributed.global_state.client


def _exit_status(error: BaseException) -> int:
    """As `cli.main` returns it for this error."""
    if isinstance(error, JaxdeepError):
        return 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _runs_in(cluster: type[clusters.ClusterEnv]) -> bool:
    # jax's check for Kubernetes warns in every pod without the package `kubernetes`, also where the
    # package would not be needed
    if cluster is clusters.K8sCluster:
        known = os.environ.get(ADDRESS) and os.environ.get(COUNT)
        if known or POD_INDEX not in os.environ:
            return False
    return cluster.is_env_present()


def _parse(address: str, count: str, index: str) -> Process:
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and count.isdigit() and index.isdigit() and int(index) < int(count):
        return Process(address, int(count), int(index))
    values = zip(VARIABLES, (address, count, index), strict=True)
    raise ConfigError(
        "a run of several processes needs the address host:port of the first, the number of "
        "processes and the index of this one, from 0: "
        + ", ".join(f"{name}={value!r}" for name, value in values)
    )


def _local_devices(cluster: type[clusters.ClusterEnv]) -> list[int] | None:
    # jax gives a Slurm task one device, whatever its node has; the only task of a node takes all
    if cluster is not clusters.SlurmCluster or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")
    return None if set(tasks_per_node) == {"1"} else [cluster.get_local_process_id()]
