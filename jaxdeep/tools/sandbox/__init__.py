"""Runs programs that may do anything, in boxes that hold them.

    result = await run(Job([sys.executable, "main.py"], {"main.py": source}))
    result = execute(job)             # the same without asyncio
    async with Box({"main.py": source}) as box:     # one that is kept for many commands
        result = await box.run(["ls", "-l"], seconds=5)
    print(self_test().text())         # which level works on this machine, and what it holds

Nothing of a program ever runs in the calling process. A job names the level it needs and is
refused, with what to do, where that does not work; it never runs at a weaker one.
"""

from jaxdeep.tools.sandbox.box import Box
from jaxdeep.tools.sandbox.levels import best, need, problem, remedy
from jaxdeep.tools.sandbox.limits import LEVELS, Level, Limits, Result, Status
from jaxdeep.tools.sandbox.run import Job, execute, python, run
from jaxdeep.tools.sandbox.selftest import SelfTest, self_test

__all__ = [
    "LEVELS",
    "Box",
    "Job",
    "Level",
    "Limits",
    "Result",
    "SelfTest",
    "Status",
    "best",
    "execute",
    "need",
    "problem",
    "python",
    "remedy",
    "run",
    "self_test",
]
