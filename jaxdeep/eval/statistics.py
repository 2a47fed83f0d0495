"""How sure a result is: intervals for a share and for a mean over runs, and a test of two systems.

Wilson (1927), "Probable inference, the law of succession, and statistical inference"; McNemar
(1947), "Note on the sampling error of the difference between correlated proportions", in its exact
form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of the share `successes` / `n`, as (low, high). `z` is the quantile
    of the normal distribution, by default for 95 %. (0, 1) for n = 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes=} is not between 0 and {n=}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push a share of 0 or 1 out of its own interval.
    low = 0.0 if successes == 0 else (middle - spread) / scale
    high = 1.0 if successes == n else (middle + spread) / scale
    return low, high


# The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student(shares: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of `shares`, the results of runs that differ in their seed on
    the same tasks. It is cut to [0, 1], and a little too wide for more than ten runs, where the
    table ends. ValueError for fewer than two."""
    n = len(shares)
    if n < 2:
        raise ValueError(f"an interval of {n} runs: there must be at least 2")
    mean = sum(shares) / n
    spread = math.sqrt(sum((share - mean) ** 2 for share in shares) / (n - 1) / n)
    half = T975[min(n - 1, len(T975)) - 1] * spread
    return max(0.0, mean - half), min(1.0, mean + half)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """McNemar's exact test, two-sided: the probability that two equally good systems differ at
    least as much as `a` and `b` do. Both are right or wrong by task, in the same order. 1 where
    they never differ."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)
