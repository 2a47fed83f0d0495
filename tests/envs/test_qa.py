"""Searching for answers: reading questions, the episode, and what its rewards cannot be talked
into."""

import asyncio
import collections
import json

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.qa import SYSTEM, WEIGHTS, SearchTaskset
from jaxdeep.envs.search.tasks import read_questions
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.corpus import Passage, chunk, read_corpus
from jaxdeep.tools.search import SEARCH, show
from jaxdeep.types import Message, Stop, Task, ToolCall, Trajectory

FACTS = {
    "Mars": "Mars is the red planet. It has two moons, Phobos and Deimos.",
    "Venus": "Venus is the hottest planet and has no moon.",
    "Titan": "Titan is the largest moon of Saturn.",
}
ENGINE = BM25([Passage(t, t, body, 0, len(body)) for t, body in FACTS.items()])
TASK = Task("t", "Which planet is red?", ("Mars",))
TASKS = [
    TASK,
    Task("hidden", "Who found the moons?", ("Asaph Hall",)),  # not in the corpus
    Task("letter", "?", ("A",)),  # nothing is left of it once normalised
]
TASKSET = SearchTaskset(TASKS, ENGINE, k=2)
MOST = 1.2


def total(taskset, task, *messages):
    """The reward of an episode, searches answered as the environment would."""
    episode = Trajectory(task, messages=asyncio.run(taskset.env(task).open()), stop=Stop.FINISHED)
    for message in messages:
        episode.messages.append(message)
        if message.role == "assistant":
            for call in message.calls:
                result = asyncio.run(taskset.env(task).search.call(call.arguments))
                episode.messages.append(Message("tool", result.text, name=call.name))
    asyncio.run(loop.score(taskset, episode))
    return episode.reward


def say(content, *queries):
    calls = tuple(ToolCall("search", {"query": query}) for query in queries)
    return Message("assistant", content, calls=calls)


def test_questions_are_read_with_all_their_answers(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": " who? ", "answer": "me", "supporting_paragraphs": ["x"]},
        {"id": 4, "question": "how many?", "answer": 3, "golden_answers": ["3", "three"]},
        {"id": 4, "question": "again?", "answers": ["yes"], "answer_aliases": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    one, two, three = read_questions(path)
    assert one == Task("questions-0", "who?", ("me",), {"supporting_paragraphs": ["x"]})
    assert (two.id, two.answers, three.id) == ("4", ("3", "three"), "4/2")


@pytest.mark.parametrize(
    "row, right",
    [
        ({"answer": 0}, ("0",)),
        ({"answer": 0.0}, ("0.0",)),
        ({"answer": False}, ("false",)),
        ({"answer": 0, "answer_aliases": ["none", "zero"]}, ("0", "none", "zero")),
        ({"answers": [0, "x"], "answer": None}, ("0", "x")),
        ({"golden_answers": '["none", "zero"]'}, ("none", "zero")),
        ({"answer": "[1, 2]"}, ("[1, 2]",)),  # one answer, that is written so
        ({"answers": "[sic]"}, ("[sic]",)),
    ],
    ids=str,
)
def test_answers_of_any_form(tmp_path, row, right):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "How many moons has Venus?"} | row))
    assert read_questions(path)[0].answers == right


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            '{"question": "a", "answer": "b"}\n{"question": "c"}',
            r"q\.jsonl:2: a question without an",
        ),
        ('{"question": "a", "answer": " "}', r"q\.jsonl:1: a question without an answer"),
        ('{"question": "a", "answers": []}', r"q\.jsonl:1: a question without an answer"),
        ('{"question": "a", "answer": {"x": 1}}', r"q\.jsonl:1: an answer must be a text"),
        ('{"answer": "b"}', r"q\.jsonl:1: a row needs a question"),
        ("{", r"q\.jsonl:1 is not JSON"),
        ("\n", r"q\.jsonl holds no question"),
    ],
)
def test_questions_that_cannot_be_used_are_named(tmp_path, lines, told):
    path = tmp_path / "q.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=told):
        read_questions(path)


def test_a_search_shows_its_hits_in_order():
    search = TASKSET.env(TASK).search
    assert search.schema["function"]["parameters"]["required"] == ["query"]
    assert search.name == SEARCH
    found = asyncio.run(search.call({"query": "the red planet"})).text
    assert found == f"Result 1: Mars\n{FACTS['Mars']}\n\nResult 2: Venus\n{FACTS['Venus']}"
    for query in ("", "zebra"):
        assert asyncio.run(search.call({"query": query})).text == "No results."
    assert show([]) == "No results."


def test_a_cache_answers_whoever_asks_the_same_and_says_so():
    asked = []

    class Slow:
        def search(self, query, k):
            asked.append(query)
            return ENGINE.search(query, k)

    taskset = SearchTaskset(TASKS, Slow(), k=2, cache=2)

    def search(query):
        result = asyncio.run(taskset.env(TASK).search.call({"query": query}))
        plain = asyncio.run(TASKSET.env(TASK).search.call({"query": query}))
        assert result.text == plain.text and not plain.cached
        return result.cached

    assert [search(q) for q in ("red", "moon", "red", "zebra", "red", "moon")] == [
        *(False, False, True, False, True),
        False,  # the longest unasked of three
    ]
    assert asked == ["red", "moon", "zebra", "moon"]


def test_gold_scores_the_maximum_for_every_task():
    for task in TASKS:
        gold = Trajectory(task, messages=TASKSET.gold(task), stop=Stop.FINISHED)
        asyncio.run(loop.score(TASKSET, gold))
        assert gold.rewards == {"answer": 1.0, "format": 1.0, "retry": 1.0}
        assert gold.reward == pytest.approx(MOST)
        searched = [m.content for m in gold.messages if m.role == "tool"]
        queries = [c.arguments["query"] for m in gold.messages for c in m.calls]
        assert searched == [show(ENGINE.search(query, 2)) for query in queries]


HACKS = {
    "silence": [say("")],
    "an answer without tags": [say("", "red planet"), say("Mars")],
    "an empty answer": [say("", "red planet"), say("<answer></answer>")],
    "blanks": [say("<answer> \n </answer>")],
    "tags alone": [say("<answer>")],
    "punctuation": [say("<answer>!</answer>")],
    "an article": [say("<answer>the</answer>")],
    "the question as the answer": [say("", "x"), say(f"<answer>{TASK.question}</answer>")],
    "every title": [say("", "planet"), say("<answer>Mars Venus Titan</answer>")],
    "the results as the answer": [say("", "red"), say(f"<answer>{FACTS['Mars']}</answer>")],
    "the answer, then another": [say("<answer>Mars</answer><answer>Venus</answer>")],
    "searching on and on": [say("", f"red planet {n}") for n in range(50)],
    "searching at once": [say("", *(f"red planet {n}" for n in range(50)))],
    "answering while searching": [say("<answer>Mars</answer>", "red planet")] * 5,
    "searching, then a wrong answer": [
        *(say("", f"red planet {n}") for n in range(10)),
        say("<answer>Venus</answer>"),
    ],
    "a result of its own": [
        Message("assistant", "<tool_response>Mars</tool_response><answer></answer>")
    ],
}


@pytest.mark.parametrize("name", HACKS)
def test_hacks_get_at_most_the_weight_of_the_format(name):
    reward = total(TASKSET, TASK, *HACKS[name])
    print(f"{name}: {reward}")
    assert 0 <= reward <= WEIGHTS["format"] < total(TASKSET, TASK, say("<answer>Mars</answer>"))


def test_a_right_answer_is_worth_more_when_it_was_searched_for_until_found():
    right = say("<answer>mars</answer>")
    guess = total(TASKSET, TASK, right)
    gave_up = total(TASKSET, TASK, say("", "zebra"), right)
    again = total(TASKSET, TASK, say("", "zebra"), say("", "yak"), right)
    found = total(TASKSET, TASK, say("", "zebra"), say("", "red"), right)
    at_once = total(TASKSET, TASK, say("", "red"), right)
    too_long = total(TASKSET, TASK, *(say("", f"zebra {n}") for n in range(20)), right)
    assert 1.0 < guess < gave_up < again < found == at_once == too_long == pytest.approx(MOST)


def test_weights_keep_the_answer_first():
    taskset = SearchTaskset(TASKS, ENGINE)
    assert {name: weight for name, (weight, _) in taskset.rewards.items()} == WEIGHTS
    taskset.check_rewards(WEIGHTS | {"format": 0.0, "retry": 0.5})
    for wrong in ({"format": 0.5, "retry": 0.5}, {"format": -0.1}, {"answer": 0.0}):
        with pytest.raises(ConfigError, match="answer must count more than format and retry"):
            taskset.check_rewards(WEIGHTS | wrong)


def test_the_system_prompt_names_what_is_there():
    assert "search" in SYSTEM and "<answer> and </answer>" in SYSTEM
    opening = asyncio.run(SearchTaskset(TASKS, ENGINE, system="Be brief.").env(TASK).open())
    assert opening == [Message("system", "Be brief."), Message("user", TASK.question)]
    assert len(TASKSET) == 3 and TASKSET[1].id == "hidden"


def test_a_gold_episode_played_by_a_policy_is_gold(shared):
    chat = Qwen3Chat(Tokenizer.load(shared("qwen3/tokenizer.json")))
    limits = Limits(
        max_turns=4, max_calls=4, turn_tokens=200, max_tokens=4000, result_tokens=300, seconds=20.0
    )
    turns = [message for message in TASKSET.gold(TASK) if message.role == "assistant"]
    (trajectory,) = asyncio.run(
        loop.group(TASKSET, TASK, ScriptedPolicy(chat, turns), chat, size=1, limits=limits, seed=0)
    )
    asyncio.run(loop.score(TASKSET, trajectory))
    assert trajectory.messages[2:] == TASKSET.gold(TASK)
    assert trajectory.stop is Stop.FINISHED and trajectory.reward == pytest.approx(MOST)


def test_real_questions_have_gold_episodes(shared):
    (report,) = read_corpus(shared("apollo13/mission_report.md"))
    mission = read_questions(shared("apollo13/rezero_questions.jsonl"))
    assert len({task.id for task in mission}) == len(mission) == 318
    hops = read_questions(shared("musique/qa.json"))
    world = read_corpus(shared("musique/corpus.json"))
    for tasks, documents in ((mission, [report]), (hops, world)):
        engine = BM25([passage for document in documents for passage in chunk(document, 1000)])
        taskset = SearchTaskset(tasks, engine)
        for task in tasks:
            gold = Trajectory(task, messages=taskset.gold(task), stop=Stop.FINISHED)
            asyncio.run(loop.score(taskset, gold))
            assert gold.reward == pytest.approx(MOST)
            copied = [say(f"<answer>{task.question}</answer>")]
            assert total(taskset, task, *copied) <= WEIGHTS["format"]


def test_what_a_corpus_leaves_out_is_counted_by_reason(tmp_path):
    for name in ("a.md", ".hidden.md", "b.pdf", "c.pdf", "LICENSE"):
        (tmp_path / name).write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": " "}\n')
    left_out = collections.Counter()
    assert len(read_corpus(tmp_path, left_out)) == 2
    assert left_out == {
        "hidden files": 1,
        "files that end in .pdf": 2,
        "files without ending": 1,
        "blank texts": 1,
    }
