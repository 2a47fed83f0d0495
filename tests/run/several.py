"""Several processes as several hosts."""

import os
import socket
import subprocess
import sys
import time

from run import small

from jaxdeep.parallel import hosts

FLAGS = ("coordinator", "processes", "process")
VERB = "import sys; from jaxdeep.run import cli; sys.exit(cli.main())"


def told(count: int) -> list[tuple[str, str, str]]:
    """What tells so many processes of each other."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    return [(address, str(count), str(index)) for index in range(count)]


def start(program: str, *args: str, several=(), devices: int = 1, **how) -> subprocess.Popen:
    """A process that runs a program, one of several where it is told of them; `how` as of Popen."""
    env = small.environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    env |= dict(zip(hosts.SAID, several, strict=False))
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def finish(runs: list[subprocess.Popen]) -> list[str]:
    """What each printed; they must end well."""
    said = [run.communicate(timeout=600) for run in runs]
    for run, (_, error) in zip(runs, said, strict=True):
        assert run.returncode == 0, error
    return [out for out, _ in said]


def verb(count: int, *args: str) -> list[subprocess.Popen]:
    """A verb in so many processes, told of each other by flags."""
    return [
        start(
            VERB, *args, *(f"--{flag}={value}" for flag, value in zip(FLAGS, several, strict=True))
        )
        for several in told(count)
    ]


def wait(ready, seconds: int) -> None:
    """Until something is so; the seconds are this process's own, not those it was stopped for."""
    for _ in range(5 * seconds):
        if ready():
            return
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds} s")
