"""A box that is kept for many commands."""

import asyncio

import pytest

from jaxdeep.errors import WorldError
from jaxdeep.tools import sandbox
from jaxdeep.tools.sandbox import Box, levels


@pytest.fixture(params=["full", "guarded"])
def level(request):
    problem = sandbox.problem(request.param)
    if problem:
        pytest.skip(f"the level {request.param} does not work here: {problem}")
    return request.param


def shell(*scripts, level, seconds=60.0, **options):
    async def session():
        results = []
        async with Box({"a.txt": "first\n"}, level=level, **options) as box:
            for script in scripts:
                results.append(await box.run(["/bin/sh", "-c", script], seconds))
        return results

    return asyncio.run(session())


def test_commands_share_a_folder_and_nothing_runs_on(level):
    found = shell(
        "cat a.txt; echo second > b.txt; exit 3",
        "cat b.txt; sleep 300 & sleep 300 & echo started",
        "setsid sleep 301 & true",
        "ps -e 2>/dev/null | grep -c sleep; echo $HF_TOKEN end",
        "kill -SEGV $$",
        "no-such-command",
        level=level,
    )
    assert (found[0].status, found[0].code, found[0].output) == ("exited", 3, "first\n")
    assert (found[1].status, found[1].output) == ("exited", "second\nstarted\n")
    assert found[3].output.split() in (["0", "end"], ["end"])
    assert (found[4].status, found[4].code) == ("signal", 11)
    assert found[5].code == 127
    assert {result.level for result in found} == {level}


def test_a_command_over_its_limit_is_ended_and_the_box_goes_on(level):
    limits = sandbox.Limits(seconds=300, cpu_seconds=300, output_bytes=2000, flood_bytes=10**6)
    found = shell("trap '' TERM; while :; do sleep 1; done", "cat a.txt", level=level, seconds=0.5)
    assert [result.status for result in found] == ["timeout", "exited"]
    found = shell("yes", "seq 1000", "cat a.txt", level=level, limits=limits)
    assert [result.status for result in found] == ["output", "exited", "exited"]
    assert found[1].output.startswith("1\n2\n") and found[1].output.endswith("1000\n")
    assert "bytes left out" in found[1].output and found[2].output == "first\n"


def test_input_goes_in_and_an_error_is_an_answer(level):
    async def session():
        async with Box(level=level) as box:
            counted = await box.run(["wc", "-c"], 60, stdin=b"x" * 300_000)
            missing = await box.run(["/no/such/program"], 60)
            return counted, missing

    counted, missing = asyncio.run(session())
    assert counted.output.strip() == "300000"
    assert missing.code == 127 and "No such file" in missing.output


@pytest.mark.parametrize("script", ["kill -9 -1", "kill -STOP -1; sleep 50"])
def test_a_command_that_ends_the_box_is_told_so(level, script, monkeypatch):
    monkeypatch.setattr("jaxdeep.tools.sandbox.box._LATE", 2.0)

    async def session():
        async with Box(level=level) as box:
            found = await box.run(["/bin/sh", "-c", script], 1.0)
            if found.status == "exited":
                return found
            with pytest.raises(WorldError, match="the box has ended"):
                await box.run(["true"], 1.0)
            return found

    assert asyncio.run(session()).status == "signal"


def test_a_box_that_cannot_be_made_says_why(level, monkeypatch):
    async def session():
        async with Box(level=level, readable=["/usr"], folder="/no/such/folder"):
            pass

    with pytest.raises(Exception, match="is not a folder"):
        asyncio.run(session())
    monkeypatch.setattr(levels, "problem", lambda level: "nothing" if level != "bare" else "")
    with pytest.raises(Exception, match="does not work here: nothing"):
        asyncio.run(session())


def test_a_cancelled_command_ends_the_box(level):
    async def session():
        async with Box(level=level) as box:
            task = asyncio.create_task(box.run(["sleep", "300"], 300))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(WorldError, match="the box has ended"):
                await box.run(["true"], 1)

    asyncio.run(session())
