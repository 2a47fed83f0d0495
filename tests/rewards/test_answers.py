"""Answers are compared as SQuAD does, and no reward can be had without being right."""

import json

import pytest

from jaxdeep.rewards import answers as text
from jaxdeep.types import Message, Task, ToolCall, Trajectory

TASK = Task("t", "Which planet is red, Mars or Venus?", ("Mars", "Planet Mars"))


def say(content, *calls):
    return Message("assistant", content, calls=calls)


def search(query="planets", name="search"):
    return say("", ToolCall(name, {"query": query}))


def shown(content, name="search"):
    return Message("tool", content, name=name)


def episode(*messages, task=TASK):
    return Trajectory(task, messages=[Message("user", task.question), *messages])


MISS, HIT = shown("Result 1: Venus\nhot"), shown("Result 1: Space\nThe red one is Mars.")
RIGHT, WRONG = say("<answer>mars</answer>"), say("<answer>Venus</answer>")


def test_normalize_is_squads():
    assert text.normalize("The  Answer, of an\tApple's (a) day!") == "answer of apples day"
    assert text.normalize("Nov.7, 1963") == "nov7 1963"
    assert text.normalize("10.8") == "108" != text.normalize("10 8")
    assert text.normalize("Theodore Anand") == "theodore anand"
    assert text.normalize("Å — “quoted”") == "å — “quoted”"


def test_exact_match_takes_any_of_the_answers():
    assert text.exact_match("the planet MARS.", TASK.answers) == 1.0
    assert text.exact_match("Mars or Venus", TASK.answers) == 0.0
    assert text.exact_match("", ()) == 0.0


def test_nothing_is_never_right():
    for answers in (("A",), ("?",), ("the",), ("", " "), ("Mars",)):
        for nothing in ("", " ", "an", "!!"):
            assert text.exact_match(nothing, answers) == text.f1(nothing, answers) == 0.0
    assert text.exact_match("a", ("A",)) == text.f1("A ", ("A",)) == 1.0


def test_f1_counts_words_with_repetitions():
    assert text.f1("Lockheed", ("Lockheed Corporation",)) == pytest.approx(2 / 3)
    assert text.f1("20 April 1966", ("April 20, 1966",)) == 1.0
    assert text.f1("go go go", ("go on",)) == pytest.approx(2 / 5)
    assert text.f1("x", ("y", "x y")) == pytest.approx(2 / 3)


def test_the_answer_is_what_the_last_closed_tag_holds():
    cases = {
        "<answer> Mars\n</answer>": "Mars",
        "<answer>a</answer> no, <answer>b</answer>": "b",
        "<answer>a <answer>b</answer>": "b",
        "<answer>a</answer> <answer>b": "a",
        "<answer></answer>": "",
        "</answer><answer>": None,
        "<answer>a": None,
        "Mars": None,
    }
    assert {said: text.extract_answer(said) for said in cases} == cases


def test_the_final_answer_is_in_a_last_message_without_calls():
    assert text.final_answer(episode(RIGHT)) == "mars"
    assert text.final_answer(episode(RIGHT, say("done"))) is None
    assert text.final_answer(episode(say("<answer>mars</answer>", ToolCall("search")))) is None
    assert text.final_answer(episode()) is None
    assert text.final_answer(episode(Message("user", "<answer>mars</answer>"))) is None


def test_format_asks_for_one_answer_and_readable_calls():
    good = [episode(search(), HIT, RIGHT), episode(RIGHT), episode(search("x"), MISS, WRONG)]
    assert [text.format_ok(TASK, e) for e in good] == [1.0] * 3
    bad = [
        episode(),
        episode(say("mars")),
        episode(say("<answer></answer>")),
        episode(say("<answer> \n</answer>")),
        episode(say("<answer>a</answer><answer>mars</answer>")),
        episode(say("<answer>a<answer>mars</answer>")),
        episode(say("<answer>mars</answer></answer>")),
        episode(say("</answer>mars<answer>")),
        episode(say("<answer>mars</answer>", ToolCall("search", {"query": "x"}))),
        episode(say("", ToolCall("", error="torn")), shown("?"), RIGHT),
        episode(RIGHT, search()),
    ]
    assert [text.format_ok(TASK, e) for e in bad] == [0.0] * len(bad)


@pytest.mark.parametrize(
    ("messages", "paid"),
    [
        ((RIGHT,), 0.0),  # never searched
        ((search("a b"), HIT, RIGHT), 1.0),
        (
            (search("x"), HIT, search("y"), MISS, search("z"), MISS, RIGHT),
            1.0,
        ),  # no more than a hit
        ((search("x"), MISS, RIGHT), 1 / 3),
        ((search("x"), MISS, search("y"), MISS, RIGHT), 2 / 3),
        ((search("x"), MISS, search("y"), HIT, RIGHT), 1.0),
        ((search("x"), MISS, search("y"), MISS, search("z"), MISS, RIGHT), 1.0),
        ((*[m for q in "uvwxyz" for m in (search(q), MISS)], RIGHT), 1.0),  # bounded
        ((search("x"), MISS, search("X!"), MISS, search("the x"), MISS, RIGHT), 1 / 3),  # the same
        (
            (say("", *(ToolCall("search", {"query": q}) for q in "xyz")), MISS, MISS, MISS, RIGHT),
            1 / 3,
        ),
        ((search("x", name="echo"), shown("Mars", name="echo"), RIGHT), 0.0),  # not a search
        ((say("", ToolCall("search", error="torn")), MISS, RIGHT), 0.0),
        ((say("", ToolCall("search", {"q": "x"})), MISS, RIGHT), 0.0),
        ((search("x"), HIT, WRONG), 0.0),  # never without being right
        ((search("x"), HIT, say("<answer></answer>")), 0.0),
        ((search("x"), HIT, search("y")), 0.0),
    ],
)
def test_retry_pays_for_searching_again_after_a_miss(messages, paid):
    assert text.retry(TASK, episode(*messages), tool="search") == pytest.approx(paid)


def test_holding_an_answer_is_a_matter_of_whole_words():
    assert text.contains_answer("on the planet mars.", ["Planet Mars"])
    assert not text.contains_answer("marshmallow", ["Mars"])
    assert not text.contains_answer("anything", ["the", ""])


def test_recorded_scores_are_reproduced(shared):
    rows = json.loads(shared("traces/searchr1_bamboogle.json").read_text())
    assert len(rows) == 125
    for row in rows:
        output, answers = row["output"], row["golden_answers"]
        prediction = text.extract_answer(output["final_response"])
        assert prediction == output["pred"]
        assert text.exact_match(prediction, answers) == output["metric_score"]["em"]
        assert text.f1(prediction, answers) == pytest.approx(
            output["metric_score"]["f1"], abs=1e-12
        )
        task = Task(row["id"], row["question"], tuple(answers))
        trajectory = episode(say(output["final_response"]), task=task)
        assert text.answer_em(task, trajectory) == output["metric_score"]["em"]
        assert text.answer_f1(task, trajectory) == text.f1(prediction, answers)
