"""Tools and rewards on a real Ray cluster of this machine."""

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Annotated

import pytest

from jaxdeep.agent.remote import on_ray
from jaxdeep.agent.rollout import score
from jaxdeep.agent.tool import ToolError, tool
from jaxdeep.errors import ConfigError, ToolTimeout, WorldError
from jaxdeep.types import Stop, Task, Trajectory

WORKERS, CALLS, SECONDS = 8, 1000, 0.1


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="pip install 'jaxdeep[ray]'")
    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_without_ray_the_install_line_is_shown(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdeep\[ray\]'"):
        on_ray(len)


def test_an_async_function_is_refused():
    async def look() -> str:
        return ""

    with pytest.raises(TypeError, match="plain functions"):
        on_ray(look)


@pytest.mark.slow
def test_a_thousand_calls_through_the_death_of_a_worker(cluster):
    @tool(timeout=600.0)
    @on_ray
    def look(number: Annotated[int, "which"], k: int = 2) -> dict:
        """Look it up."""
        start = time.monotonic()
        time.sleep(SECONDS)
        return {"found": number * k, "pid": os.getpid(), "from": start, "to": time.monotonic()}

    assert look.schema["function"]["parameters"]["required"] == ["number"]

    async def all_of_them():
        calls = [asyncio.ensure_future(look.call({"number": n})) for n in range(CALLS)]
        while sum(call.done() for call in calls) < CALLS // 4:
            await asyncio.sleep(0.01)
        victim = json.loads(calls[0].result().text)["pid"]
        os.kill(victim, signal.SIGKILL)
        return victim, await asyncio.gather(*calls)

    victim, results = asyncio.run(all_of_them())
    found = [json.loads(result.text) for result in results]
    assert [one["found"] for one in found] == [2 * n for n in range(CALLS)]
    pids = {one["pid"] for one in found}
    assert len(pids) > WORKERS and victim in pids and os.getpid() not in pids
    seconds = max(one["to"] for one in found) - min(one["from"] for one in found)
    print(f"{CALLS} calls of {SECONDS} s on {WORKERS} workers: {seconds:.1f} s")
    edges = sorted((one[edge], step) for one in found for edge, step in (("from", 1), ("to", -1)))
    assert max(itertools.accumulate(step for _, step in edges)) == WORKERS


@pytest.mark.slow
def test_who_failed_decides_as_ever(cluster, tmp_path):
    @tool(timeout=20.0)
    @on_ray
    def fail(how: str) -> str:
        if how == "model":
            raise ToolError("there is no such file")
        if how == "world":
            raise WorldError("the index is gone")
        if how == "tool":
            return str(1 / 0)
        os._exit(1)

    result = asyncio.run(fail.call({"how": "model"}))
    assert result.failed and result.text == "there is no such file"
    for how, error, said in (
        ("world", WorldError, "the index is gone"),
        ("tool", ZeroDivisionError, "division by zero"),
        ("death", WorldError, "fail on Ray: WorkerCrashedError"),
    ):
        with pytest.raises(error, match=said):
            asyncio.run(fail.call({"how": how}))


@pytest.mark.slow
def test_a_call_whose_time_is_over_is_killed(cluster, tmp_path):
    @tool(timeout=3.0)
    @on_ray
    def hang(path: str) -> str:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(3600)

    with pytest.raises(ToolTimeout, match="hang did not answer within 3 s"):
        asyncio.run(hang.call({"path": str(tmp_path / "pid")}))
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} goes on")


if importlib.util.find_spec("ray"):  # at the top level, where a worker finds the class by its name

    class Counter:
        """A tool that is a method."""

        def __init__(self, start):
            self.start = start

        @tool
        @on_ray
        def add(self, more: int) -> str:
            """Add."""
            self.start += more
            return str(self.start)


@pytest.mark.slow
def test_methods_work_on_a_copy_and_rewards_run_there_too(cluster):
    counter = Counter(5)
    results = [asyncio.run(counter.add.call({"more": 2})).text for _ in range(2)]
    assert results == ["7", "7"] and counter.start == 5

    judge = on_ray(lambda task, trajectory: len(task.question) / 10)
    trajectory = Trajectory(Task("1", "What is it?"), stop=Stop.FINISHED)
    asyncio.run(score(SimpleNamespace(rewards={"length": (2.0, judge)}), trajectory))
    assert trajectory.rewards == {"length": 1.1} and trajectory.reward == 2.2


@pytest.mark.slow
def test_ray_is_imported_by_the_first_call_only():
    loaded = "from jaxdeep.agent.remote import on_ray; import sys; on_ray(len); print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
