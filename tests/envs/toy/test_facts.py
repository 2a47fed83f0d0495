"""The small world: parts that share nothing, passages that say what they should, names made up."""

import collections
import functools
import hashlib
import os
import pathlib
import re
import string
import subprocess
import sys

import pytest

from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy import facts
from jaxdeep.errors import ConfigError
from jaxdeep.rewards.answers import contains_answer
from jaxdeep.setup.tasksets import EnvConfig
from jaxdeep.tools.bm25 import BM25

ROOT = pathlib.Path(__file__).resolve().parents[3]
SPLITS = ("train", "dev", "test")
WORLDS = range(40)


@functools.cache
def readers():
    """For each form of a passage, with any of its sentences left out, a pattern of its fields."""
    patterns = []
    for kind, spec in facts.KINDS.items():
        for sentences in spec.passages:
            for keep in range(1, 2 ** len(sentences)):
                kept = [s for i, s in enumerate(sentences) if keep >> i & 1]
                seen, pattern = set(), ""
                for text, field, *_ in string.Formatter().parse(" ".join(kept)):
                    pattern += re.escape(text)
                    if field:
                        pattern += f"(?P={field})" if field in seen else f"(?P<{field}>[^.]+)"
                        seen.add(field)
                if "name" in seen and len(seen) > 1:
                    patterns.append((kind, re.compile(pattern)))
    return patterns


def statements(text):
    """The (name, attribute, value) that a passage states, read off its text alone."""
    found = set()
    for _, pattern in readers():
        if match := pattern.fullmatch(text):
            said = match.groupdict()
            name = said.pop("name")
            found |= {(name, attribute, value) for attribute, value in said.items()}
    return found


def real(split="all"):
    return {(e.name, a, v) for e in facts.entities_of(split) for a, v in e.facts.items()}


def quizzes(split="all"):
    return [quiz for entity in facts.entities_of(split) for quiz in facts.quizzes(entity)]


# parts


def test_every_entity_is_in_exactly_one_part():
    names = {split: {e.name for e in facts.entities_of(split)} for split in SPLITS}
    everything = [e.name for e in facts.entities_of("all")]
    assert len(everything) == len(set(everything)) == sum(map(len, names.values())) == 404
    assert set.union(*names.values()) == set(everything)
    for split, share in zip(SPLITS, (0.45, 0.10, 0.45), strict=True):
        assert abs(len(names[split]) / len(everything) - share) < 0.05
        assert {e.kind for e in facts.entities_of(split)} == set(facts.KINDS)


def test_a_part_keeps_its_tasks_and_passages_to_itself():
    for of in (
        lambda s: [task.id for task in facts.tasks(facts.entities_of(s))],
        lambda s: [task.question for task in facts.tasks(facts.entities_of(s))],
        lambda s: [passage.id for passage in facts.passages(facts.entities_of(s))],
        lambda s: [passage.text for passage in facts.passages(facts.entities_of(s))],
    ):
        parts = [of(split) for split in SPLITS]
        everything = [x for part in parts for x in part]
        assert len(set(everything)) == len(everything)
        assert sorted(everything) == sorted(of("all"))


def test_no_test_question_can_be_answered_from_the_passages_to_train_on():
    passages = facts.passages(facts.entities_of("train"))
    stated = set().union(*(statements(passage.text) for passage in passages))
    test = {e.name for e in facts.entities_of("test")}
    assert stated == real("train")
    assert {name for name, _, _ in stated} | {p.title for p in passages} <= {
        e.name for e in facts.entities_of("train")
    }
    assert not test & {name for name, _, _ in stated}
    # nor does a description in a two-hop question fit an entity to train on
    said = {(attribute, value) for _, attribute, value in stated}
    bridges = {(q.bridge, q.entity.facts[q.bridge]) for q in quizzes("test") if q.bridge}
    assert len(bridges) > 100 and not bridges & said


@pytest.mark.parametrize("name", ["bad", "", "Test", "train,test"])
def test_a_part_that_is_not_there_is_refused(name):
    for key in ("questions", "corpus"):
        with pytest.raises(
            ConfigError, match=f"env.{key} is '{name}', none of 'train', 'dev', 'test'"
        ):
            EnvConfig.build({"taskset": "facts", key: name})


# passages and questions


def test_passages_state_what_they_say_they_state():
    for entity in facts.entities_of("all"):
        texts = facts.texts(entity)
        for text in texts:
            assert text.entity == entity.name and contains_answer(text.text, [entity.name])
            assert "{" not in text.text and "}" not in text.text
            assert statements(text.text) == {(entity.name, a, entity.facts[a]) for a in text.states}
            assert all(contains_answer(text.text, [entity.facts[a]]) for a in text.states)
        # every fact in exactly one passage
        assert sorted(a for text in texts for a in text.states) == sorted(entity.facts)
        for passage, text in zip(facts.passages([entity]), texts, strict=True):
            assert (passage.title, passage.text) == (entity.name, text.text)
            assert (passage.start, passage.end) == (0, len(text.text))


def test_every_answer_stands_in_a_passage_of_its_entity_that_states_it():
    for quiz in quizzes():
        stating = [t for t in facts.texts(quiz.entity) if quiz.attribute in t.states]
        assert quiz.answer == quiz.entity.facts[quiz.attribute]
        assert any(contains_answer(text.text, [quiz.answer]) for text in stating), quiz.id


def test_one_hop_names_the_entity_and_two_hops_describe_it_from_another_passage():
    hops = collections.Counter()
    for quiz in quizzes():
        hops[quiz.hops] += 1
        if quiz.hops == 1:
            assert quiz.entity.name in quiz.question
            continue
        known = quiz.entity.facts[quiz.bridge]
        assert known in quiz.question
        assert quiz.entity.name not in quiz.question.replace(known, "")
        for text in facts.texts(quiz.entity):
            assert not {quiz.bridge, quiz.attribute} <= text.states, quiz.id
        assert not contains_answer(quiz.question, [quiz.answer])
    assert hops[2] > 0.3 * hops[1]


def test_a_question_has_one_answer():
    for found in (
        quizzes(),
        *([q for e in facts.made_up(s) for q in facts.quizzes(e)] for s in WORLDS),
    ):
        assert (
            len({quiz.question for quiz in found}) == len({quiz.id for quiz in found}) == len(found)
        )


def test_every_attribute_is_asked_about_and_every_entity():
    asked = {(quiz.entity.name, quiz.attribute) for quiz in quizzes() if quiz.hops == 1}
    assert asked == {(name, attribute) for name, attribute, _ in real()}


def test_tasks_are_the_questions_in_an_order_that_mixes_them():
    found = facts.tasks(facts.entities_of("test"))
    by_id = {quiz.id: quiz for quiz in quizzes("test")}
    assert len(found) == len(by_id) == 625
    for task in found:
        quiz = by_id[task.id]
        assert (task.question, task.answers) == (quiz.question, (quiz.answer,))
        assert task.meta == {"hops": quiz.hops, "attribute": f"{quiz.entity.kind} {quiz.attribute}"}
    for part in (found[:160], found[-160:]):  # any stretch is a fair sample
        hops = sum(task.meta["hops"] == 2 for task in part) / len(part)
        assert abs(hops - 155 / 625) < 0.1
        assert len({task.meta["attribute"].split()[0] for task in part}) == 4


# searching


@functools.cache
def engine():
    states = {
        passage.id: text.states
        for entity in facts.entities_of("all")
        for passage, text in zip(facts.passages([entity]), facts.texts(entity), strict=True)
    }
    return BM25(facts.passages(facts.entities_of("all")), k1=facts.K1), states


def found_by(k, **how):
    """The share of test questions whose every hop a search finds, as (kind, hops) -> (found,
    all)."""
    index, states = engine()
    out = collections.defaultdict(lambda: [0, 0])
    for quiz in quizzes("test"):
        found = True
        for hop in range(quiz.hops):
            attribute = quiz.bridge if quiz.bridge and hop == 0 else quiz.attribute
            hits = index.search(facts.query(quiz, hop, **how), k)
            found &= any(
                hit.title == quiz.entity.name and attribute in states[hit.id] for hit, _ in hits
            )
        out[quiz.entity.kind, quiz.hops][0] += found
        out[quiz.entity.kind, quiz.hops][1] += 1
    return dict(out)


def share(counts):
    return sum(n for n, _ in counts.values()) / sum(n for _, n in counts.values())


def test_a_careful_searcher_who_reads_two_results_finds_everything():
    counts = found_by(2)
    assert share(counts) >= 0.97, counts


def test_a_careful_searcher_who_reads_one_result_finds_everything():
    counts = found_by(1)
    assert share(counts) >= 0.97, counts


def test_careless_queries_find_less():
    careful, name, word = found_by(1), found_by(1, word=False), found_by(1, name=False)
    assert share(word) < 0.1 < share(name) < share(careful)


def test_queries_hold_what_is_known_at_their_hop():
    for quiz in quizzes("test"):
        first, last = facts.query(quiz, 0), facts.query(quiz, quiz.hops - 1)
        assert last.startswith(f"{quiz.entity.name} ")
        if quiz.bridge:
            assert first.startswith(f"{quiz.entity.facts[quiz.bridge]} ")
            assert quiz.entity.name not in first.replace(quiz.entity.facts[quiz.bridge], "")
        for hop in range(quiz.hops):
            name, word = facts.query(quiz, hop, word=False), facts.query(quiz, hop, name=False)
            assert facts.query(quiz, hop) == f"{name} {word}"


# made-up worlds


def test_no_made_up_fact_is_real():
    known, drawn = real(), 0
    for seed in WORLDS:
        for entity in facts.made_up(seed):
            for attribute, value in entity.facts.items():
                assert (entity.name, attribute, value) not in known, seed
                drawn += 1
    assert drawn > 10_000


def test_no_made_up_answer_to_a_real_question_is_right():
    answers = {quiz.question: quiz.answer for quiz in quizzes()}
    for seed in WORLDS:
        for entity in facts.made_up(seed):
            for quiz in facts.quizzes(entity):
                assert answers.get(quiz.question) != quiz.answer, (seed, quiz.question)


def test_made_up_entities_are_told_apart_and_named_by_real_words():
    words = {word for name, _, value in real() for word in f"{name} {value}".split()}
    whole = facts._pools()["names"]
    mixed = partly = entities = 0
    for seed in WORLDS:
        world = facts.made_up(seed, 90)
        assert len({entity.name for entity in world}) == len(world) == 90
        assert {word for entity in world for word in entity.name.split()} <= words
        mixed += sum(entity.name not in whole for entity in world)
        for entity in world:
            asked = set(facts.KINDS[entity.kind].questions)
            assert set() < set(entity.facts) <= asked
            assert sorted(a for t in facts.texts(entity) for a in t.states) == sorted(entity.facts)
            partly += set(entity.facts) != asked
        entities += len(world)
        for attribute in ("capital", "nickname", "symbol"):
            values = [e.facts[attribute] for e in world if attribute in e.facts]
            assert len(set(values)) == len(values) > 0
    assert 0.1 < mixed / entities < 0.3  # longer names than most, to copy
    assert 0.2 < partly / entities < 0.6  # as of the real entities, not everything is known


def test_a_world_follows_from_its_seed():
    assert facts.made_up(3) == facts.made_up(3)
    names = [tuple(entity.name for entity in facts.made_up(seed)) for seed in range(-5, 5)]
    assert len(set(names)) == 10


def test_nothing_depends_on_how_a_process_hashes():
    code = (
        "import hashlib; from jaxdeep.envs.toy import facts; every = facts.entities_of('all'); "
        "seen = [facts.tasks(every), facts.passages(every)]; "
        "seen += [facts.made_up(3), facts.tokenizer(600)]; "
        "print(hashlib.sha256(repr(seen).encode()).hexdigest())"
    )

    def digest(seed):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-c", code]
        return subprocess.run(run, env=env, check=True, capture_output=True, text=True).stdout

    assert digest("1") == digest("2") != hashlib.sha256(b"").hexdigest()


# the tokenizer that ships


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(facts.ASSETS / "tiny")


def test_the_tokenizer_that_ships_is_the_one_this_makes(tokenizer):
    assert tokenizer.text == facts.tokenizer(3072)
    assert tokenizer.size == 3072


def test_the_tokenizer_gives_every_text_back(tokenizer):
    texts = [passage.text for passage in facts.passages(facts.entities_of("all"))]
    texts += [quiz.question for quiz in quizzes()]
    texts += [facts.query(quiz, hop) for quiz in quizzes() for hop in range(quiz.hops)]
    assert [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text] == []


def test_most_names_are_one_token_and_the_same_one_everywhere(tokenizer):
    names = [entity.name for entity in facts.entities_of("all")]
    single = [name for name in names if len(tokenizer.encode(name)) == 1]
    assert len(single) >= 0.85 * len(names)
    words = {word for name in names for word in name.split()}
    assert sum(len(tokenizer.encode(word)) == 1 for word in words) >= 0.97 * len(words)
    for name in single:
        (id,) = tokenizer.encode(name)
        for text in (f"Where is {name}?", f"{name} capital", f'{{"query": "{name} capital"}}'):
            assert id in tokenizer.encode(text), text
