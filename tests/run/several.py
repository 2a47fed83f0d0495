"""Starts several processes on this machine as if each were on a host of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time

from run import small

from jaxdeep.parallel import hosts

FLAGS = ("coordinator", "processes", "process")
VERB = "import sys; from jaxdeep.run import cli; sys.exit(cli.main())"
PATIENCE = 900  # seconds; only reached when something hangs, however busy the machine is


def identities(count: int) -> list[tuple[str, str, str]]:
    """The values of FLAGS, or of hosts.VARIABLES, for each process of a run of `count`."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    return [(address, str(count), str(index)) for index in range(count)]


def start(program: str, *args: str, identity=(), devices: int = 1, **options) -> subprocess.Popen:
    """A process that runs a program. `identity`, one of `identities`, makes it one of several,
    through its environment; `options` are those of Popen."""
    env = small.environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    env |= dict(zip(hosts.VARIABLES, identity, strict=False))
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def start_verb(count: int, *args: str, program: str = VERB, devices: int = 1) -> list:
    """A verb in `count` processes, which know of each other by flags."""
    return [
        start(
            *(program, *args),
            *(f"--{flag}={value}" for flag, value in zip(FLAGS, identity, strict=True)),
            devices=devices,
        )
        for identity in identities(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Wait for the processes, which must exit with 0; what each printed on stdout."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
    return [out for out, _ in outputs]


@contextlib.contextmanager
def running(processes: list[subprocess.Popen]):
    """The processes, none of which is left behind."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def wait(ready) -> None:
    """Wait until `ready()`. The time is this process's own: a machine that is suspended loses
    none."""
    for _ in range(5 * PATIENCE):
        if ready():
            return
        time.sleep(0.2)
    raise TimeoutError(f"not within {PATIENCE} s")


def wait_for_exits(processes: list[subprocess.Popen]) -> list[str]:
    """Wait until the processes have ended by themselves; what each printed on stderr."""
    wait(lambda: all(process.poll() is not None for process in processes))
    return [process.communicate()[1] for process in processes]
