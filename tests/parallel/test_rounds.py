"""A process fails while a thread of it waits for a message that nobody sends."""

import pytest
from run.several import identities, running, start, wait_for_exits

pytestmark = pytest.mark.slow
PROGRAM = """
import concurrent.futures, sys, time
import jax
from jaxdeep.parallel import hosts, rounds
from jaxdeep.errors import DataError

with hosts.joined():
    if jax.process_index() == 0:
        time.sleep(3600)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    with rounds.Rounds("never") as gather:
        pool.submit(gather, "here")
        raise {"OSError": OSError, "DataError": DataError}[sys.argv[1]]("the disk is gone")
"""


@pytest.mark.parametrize("error", ["OSError", "DataError"])
def test_a_thread_that_waits_for_the_others_does_not_keep_a_process_from_its_end(error):
    processes = [start(PROGRAM, error, identity=identity) for identity in identities(2)]
    with running(processes):
        first, second = wait_for_exits(processes)
    status = 1 if error == "OSError" else 2
    assert [process.returncode for process in processes] == [status, status], second
    assert f"error: process 1 of 2 failed ({error}: the disk is gone)" in first
    assert second.strip().endswith(f"{error}: the disk is gone")
