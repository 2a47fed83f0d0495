"""What the tiny base learns from: made-up worlds only, no call before the demonstrations, and those
as the real environment would play them."""

import asyncio
import functools
import itertools
import os
import pathlib
import re
import string
import subprocess
import sys

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.chat.qwen3 import Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs import qa
from jaxdeep.envs.toy import facts
from jaxdeep.envs.toy.practice import BLOCK, Demos, Reading
from jaxdeep.rewards import answers as text
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.search import show
from jaxdeep.types import Stop, Task

ROOT = pathlib.Path(__file__).resolve().parents[3]
SYSTEM = "Search first, then answer."
K = 1
ROWS = [number * 37 for number in range(300)]  # of 28 worlds
CALLS = (Mark.CALL, Mark.UNCALL, Mark.RESULT, Mark.UNRESULT)


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer.load(facts.ASSETS / "tiny"), "none", tools_in_prompt=False)


@pytest.fixture(scope="module")
def reading(chat):
    source = Reading(chat, 0)
    return [source[index] for index in ROWS]


@pytest.fixture(scope="module")
def demos(chat):
    source = Demos(chat, 0, k=K, system=SYSTEM)
    return [source[index] for index in ROWS]


@pytest.fixture
def worlds(monkeypatch):
    """The worlds that are made while a test runs, in order. Use a seed that no other test uses."""
    made, make = [], facts.made_up

    def note(*args):
        made.append((args, make(*args)))
        return made[-1][1]

    monkeypatch.setattr(facts, "made_up", note)
    return made


def ids(pieces):
    return [id for piece in pieces for id in piece.tokens]


def decode(chat, pieces):
    return chat.tokenizer.decode(ids(pieces))


def turns(chat, pieces):
    """(role, content) of a row, read off its text."""
    return re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", decode(chat, pieces), re.DOTALL)


def repeats(chat, pieces):
    """Whether a row is one of random tokens: the same twice, without roles."""
    (start, *first, end), said = pieces[0].tokens, pieces[-1].tokens
    marks = (chat.tokenizer.id(Mark.START), chat.tokenizer.id(Mark.END))
    return len(pieces) == 2 and (start, end) == marks and said == [*first, end]


def talks(chat, rows):
    """The rows that are conversations, as turns."""
    return [turns(chat, row) for row in rows if not repeats(chat, row)]


# both


def test_a_row_follows_from_seed_and_number_alone(chat):
    makers = (
        lambda seed: Reading(chat, seed),
        lambda seed: Demos(chat, seed, k=K, system=SYSTEM),
    )
    for make in makers:
        once, again, other = make(11), make(11), make(12)
        numbers = [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3]
        rows = {number: once[number] for number in numbers}
        for number in reversed(numbers):
            assert again[number] == rows[number] != other[number]
        assert len({tuple(ids(row)) for row in rows.values()}) == len(numbers)


def digest(source, seed):
    """Of 200 rows, made by a process that hashes texts its own way."""
    code = (
        "import hashlib; from jaxdeep.chat.qwen3 import Qwen3Chat; "
        "from jaxdeep.envs.toy import facts, practice; "
        "from jaxdeep.chat.tokenizer import Tokenizer; "
        "chat = Qwen3Chat(Tokenizer.load(facts.ASSETS / 'tiny'), 'none'); "
        f"source = {source}; rows = [source[number] for number in range(200)]; "
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code]
    return subprocess.run(run, env=env, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "source",
    [
        "practice.Reading(chat, 0)",
        "practice.Demos(chat, 0, k=1, system='Search.')",
    ],
)
def test_no_row_depends_on_how_a_process_hashes(source):
    assert digest(source, "1") == digest(source, "2")


def test_reading_and_demonstrations_share_no_world_with_each_other_or_other_seeds(chat, worlds):
    seen = []
    for seed in (7001, 7002):
        for source in (Reading(chat, seed), Demos(chat, seed, k=K, system=SYSTEM)):
            for block in range(3):
                worlds.clear()
                source[block * BLOCK], source[block * BLOCK + BLOCK - 1]
                found = {tuple(entity.name for entity in world) for _, world in worlds}
                assert len(found) == 1  # a block has one
                seen += found
    assert len(set(seen)) == len(seen) == 12


def test_what_is_learned_is_exactly_what_the_assistant_says(chat, reading, demos):
    for row in reading + demos:
        if repeats(chat, row):
            continue
        said = [content + Mark.END for role, content in turns(chat, row) if role == "assistant"]
        learned = [piece for piece in row if piece.author == "policy"]
        assert [chat.tokenizer.decode(piece.tokens) for piece in learned] == said != []
        assert all(piece.logps is None for piece in row)
        assert row[0].author == "world" and row[0].tokens


@functools.cache
def readers():
    """A pattern for each form of a passage, whichever of its sentences are left out."""
    forms = {
        " ".join(kept)
        for spec in facts.KINDS.values()
        for sentences in spec.passages
        for size in range(1, len(sentences) + 1)
        for kept in itertools.combinations(sentences, size)
        if "{name}" in kept[0]
    }
    patterns = []
    for form in sorted(forms):
        seen, pattern = set(), ""
        for said, field, *_ in string.Formatter().parse(form):
            pattern += re.escape(said)
            if field:
                pattern += f"(?P={field})" if field in seen else f"(?P<{field}>[^.\\n]+)"
                seen.add(field)
        patterns.append(re.compile(pattern))
    return patterns


def stated(said):
    """The (name, attribute, value) of all passages in a text."""
    found = set()
    for line in said.split("\n"):
        for pattern in readers():
            if match := pattern.fullmatch(line):
                told = match.groupdict()
                name = told.pop("name")
                found |= {(name, attribute, value) for attribute, value in told.items()}
    return found


@pytest.mark.parametrize("kind", ["reading", "demos"])
def test_no_real_fact_is_in_any_row(chat, request, kind):
    real = {(e.name, a, v) for e in facts.entities_of("all") for a, v in e.facts.items()}
    answers = {q.question: q.answer for e in facts.entities_of("all") for q in facts.quizzes(e)}
    told = set()
    for row in talks(chat, request.getfixturevalue(kind)):
        for _, content in row:
            told |= stated(content)
        question = row[1][1].split("\n")[-1]
        final = text.extract_answer(row[-1][1])
        assert final is None or answers.get(question) != final
    assert len(told) > 400 and not told & real


# reading


def test_reading_is_of_five_kinds_and_never_thinks(chat, reading):
    marks = {chat.tokenizer.id(mark) for mark in CALLS}
    thinks = {chat.tokenizer.id(mark) for mark in (Mark.THINK, Mark.UNTHINK)}
    kinds = []
    for row in reading:
        if repeats(chat, row):
            kinds.append("repeat")
            assert not {chat.tokenizer.id(Mark.START), chat.tokenizer.id(Mark.END)} & set(
                row[0].tokens[1:-1]
            )
            continue
        kinds.append(turns(chat, row)[0][1])
        assert not thinks & set(ids(row))
        assert bool(marks & set(ids(row))) == (kinds[-1] == "Call the desk.")
    shares = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    wanted = {"Desk.": 0.3, "Call the desk.": 0.3, "Read.": 0.2, "Keywords.": 0.1, "repeat": 0.1}
    assert shares == {kind: pytest.approx(share, abs=0.08) for kind, share in wanted.items()}


def test_an_answer_of_reading_stands_in_what_was_shown_or_is_unknown(chat, reading):
    unknown = answered = 0
    for row in talks(chat, reading):
        kind, final = row[0][1], text.extract_answer(row[-1][1])
        shown = "\n".join(content for role, content in row if role == "user")
        if kind == "Keywords.":
            assert final is None and len(row) == 3
        elif final == "Unknown":
            assert kind == "Read."
            unknown += 1
        else:
            assert any(value == final for _, _, value in stated(shown)), row
            answered += 1
    assert answered > 200 and unknown >= 3


def test_answers_of_reading_are_true_in_its_world(chat, worlds):
    source = Reading(chat, 7003)
    rows = talks(chat, [source[number] for number in range(BLOCK)])
    ((_, world),) = worlds
    quizzes = {quiz.question: quiz for entity in world for quiz in facts.quizzes(entity)}
    for row in rows:
        quiz = quizzes[row[1][1].split("\n")[-1]]
        told = stated("\n".join(content for role, content in row if role == "user"))
        assert told <= {(e.name, a, v) for e in world for a, v in e.facts.items()}
        needed = {(quiz.entity.name, a) for a in (quiz.bridge, quiz.attribute) if a}
        known = needed <= {(name, attribute) for name, attribute, _ in told}
        if row[0][1] == "Keywords.":
            assert row[-1] == ("assistant", facts.query(quiz, 0))
        else:
            assert text.extract_answer(row[-1][1]) == (quiz.answer if known else "Unknown")


# demonstrations


def test_a_demonstration_is_what_the_environment_would_play(chat, worlds):
    limits = Limits(
        max_turns=6, max_calls=6, turn_tokens=99, max_tokens=999, result_tokens=200, seconds=30.0
    )
    for k in (1, 2):
        source = Demos(chat, 7010 + k, k=k, system=SYSTEM)
        for number in range(40):
            row = source[number]
            engine = BM25(facts.passages(worlds[-1][1]), k1=facts.K1)
            said = [chat.parse(p.tokens) for p in row if p.author == "policy"]
            assert all(call.name == "search" and not call.error for m in said for call in m.calls)
            task = Task("demo", turns(chat, row)[1][1])
            env = qa.SearchTaskset([task], engine, k=k, system=SYSTEM).env(task)
            policy = ScriptedPolicy(chat, said)
            played = asyncio.run(loop.rollout(env, task, policy, chat, limits=limits, seed=0))
            assert played.stop is Stop.FINISHED and played.metrics["bad_calls"] == 0
            authors = [
                [(id, p.author) for p in ps for id in p.tokens] for ps in (played.pieces, row)
            ]
            assert authors[0] == authors[1]


def test_results_are_shown_as_the_engine_gives_them(chat, worlds):
    source = Demos(chat, 7020, k=2, system=SYSTEM)
    rows = [source[number] for number in range(60)]
    engine = BM25(facts.passages(worlds[-1][1]), k1=facts.K1)
    searches = 0
    for row in rows:
        queries = [
            call.arguments["query"]
            for piece in row
            if piece.author == "policy"
            for call in chat.parse(piece.tokens).calls
        ]
        shown = re.findall(
            r"<tool_response>\n(.*?)\n</tool_response>", decode(chat, row), re.DOTALL
        )
        assert shown == [show(engine.search(query, 2)) for query in queries] != []
        searches += len(queries)
    assert searches > 60


def test_a_demonstration_opens_as_the_environment_does(chat, demos):
    for row in demos:
        first = turns(chat, row)
        assert first[0] == ("system", SYSTEM) and first[1][0] == "user"
        assert first[-1][0] == "assistant" and text.extract_answer(first[-1][1])
        assert Mark.CALL in first[2][1]  # it never answers without a search


def test_the_demonstrator_gives_up_often_and_is_right_otherwise(chat, worlds):
    source = Demos(chat, 7030, k=K, system=SYSTEM)
    rows = talks(chat, [source[number] for number in range(BLOCK)])
    answers = {
        quiz.question: quiz for _, world in worlds for e in world for quiz in facts.quizzes(e)
    }
    unknown = two_hops = 0
    for row in rows:
        quiz, final = answers[row[1][1]], text.extract_answer(row[-1][1])
        if final == "Unknown":
            unknown += 1
            continue
        assert final == quiz.answer
        # and it has read so: the stating passage is among its results
        told = stated("\n".join(content for role, content in row if role == "user"))
        assert (quiz.entity.name, quiz.attribute, quiz.answer) in told
        two_hops += quiz.hops == 2
    assert 0.3 < unknown / len(rows) < 0.75
    assert two_hops > 0


def test_demonstrations_ask_with_less_than_they_know_and_sometimes_again(chat, demos):
    searches = [sum(Mark.CALL in content for _, content in turns(chat, row)) for row in demos]
    assert set(searches) <= {1, 2, 3, 4} and min(searches) == 1 and max(searches) > 2
    assert 0.2 < sum(n > 1 for n in searches) / len(searches) < 0.8


def test_the_tool_of_the_base_is_not_the_one_that_demonstrations_teach(chat):
    rows = [Reading(chat, 7001)[number] for number in range(300)]
    text = [chat.tokenizer.decode([t for p in row for t in p.tokens]) for row in rows]
    called = [t for t in text if t.startswith("<|im_start|>system\nCall the desk.")]
    plain = [t for t in text if t.startswith("<|im_start|>system\nDesk.")]
    assert 0.5 < len(called) / len(plain) < 2
    for said in called:
        assert said.count("<tool_call>") == said.count("<tool_response>") >= 1
        assert '{"name": "Desk", "arguments": {"Find": "' in said and "search" not in said
        assert "Find: " not in said and said.count("<answer>") == 1
