"""Evaluation with a chat of whole messages as tokens: order, seeds, limits, counting and
comparing."""

import asyncio
import dataclasses
import types

import pytest

from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.errors import DataError, WorldError
from jaxdeep.eval import harness, statistics
from jaxdeep.rewards import answers
from jaxdeep.rl import summary
from jaxdeep.types import Completion, Message, Sampling, Stop, Task, ToolCall, Trajectory

LIMITS = Limits(
    max_turns=2, max_calls=2, turn_tokens=4, max_tokens=64, result_tokens=8, seconds=10.0
)


class Chat:
    """A token is the number of a task; what the policy says to it is the answer of the same
    number."""

    stop_ids = ()

    def opening(self, messages, tools=()):
        return [int(messages[0].content)]

    def parse(self, tokens):
        return Message("assistant", f"<answer>{tokens[0]}</answer>")

    def is_closed(self, tokens):
        return False


@dataclasses.dataclass
class Numbers:
    """Ten tasks: say the task's number. Tasks in `broken` lose their world."""

    broken: tuple[int, ...] = ()
    opened: list[int] = dataclasses.field(default_factory=list)
    closed: list[int] = dataclasses.field(default_factory=list)
    rewards = types.MappingProxyType({"em": (1.0, answers.answer_em)})

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return Task(str(index), str(index), (str(index),))

    def env(self, task):
        taskset, number = self, int(task.id)

        class One(Env):
            async def open(self):
                taskset.opened.append(number)
                if number in taskset.broken:
                    raise WorldError("gone")
                return [Message("user", task.question)]

            async def close(self):
                taskset.closed.append(number)

        return One()


class Policy:
    """Says what it was asked, after `turn(number)`; numbers from `wrong` on are answered with
    99."""

    def __init__(self, wrong=10, turn=None):
        self.wrong, self.running, self.most, self.seeds = wrong, 0, 0, {}
        self.turn = turn or (lambda number: asyncio.sleep(0.002 * (10 - number)))

    async def __call__(self, prompt, *, seed, max_new, sampling):
        (number,) = prompt
        self.seeds[number] = seed
        self.running += 1
        self.most = max(self.most, self.running)
        await self.turn(number)
        self.running -= 1
        said = 99 if number >= self.wrong else number
        return Completion([said], [0.0], "stop")


def evaluate(taskset, policy, **options):
    work = harness.evaluate(
        taskset,
        policy,
        Chat(),
        limits=LIMITS,
        sampling=Sampling(temperature=0.0),
        **{"seed": 0, **options},
    )
    return asyncio.run(work)


def test_every_task_is_run_once_in_order_and_scored():
    taskset, done = Numbers(), []
    ended = [asyncio.Event() for _ in range(11)]
    ended[10].set()

    def on_done(trajectory):
        done.append(trajectory)
        ended[int(trajectory.task.id)].set()

    def turn(number):  # after all later tasks
        return ended[number + 1].wait()

    found = evaluate(taskset, Policy(wrong=7, turn=turn), on_done=on_done)
    assert [t.task.id for t in found] == [str(i) for i in range(10)]
    assert [t.reward for t in found] == [1.0] * 7 + [0.0] * 3
    assert sorted(taskset.opened) == sorted(taskset.closed) == list(range(10))
    # `on_done` is called as each ends, and the last tasks end first
    assert [id(t) for t in done] == [id(t) for t in reversed(found)]


def test_at_most_so_many_run_at_once():
    for concurrency in (1, 3):
        policy = Policy()
        evaluate(Numbers(), policy, concurrency=concurrency)
        assert policy.most == concurrency


def test_a_tasks_seed_does_not_depend_on_which_others_run():
    whole, part, other = Policy(), Policy(), Policy()
    evaluate(Numbers(), whole)
    found = evaluate(Numbers(), part, indices=[7, 2])
    assert [t.task.id for t in found] == ["7", "2"]
    assert part.seeds == {number: whole.seeds[number] for number in (7, 2)}
    evaluate(Numbers(), other, seed=1000)
    assert not set(other.seeds.values()) & set(whole.seeds.values())


def test_an_error_of_ours_stops_all_and_closes_every_environment():
    class Broken(Policy):
        async def __call__(self, prompt, **options):
            if prompt == [9]:
                raise ValueError("bug")
            return await super().__call__(prompt, **options)

    taskset = Numbers()
    with pytest.raises(ValueError, match="bug"):
        evaluate(taskset, Broken())
    assert sorted(taskset.opened) == sorted(taskset.closed)


def test_a_dead_world_counts_as_wrong_and_is_reported():
    found = evaluate(Numbers(broken=(0, 1)), Policy(wrong=9))
    low, high = statistics.wilson(7, 10)
    assert harness.summarize(found) == {
        "n": 10,
        "em": 0.7,
        "em_low": low,
        "em_high": high,
        "f1": 0.7,
        "calls": 0.0,
        "turns": 0.8,
        "failed": 2,
        "truncated": 0,
        "reward/em": 7 / 8,  # of those that could be judged
    }


def trajectory(id, answer, *, stop=Stop.FINISHED, calls=0, turns=1):
    messages = [Message("assistant", calls=(ToolCall("search"),)) for _ in range(calls)]
    messages += [Message("assistant", f"<answer>{answer}</answer>")]
    metrics = {"calls": float(calls), "turns": float(turns)}
    rewards = {"answer": float(answer == "right")}
    task = Task(id, "?", ("right",))
    return Trajectory(task, messages=messages, stop=stop, metrics=metrics, rewards=rewards)


def test_summary_counts_calls_turns_and_stops():
    row = harness.summarize(
        [
            trajectory("a", "right", calls=2, turns=3),
            trajectory("b", "wrong right", stop=Stop.MAX_TURNS, turns=2),
            trajectory("c", "right", stop=Stop.FAILED),
            trajectory("d", "other", stop=Stop.TURN_TOKENS, calls=1),
        ]
    )
    assert (row["em"], row["calls"], row["turns"]) == (0.25, 0.75, 7 / 4)
    assert row["f1"] == pytest.approx((1 + 2 / 3) / 4)
    assert (row["failed"], row["truncated"]) == (1, 2)


def test_calls_are_those_that_were_made_here_as_in_training():
    run = trajectory("a", "right", calls=3)
    run.metrics["calls"] = 2.0  # a limit refused the third
    assert harness.summarize([run])["calls"] == 2
    assert summary.summarize([[run]])["rollout/calls"] == 2


def test_greedy_rollouts_take_the_most_likely_token_with_the_seeds_of_an_evaluation():
    class Noting(Policy):
        async def __call__(self, prompt, *, sampling, **options):
            samplings.append(sampling)
            return await super().__call__(prompt, sampling=sampling, **options)

    samplings, policy, same, done = [], Noting(), Policy(), []
    found = asyncio.run(
        harness.greedy(Numbers(), policy, Chat(), LIMITS, 2, [7, 2], on_done=done.append)
    )
    assert [t.task.id for t in found] == ["7", "2"] and len(done) == 2
    assert {sampling.temperature for sampling in samplings} == {0.0}
    evaluate(Numbers(), same)
    assert policy.seeds == {number: same.seeds[number] for number in (7, 2)}
    policy = Policy()
    assert len(asyncio.run(harness.greedy(Numbers(), policy, Chat(), LIMITS, 3))) == 10
    assert policy.most == 3


class Graded(Numbers):
    """Worth more the larger the number said, without any <answer>; right from 5 on."""

    rewards = types.MappingProxyType(
        {
            "brief": (0.1, lambda task, trajectory: 1.0),
            "grade": (1.0, lambda task, trajectory: int(task.id) / 5),
        }
    )
    right = "grade"


def test_the_reward_that_a_task_set_names_says_what_is_right():
    class Plain(Chat):
        def parse(self, tokens):
            return Message("assistant", "done")

    class FirstDecides(Graded):
        right = None

    def found(taskset):
        work = harness.greedy(taskset, Policy(), Plain(), LIMITS, 10)
        return harness.summarize(asyncio.run(work))

    row = found(Graded())
    assert row["em"] == 0.5 and "f1" not in row  # nobody gave an answer to compare
    assert (row["reward/brief"], row["reward/grade"]) == (1.0, pytest.approx(0.9))
    assert found(FirstDecides())["em"] == 1.0


def test_of_an_older_record_the_first_reward_decides():
    run = trajectory("a", "another way")
    for worth, right in ((1.0, True), (2.0, True), (0.5, False), (None, False)):
        run.rewards = {"answer": worth, "format": 1.0}
        assert harness.correct(run) == right
    run.metrics["right"] = 1.0
    assert harness.correct(run)
    run.stop = Stop.FAILED
    assert not harness.correct(run)
    assert not harness.correct(dataclasses.replace(run, rewards={}, metrics={}, stop=Stop.FINISHED))
    assert harness.reward_means([run]) == {"reward/answer": None, "reward/format": 1.0}


def test_summary_of_nothing_is_refused():
    with pytest.raises(DataError, match="no rollouts"):
        harness.summarize([])


def test_compare_pairs_by_task_whatever_the_order():
    a = [trajectory(str(i), "right" if i < 7 else "no") for i in range(10)]
    b = [trajectory(str(i), "right" if i in (0, 9) else "no") for i in reversed(range(10))]
    assert harness.compare(a, b) == {
        "n": 10,
        "both": 1,
        "only_a": 6,
        "only_b": 1,
        "neither": 2,
        "p": pytest.approx(2 * (1 + 7) / 2**7),
    }
    assert harness.compare(a, a)["p"] == 1.0


def test_compare_refuses_other_tasks_and_repeated_ones():
    a = [trajectory(str(i), "right") for i in range(4)]
    with pytest.raises(
        DataError, match="2 are only in the first, 1 only in the second, such as '0'"
    ):
        harness.compare(a, [*a[2:], trajectory("x", "right")])
    with pytest.raises(DataError, match="5 rollouts of 4 tasks"):
        harness.compare([*a, a[0]], a)


def test_an_evaluation_that_says_nothing_is_refused():
    failed = Trajectory(Task("1", "?"), stop=Stop.FAILED, failure="WorldError: down")
    full = Trajectory(Task("2", "?"), stop=Stop.MAX_TOKENS)
    with pytest.raises(DataError, match=r"all 2 rollouts failed\. The first: WorldError: down"):
        harness.refuse_unplayed([failed, failed])
    with pytest.raises(DataError, match="in none of the 2 rollouts a token was sampled"):
        harness.refuse_unplayed([failed, full])
