"""Intervals and tests against published values and by counting every case."""

import itertools
import math

import pytest

from jaxdeep.eval import statistics


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I,
        # method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert statistics.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_are_the_shares_a_score_test_would_just_accept():
    z = 1.959964
    for successes, n in ((3, 10), (50, 200), (199, 200)):
        share = successes / n
        for bound in statistics.wilson(successes, n, z):
            assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n))


def test_wilson_holds_its_share_and_is_symmetric():
    for n in range(1, 30):
        for successes in range(n + 1):
            low, high = statistics.wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            assert statistics.wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_of_nothing_says_nothing_and_refuses_the_impossible():
    assert statistics.wilson(0, 0) == (0.0, 1.0)
    for successes in (-1, 4):
        with pytest.raises(ValueError, match="successes"):
            statistics.wilson(successes, 3)


def outcomes(only_a, only_b, both=0, neither=0):
    pairs = [(1, 0)] * only_a + [(0, 1)] * only_b + [(1, 1)] * both + [(0, 0)] * neither
    return [bool(x) for x, _ in pairs], [bool(y) for _, y in pairs]


def test_mcnemar_counts_every_way_the_differences_could_have_fallen():
    for only_a, only_b in itertools.product(range(6), repeat=2):
        n, seen = only_a + only_b, abs(only_a - only_b)
        flips = [sum(flip) for flip in itertools.product((0, 1), repeat=n)]
        extreme = sum(abs(2 * heads - n) >= seen for heads in flips) / len(flips)
        assert statistics.mcnemar(*outcomes(only_a, only_b, both=3, neither=2)) == pytest.approx(
            extreme
        )


def test_mcnemar_gives_known_values():
    # 12 of 13 discordant pairs one way: 2 * (1 + 13) / 2**13.
    assert statistics.mcnemar(*outcomes(12, 1)) == pytest.approx(28 / 8192)
    assert statistics.mcnemar(*outcomes(0, 0, both=5)) == 1.0
    assert statistics.mcnemar(*outcomes(4, 4)) == 1.0


def test_mcnemar_agrees_with_the_binomial_test_at_size():
    scipy_stats = pytest.importorskip("scipy.stats")
    for only_a, only_b in ((60, 31), (500, 430), (2000, 1900)):
        expected = scipy_stats.binomtest(only_a, only_a + only_b).pvalue
        assert statistics.mcnemar(*outcomes(only_a, only_b)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_takes_pairs_only():
    with pytest.raises(ValueError):
        statistics.mcnemar([True], [True, False])


def test_student_gives_the_interval_of_a_small_sample():
    # Student (1908), "The probable error of a mean": hours of sleep gained with a drug, as shares
    # of a day
    gained = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    low, high = statistics.student([10 / 24 + hours / 24 for hours in gained])
    assert (low * 24 - 10, high * 24 - 10) == pytest.approx((0.898, 3.762), abs=2e-3)
    assert statistics.student([0.5, 0.5]) == (0.5, 0.5)
    assert statistics.student([0.9, 1.0]) == pytest.approx((0.31470, 1.0))
    with pytest.raises(ValueError, match="at least 2"):
        statistics.student([0.5])
