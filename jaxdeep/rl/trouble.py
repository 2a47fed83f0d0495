"""What keeps a run from learning, said on the console when it begins.

Nothing of this stops a step by itself: a reward that cannot be computed, a tool that fails, prompts
that leave no room, groups whose rewards are all equal. A run that goes on in silence looks like one
that trains.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from jaxdeep.console import say
from jaxdeep.errors import DataError
from jaxdeep.rl.advantages import is_flat
from jaxdeep.types import Stop, Trajectory

VOID_STEPS = 3  # steps in a row without a reward, or without a sampled token, that end a run
FLAT_STEPS = 5  # steps in a row of equal rewards that are worth a line
PAUSE = 10  # steps before a line of the same kind is said again; doubled each time
MANY_CALLS = 4  # of a tool in a step: where all of these fail, the tool is broken


class Trouble:
    """Looks at the rollouts of each step of a run. Lines go to `say`: each kind at once where it
    begins, and while it lasts again after 10 more steps, then 20, 40 and so on, with a count."""

    def __init__(self, say: Callable[[str], None] = say) -> None:
        self._say = say
        self._seen: collections.Counter[str] = collections.Counter()  # steps with it, by kind
        self._due: dict[str, int] = {}  # of these, the next that is told
        self._flat = self._void = 0  # steps in a row
        self._why = "there was nothing to learn"  # of the last step, as far as known

    def see(
        self,
        step: int,
        groups: Sequence[Sequence[Trajectory]],
        compared: Sequence[Sequence[float | None]],
    ) -> None:
        """After the rollouts of a step; `compared` are its rewards as `assign_advantages` returned
        them. DataError after VOID_STEPS steps in a row without any reward or any sampled token:
        going on would only burn hours."""
        rollouts = [t for group in groups for t in group]
        void = self._unjudged(step, rollouts) | self._unsampled(step, rollouts)
        for name, answer in broken_tools(rollouts).items():
            line = f"every call of the tool {name} fails. The first: {answer}"
            self._tell(f"tool {name}", step, line)
        self._equal(step, [] if void else compared)
        self._void = self._void + 1 if void else 0
        if self._void >= VOID_STEPS:
            raise DataError(
                f"step {step} and the {self._void - 1} steps before it had nothing to learn. In the "
                f"last one {self._why}"
            )

    def refuse_idle(self, steps: int, updates: int) -> None:
        """At the end of a run: DataError if none of its steps updated the policy. A run of fewer
        than FLAT_STEPS steps may have been unlucky with its tasks, and only says so."""
        if not steps or updates:
            return
        line = (
            f"none of the {steps} steps updated the policy, which is what it was at the start. In the "
            f"last one {self._why}"
        )
        if steps >= FLAT_STEPS or self._void:
            raise DataError(line)
        self._say(line)

    def _unjudged(self, step: int, rollouts: Sequence[Trajectory]) -> bool:
        without = [t for t in rollouts if t.reward is None]
        first = next((t.failure for t in without if t.failure), "a reward that is None")
        line = f"{len(without)} of {len(rollouts)} rollouts have no reward. The first: {first}"
        return self._of_rollouts("unjudged", step, line, len(without), len(rollouts))

    def _unsampled(self, step: int, rollouts: Sequence[Trajectory]) -> bool:
        full = [t for t in rollouts if not t.sampled and t.stop is Stop.MAX_TOKENS]
        shortest = min((len(t.tokens) for t in full), default=0)
        line = (
            f"{len(full)} of {len(rollouts)} prompts leave no room for a token: they have {shortest} "
            "and more. Raise rollout.limits.max_tokens, or shorten the prompts"
        )
        return self._of_rollouts("unsampled", step, line, len(full), len(rollouts))

    def _of_rollouts(self, kind: str, step: int, line: str, count: int, all: int) -> bool:
        """Tells of some rollouts, if there are any; whether it is all of them."""
        if count:
            self._tell(kind, step, line)
        if count == all:
            self._why = line
        return count == all

    def _equal(self, step: int, compared: Sequence[Sequence[float | None]]) -> None:
        self._flat = self._flat + 1 if compared and all(map(is_flat, compared)) else 0
        if not self._flat:
            return
        levels = sorted({round(r, 6) for group in compared for r in group if r is not None})
        shown = ", ".join(f"{level:g}" for level in levels[:3]) + ", ..." * (len(levels) > 3)
        self._why = (
            f"the rewards within every group are equal (they are {shown}), so that no rollout is "
            "better than another: the tasks may be too hard or too easy, or the reward blind"
        )
        if self._flat >= FLAT_STEPS:
            self._tell("flat", step, f"for {self._flat} steps {self._why}")

    def _tell(self, kind: str, step: int, line: str) -> None:
        self._seen[kind] += 1
        count = self._seen[kind]
        if count == self._due.get(kind, 1):
            # 1, 11, 31, 71, ...: each pause twice the one before
            self._due[kind] = 2 * count + PAUSE - 1
            self._say(f"step {step}: {line}" + f" (in {count} steps so far)" * (count > 1))


def _calls(rollouts: Sequence[Trajectory]) -> dict[str, tuple[int, int]]:
    """The calls of each tool that was called at least MANY_CALLS times, and how many failed."""
    sums: collections.Counter[str] = collections.Counter()
    for trajectory in rollouts:
        sums.update({k: int(n) for k, n in trajectory.metrics.items() if k.startswith("tool/")})
    names = [key.split("/")[1] for key in sums if key.endswith("/calls")]
    return {
        name: (sums[f"tool/{name}/calls"], sums[f"tool/{name}/failed"])
        for name in names
        if sums[f"tool/{name}/calls"] >= MANY_CALLS
    }


def broken_tools(rollouts: Sequence[Trajectory]) -> dict[str, str]:
    """The tools that were called at least MANY_CALLS times and failed each time, with what a call
    was answered, or how the world failed."""
    broken = [name for name, (calls, failed) in _calls(rollouts).items() if failed >= calls]
    return {name: _answer(name, rollouts) for name in broken}


def broken_share(rollouts: Sequence[Trajectory]) -> float:
    """Of the tools with at least MANY_CALLS calls, the share of those whose every call failed."""
    calls = _calls(rollouts)
    return sum(failed >= made for made, failed in calls.values()) / max(len(calls), 1)


def _answer(tool: str, rollouts: Sequence[Trajectory]) -> str:
    for trajectory in rollouts:
        if f"tool {tool}:" in trajectory.failure:
            return trajectory.failure
        for message in trajectory.messages:
            if message.role == "tool" and message.name == tool:
                return (message.content.strip() or "no text").splitlines()[0]
    return "no text"
