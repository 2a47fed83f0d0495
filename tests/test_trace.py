"""Seconds by stage, whatever overlaps, and a trace that opens after a kill. Time is a clock that
the tests advance."""

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxdeep import trace


class Clock:
    """In place of the module `time`. Each reading is a microsecond after the one before, so that no
    two spans begin at once."""

    def __init__(self):
        self.now = 1000.0

    def advance(self, seconds):
        self.now += seconds

    def perf_counter(self):
        self.advance(1e-6)
        return self.now

    def time(self):
        return 1.7e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trace, "time", clock)
    return clock


def events(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)


def test_timer_adds_up_by_stage_and_starts_again(clock):
    timer = trace.Timer()
    for _ in range(2):
        with timer("rollout"):
            clock.advance(10)
    with pytest.raises(KeyError), timer("step"):
        clock.advance(3)
        raise KeyError
    taken = timer.take()
    assert taken == {"time/rollout": pytest.approx(20), "time/step": pytest.approx(3)}
    assert timer.take() == {}


async def talks(tool):
    with trace.span("", "a conversation"), trace.span("tools", "search", k=1):
        await tool()


def test_what_overlaps_counts_once_and_has_lanes_of_its_own(tmp_path, clock):
    timer = trace.Timer(trace.Trace(tmp_path))

    async def many():
        together = asyncio.Barrier(20)

        async def tool():
            if await together.wait() == 0:
                clock.advance(5)
            await together.wait()

        await asyncio.gather(*(talks(tool) for _ in range(20)))

    with timer("rollout"):
        asyncio.run(many())
        clock.advance(2)
    with timer("train"):
        pass
    taken = timer.take()
    assert taken.keys() == {"time/rollout", "time/rollout/tools", "time/train"}
    assert taken["time/rollout/tools"] == pytest.approx(5, abs=1e-3)
    assert taken["time/rollout"] == pytest.approx(7, abs=1e-3)
    seen = events(tmp_path / "trace.json.gz")
    lanes = [event["tid"] for event in seen if event["name"] == "a conversation"]
    assert sorted(lanes) == list(range(20))
    by_lane = {}
    for event in seen:
        by_lane.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_lane.values():  # spans of one lane that overlap are nested
        for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert b[0] >= a[1] or b[1] <= a[1]
    search = {"name": "search", "cat": "tools", "ph": "X", "args": {"k": 1}}
    assert search.items() <= seen[0].items()
    assert seen[0]["ts"] / 1e6 == pytest.approx(1.7e9 + 1000, abs=1)  # the time of day


def test_what_is_open_counts_until_now(clock):
    timer = trace.Timer()
    begun, end = threading.Event(), threading.Event()

    def ahead():
        with timer("rollout"):
            begun.set()
            end.wait()

    thread = threading.Thread(target=ahead)
    thread.start()
    begun.wait()
    clock.advance(2)
    first = timer.take()
    clock.advance(30)
    second = timer.take()
    end.set()
    thread.join()
    assert first == {"time/rollout": pytest.approx(2, abs=1e-3)}
    assert second == {"time/rollout": pytest.approx(30, abs=1e-3)}
    assert trace.Timer().take() == {}


def test_without_a_stage_nothing_is_timed():
    timer = trace.Timer()
    with trace.span("tools", "search"):
        asyncio.run(talks(lambda: asyncio.sleep(0)))
    assert timer.take() == {}


def test_a_trace_is_whole_after_every_flush_and_bounded(tmp_path):
    kept = trace.Trace(tmp_path, limit=2000)
    kept.flush()
    assert list(tmp_path.iterdir()) == []
    sizes = []
    for number in range(200):
        kept.add("tools", f"</script> é {number}", number, number + 0.5, 0, {"n": number})
        kept.flush()
        assert events(tmp_path / "trace.json.gz")[-1]["args"] == {"n": number}
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert max(sizes) < 2 * 2100
    old, new = events(tmp_path / "old-trace.json.gz"), events(tmp_path / "trace.json.gz")
    numbers = [event["args"]["n"] for event in (*old, *new)]
    assert numbers == list(range(numbers[0], 200))
    again = trace.Trace(tmp_path)
    assert events(tmp_path / "trace.json.gz") == new  # a run with nothing to do leaves it
    again.add("train", "train", 0.0, 1.0, 0, {})
    again.flush()
    assert events(tmp_path / "old-trace.json.gz") == new
    assert [event["name"] for event in events(tmp_path / "trace.json.gz")] == ["train"]


def test_a_killed_run_leaves_a_trace_that_opens(tmp_path):
    program = (
        "import pathlib, sys\nfrom jaxdeep import trace\n"
        "timer = trace.Timer(trace.Trace(pathlib.Path(sys.argv[1])))\n"
        "for step in range(10**9):\n"
        "    with timer('train', step=step): pass\n"
        "    timer.take(); print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        seen = [int(run.stdout.readline()) for _ in range(50)][-1]
        os.kill(run.pid, signal.SIGKILL)
    found = [event["args"]["step"] for event in events(tmp_path / "trace.json.gz")]
    assert found == list(range(len(found))) and len(found) >= seen
