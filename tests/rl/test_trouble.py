"""What keeps a run from learning is said when it begins, not too often, and ends a run that can do
nothing."""

import re

import pytest

from jaxdeep.errors import DataError
from jaxdeep.rl.advantages import assign_advantages
from jaxdeep.rl.summary import summarize
from jaxdeep.rl.trouble import FLAT_STEPS, VOID_STEPS, Trouble, broken_tools
from jaxdeep.types import Branch, Message, Piece, Stop, Task, Trajectory

SECONDS = {"tool/find/seconds": 1.0, "tool/find/cached": 0.0}
SAID = Piece([1, 2], "policy", [-1.0, -1.0])


def rollout(reward, *, sampled=True, stop=Stop.FINISHED, failure="", **metrics):
    branch = Branch([Piece([7, 8, 9], "world"), *([SAID] if sampled else [])])
    said = [Message("tool", "bad key\nat line 3", name="find")] if metrics else []
    return Trajectory(
        Task("a", "?"),
        branches=[branch],
        messages=said,
        stop=stop,
        failure=failure,
        rewards={"r": reward},
        reward=reward,
        metrics={f"tool/find/{name}": float(n) for name, n in metrics.items()} | SECONDS,
    )


def other(trajectory, task):
    trajectory.task = Task(task, "?")
    return trajectory


GOOD = [rollout(0.0), rollout(1.0)]
FLAT = [rollout(0.5), rollout(0.5)]
UNJUDGED = [rollout(None, failure="reward 'x': KeyError: 'y'"), rollout(None)]
FULL = [rollout(0.0, sampled=False, stop=Stop.MAX_TOKENS) for _ in range(2)]
HALF = [*GOOD, rollout(None, failure="WorldError: tool find: OSError: down")]


def watch(*steps):
    """The lines said in a run of such groups, and the refusal that ended it."""
    lines: list[str] = []
    trouble = Trouble(lines.append)
    for n, group in enumerate(steps, start=1):
        try:
            trouble.see(n, [group], assign_advantages([group]))
        except DataError as error:
            return lines, str(error)
    return lines, None


def test_a_run_that_learns_says_nothing():
    assert watch(*[GOOD] * 50) == ([], None)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        (UNJUDGED, r"step 1: 2 of 2 rollouts have no reward\. The first: reward 'x': KeyError"),
        (FULL, r"step 1: 2 of 2 prompts leave no room .* 3 and more.*rollout\.limits\.max_tokens"),
    ],
)
def test_steps_without_anything_to_learn_end_a_run_after_a_while(group, says):
    lines, refusal = watch(*[group] * 9)
    assert re.match(says, lines[0]) and len(lines) == 1
    assert refusal.startswith(f"step {VOID_STEPS} and the {VOID_STEPS - 1} steps before it")
    assert lines[0].removeprefix("step 1: ")[:20] in refusal
    lines, refusal = watch(*([group, group, GOOD] * 9))  # never so many in a row
    assert refusal is None


def test_what_lasts_is_said_again_ever_less_often():
    lines, refusal = watch(*[HALF] * 100)
    assert refusal is None
    assert [int(line.split()[1][:-1]) for line in lines] == [1, 11, 31, 71]
    assert "1 of 3 rollouts have no reward" in lines[0] and "OSError: down" in lines[0]
    assert lines[2].endswith("(in 31 steps so far)")


def test_equal_rewards_are_said_once_they_last():
    lines, _ = watch(*[FLAT] * (FLAT_STEPS - 1), GOOD, *[FLAT] * (FLAT_STEPS - 1))
    assert lines == []
    lines, _ = watch(*[FLAT] * FLAT_STEPS)
    assert re.match(
        rf"step {FLAT_STEPS}: for {FLAT_STEPS} steps .*equal \(they are 0\.5\)", lines[0]
    )


def test_a_tool_that_always_fails_is_named():
    broken = [rollout(r, calls=2, failed=2) for r in (0.0, 1.0)]
    lines, _ = watch(broken)
    assert lines == ["step 1: every call of the tool find fails. The first: bad key"]
    assert summarize([broken])["rollout/broken_tools"] == 1.0
    for rare in ([rollout(0.0, calls=1, failed=1)], [rollout(0.0, calls=9, failed=8)]):
        assert broken_tools(rare) == {} and summarize([rare])["rollout/broken_tools"] == 0.0


def test_shares_of_what_cannot_be_learned_from_are_metrics():
    found = summarize([[*HALF, *FULL]])
    assert found["rollout/unjudged"] == pytest.approx(0.2)
    assert found["rollout/unsampled"] == pytest.approx(0.4)


def test_a_run_without_an_update_is_refused_at_its_end():
    lines: list[str] = []
    trouble = Trouble(lines.append)
    trouble.see(1, [FLAT], assign_advantages([FLAT]))
    says = r"none of the \d steps updated the policy.*are equal"
    with pytest.raises(DataError, match=says):
        trouble.refuse_idle(FLAT_STEPS, 0)
    trouble.refuse_idle(FLAT_STEPS, 1)
    trouble.refuse_idle(0, 0)
    assert lines == []
    trouble.refuse_idle(2, 0)  # too few to tell
    assert re.match(says, lines[0])
    trouble.see(2, [UNJUDGED], assign_advantages([UNJUDGED]))
    with pytest.raises(DataError, match=r"none of the 2 steps .*2 of 2 rollouts have no reward"):
        trouble.refuse_idle(2, 0)
