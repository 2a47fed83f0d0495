"""The walk over tasks: each once an epoch, in an order of its own, resumed to the task; with a
preference, by how often a task was solved."""

import collections
import json

import pytest

from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rl.curriculum import SolveRateFilter, TaskOrder


def test_every_task_comes_once_an_epoch_in_a_new_order():
    walk = TaskOrder(10, seed=3)
    first, second = walk.draw(10), walk.draw(10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert walk.epochs == 2.0
    assert TaskOrder(10, seed=3).draw(10) == first and TaskOrder(10, seed=4).draw(10) != first


def test_no_task_comes_twice_in_a_step_even_where_two_epochs_meet():
    walk = TaskOrder(7, seed=0)
    drawn = [walk.draw(5) for _ in range(60)]
    assert all(len(set(tasks)) == 5 for tasks in drawn)
    counts = collections.Counter(task for tasks in drawn for task in tasks)
    assert max(counts.values()) - min(counts.values()) < 25 and len(counts) == 7


def test_more_of_a_step_are_others_until_there_are_no_more():
    walk = TaskOrder(6, seed=0)
    first = walk.draw(4)
    rest = walk.draw(4, first)
    assert sorted(first + rest) == list(range(6))
    assert walk.draw(4, first + rest) == []


def test_a_walk_goes_on_where_it_was_saved():
    prefer = SolveRateFilter(0.2, 0.8, rest=0.3)
    whole = TaskOrder(9, 1, prefer)
    steps = []
    for n in range(40):
        tasks = whole.draw(4)
        steps.append(tasks)
        for task in tasks:
            whole.note(task, (task * (n + 1)) % 10 / 10)
        if n == 17:
            saved = json.loads(json.dumps(whole.position()))
    again = TaskOrder(9, 1, prefer)
    again.restore(saved)
    for n in range(18, 40):
        tasks = again.draw(4)
        assert tasks == steps[n]
        for task in tasks:
            again.note(task, (task * (n + 1)) % 10 / 10)
    assert again.position() == whole.position()


def test_tasks_too_easy_or_too_hard_come_less_often():
    rates = {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.3, 4: 0.7}
    walk, counts = TaskOrder(6, 0, SolveRateFilter(0.3, 0.7, rest=0.2)), collections.Counter()
    for _ in range(3000):
        for task in walk.draw(2):
            counts[task] += 1
            walk.note(task, rates.get(task))  # that of 5 is never known
    inside = [counts[task] for task in (1, 3, 4, 5)]
    assert max(inside) < 1.1 * min(inside)
    for task in (0, 2):
        assert 0.15 < counts[task] / inside[0] < 0.35
    assert walk.rates == rates


def test_without_a_preference_nothing_is_remembered():
    walk = TaskOrder(3, 0)
    walk.note(0, 0.0)
    assert walk.position() == {"at": 0, "rates": {}, "of": [3, 0]}


@pytest.mark.parametrize("other", [TaskOrder(5, 0), TaskOrder(10, 1)])
def test_a_walk_over_other_tasks_or_in_another_order_is_refused(other):
    walk = TaskOrder(10, 0)
    walk.draw(7)
    with pytest.raises(DataError, match="drawn from 10 tasks in the order of"):
        other.restore(walk.position())


@pytest.mark.parametrize(
    "bad", [dict(low=0.9, high=0.1), dict(low=-0.1), dict(high=1.1), dict(rest=0.0)]
)
def test_a_preference_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match=r"SolveRateFilter\.|low="):
        SolveRateFilter(**bad)
