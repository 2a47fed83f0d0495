"""The order in which a run draws its tasks: passes over the whole set, each shuffled anew.

With a filter, tasks that are solved too rarely or too often are mostly skipped. `position` holds
everything that decides the next tasks, so a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from jaxdeep.errors import ConfigError, DataError
from jaxdeep.settings import Above, AtLeast, AtMost, section


@section
class SolveRateFilter:
    """Which tasks are worth drawing. Those never tried, and those whose last group was solved at a
    rate from `low` to `high`, are always taken. Others are taken with probability `rest`: the
    policy changes, and their rate is only known again once they are tried."""

    low: Annotated[float, AtLeast(0), AtMost(1), "the lowest solve rate that is taken"] = 0.1
    high: Annotated[float, AtLeast(0), AtMost(1), "the highest solve rate that is taken"] = 0.9
    rest: Annotated[
        float, Above(0), AtMost(1), "share taken of the others; with 0 none would be tried again"
    ] = 0.1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError(
                f"grpo.curriculum.low={self.low} must not be above grpo.curriculum.high={self.high}"
            )


class TaskOrder:
    """The tasks `0 .. count - 1` in the order of a run."""

    def __init__(self, count: int, seed: int, prefer: SolveRateFilter | None = None) -> None:
        self.count, self.seed, self.prefer = count, seed, prefer
        self.at = 0  # tasks drawn or skipped so far, over all epochs
        self.rates: dict[int, float] = {}  # the last solve rate of each task that was tried
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch, and its order of the tasks

    def draw(self, size: int, without: Collection[int] = ()) -> list[int]:
        """The next `size` tasks, none of them twice and none of `without`; fewer where the set has
        no more."""
        out: list[int] = []
        while len(out) < min(size, self.count - len(without)):
            index = self._task(self.at)
            self.at += 1
            if index not in out and index not in without and self._wanted(index):
                out.append(index)
        return out

    def note(self, index: int, rate: float | None) -> None:
        """Note the share of a group that solved the task; None where none could be judged."""
        if self.prefer and rate is not None:
            self.rates[index] = rate

    @property
    def epochs(self) -> float:
        """How often the set was passed over."""
        return self.at / self.count

    def position(self) -> dict[str, Any]:
        """What `restore` needs, in values that JSON keeps."""
        rates = {str(i): rate for i, rate in sorted(self.rates.items())}
        return {"at": self.at, "rates": rates, "of": [self.count, self.seed]}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on from the `position` of another order of the same tasks. DataError where the tasks
        or the seed are not the same: its numbers would mean other tasks."""
        of = position.get("of", [self.count, self.seed])
        if of != [self.count, self.seed]:
            raise DataError(
                f"the run has drawn from {of[0]} tasks in the order of train.seed={of[1]}; now "
                f"there are {self.count} and train.seed={self.seed}. Use the same, or another "
                "--workdir with train.start"
            )
        self.at = position["at"]
        self.rates = {int(index): rate for index, rate in position["rates"].items()}

    def _task(self, at: int) -> int:
        epoch, place = divmod(at, self.count)
        if self._order[0] != epoch:
            order = list(range(self.count))
            random.Random(f"tasks {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][place]

    def _wanted(self, index: int) -> bool:
        if self.prefer is None or index not in self.rates:
            return True
        if self.prefer.low <= self.rates[index] <= self.prefer.high:
            return True
        # Drawn from the position rather than a stateful generator, which a resumed run would lack.
        return random.Random(f"prefer {self.seed} {self.at}").random() < self.prefer.rest
