"""Process 0 dies or hangs while the others wait for it in a collective. That other processes die or
fail is in tests/run/test_processes_end.py."""

import contextlib
import os
import pathlib
import signal
import time

import pytest
from run.several import identities, start, wait, wait_for_exits

from jaxdeep.parallel import heartbeat

# Processes that wait for each other for ever; what takes a minute is done in seconds. Each writes a
# line to a file of its own for every hundred collectives.
PROGRAM = """
import itertools, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jaxdeep.parallel import heartbeat, hosts

heartbeat.HEARTBEAT_SECONDS, heartbeat.MISSED_BEATS = 0.5, 10
with hosts.joined(), open(f"{sys.argv[1]}/{jax.process_index()}", "w") as file:
    for turn in itertools.count():
        multihost_utils.process_allgather(np.ones(1))
        if turn % 100 == 10:
            print(turn, file=file, flush=True)
"""


def lines(path: pathlib.Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def left_behind(processes):
    """Process groups that still have a member."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            yield process.pid


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_the_first_is_missed_when_it_is_gone_or_hangs(death, tmp_path):
    processes = [
        start(PROGRAM, str(tmp_path), identity=identity, process_group=0)
        for identity in identities(3)
    ]
    paths = [tmp_path / str(index) for index in range(3)]

    def all_go_on():
        """Wait until each process has made another hundred collectives."""
        before = [lines(path) for path in paths]
        wait(
            lambda: (
                all(lines(path) > n for path, n in zip(paths, before, strict=True))
                or any(process.poll() is not None for process in processes)
            )
        )
        assert all(process.poll() is None for process in processes)

    try:
        all_go_on()
        for process in processes:  # as machines that are suspended together
            process.send_signal(signal.SIGSTOP)
        time.sleep(7)  # longer than a death takes to be noticed
        for process in processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(2)  # several beats, in which a wrong alarm would come
        all_go_on()
        processes[0].send_signal(death)
        errors = wait_for_exits(processes[1:])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    reason = "is gone, or hangs: no heartbeat from it for 5 s"
    line = f"error: process 0 of 3 {reason}. {heartbeat.CONTINUE}\n"
    for process, text in zip(processes[1:], errors, strict=True):
        assert process.returncode == 1 and line in text and "another task died" not in text
    assert not list(left_behind(processes))
