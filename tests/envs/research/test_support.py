"""Whether evidence supports a claim, and the measures of a report's citations."""

import asyncio

import pytest

from jaxdeep.envs.research import support
from jaxdeep.envs.research.report import Report
from jaxdeep.envs.research.sources import Shelf, source
from jaxdeep.envs.research.support import Evidence, lenient, strict

CASES = [  # claim, sentence, title, strict, lenient
    ("The capital of Cyprus is Nicosia.", "The capital of Cyprus is Nicosia.", "", 1, 1),
    ("The currency is the Euro", "The currency of Cyprus is the Euro.", "", 1, 1),
    ("the tower was finished", "The tower was finished in 1889 by Eiffel.", "", 1, 1),
    ("The capital of Cyprus is Nicosia", "The capital is Nicosia.", "Cyprus", 1, 1),
    ("It grew 5 %", "It grew 5% in 2020.", "", 1, 1),
    ("It has 1,000 lakes", "It has 1000 lakes.", "", 1, 1),
    ("France's capital is Berlin", "Germany's capital is Berlin.", "France", 0, 0),
    ("Nicosia is the capital of France", "Nicosia is the capital of Cyprus and Paris is the capital of "
     "France.", "", 0, 1),
    ("Bob beat Alice", "Alice beat Bob.", "", 0, 1),
    ("The dam is the largest in Peru", "The dam is the smallest in Peru.", "", 0, 0),
    ("The tower was finished by Eiffel in 1889", "The tower was finished in 1889 by Eiffel.", "", 0, 1),
    ("The tower of the old town was finished in 1889 and sold", "The tower of the old town was finished "
     "in 1889.", "", 0, 1),
    ("He was born in 1950", "He was not born in 1950.", "", 0, 0),
    ("He was not born in 1950", "He was born in 1950.", "", 0, 0),
    ("He didn't win the prize", "He did win the prize.", "", 0, 0),
    ("It fell 5 degrees", "It fell -5 degrees.", "", 0, 0),
    ("It has 3.5 million people", "It has 35 million people.", "", 0, 0),
    ("Marlow wrote the book", "Conrad wrote the book.", "", 0, 0),
    ("as shown", "The capital of Cyprus is Nicosia.", "", 0, 0),
    ("", "The capital of Cyprus is Nicosia.", "", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "sentence", "title", "is_strict", "is_lenient"), CASES)
def test_strict_and_lenient(claim, sentence, title, is_strict, is_lenient):
    evidence = [Evidence(sentence, (sentence,), title)]
    assert (strict(claim, evidence), lenient(claim, evidence)) == (is_strict, is_lenient)


def test_two_sentences_are_not_spliced():
    sentences = ("Nicosia is the capital of Cyprus.", "Paris is the capital of France.")
    both = [Evidence(" ".join(sentences), sentences)]
    assert strict("Nicosia is the capital of France.", both) == 0
    assert strict(" ".join(sentences), both) == 1
    assert strict("Nicosia is the capital of Cyprus. Rome is the capital of Italy.", both) == 0


def test_a_place_inside_a_sentence_does_not_hide_its_negation():
    shelf = Shelf([source("S1", "He did not win the prize of the town.")])
    report = Report(
        "", '<cite id="S1.1" quote="win the prize of">He did win the prize</cite>', shelf
    )
    assert report.counts == {"exact": 1} and report.measures()["citation_recall"] == 0


def measured(answer, *texts, judge=strict):
    shelf = Shelf(source(f"S{n}", text) for n, text in enumerate(texts, start=1))
    return Report("", answer, shelf).measures(judge)


A, B = "The river Po rises in Italy.", "The river Rhine rises in Switzerland."


def test_measures_by_hand():
    answer = f'<cite id="S1.1">{A}</cite> <cite id="S1.1">{B}</cite> <cite id="S9">Elbe floods happen.</cite>'
    found = measured(answer, A, B)
    assert found["id_validity"] == pytest.approx(2 / 3) and found["span_exact"] == pytest.approx(
        2 / 3
    )
    assert found["citation_precision"] == pytest.approx(1 / 3)
    assert found["citation_recall"] == pytest.approx(1 / 3)
    assert found["citation_f1"] == pytest.approx(1 / 3)
    assert found["coverage"] == pytest.approx(6 / 15)
    assert found["concision"] == 1


def test_a_reference_that_adds_nothing_lowers_precision():
    assert measured(f'<cite id="S1.1,S2.1">{A}</cite>', A, B)["citation_precision"] == 0.5
    both = f"{A} {B}"
    assert measured(f'<cite id="S1.1,S2.1">{both}</cite>', A, B)["citation_precision"] == 1


def test_a_long_span_is_not_concise():
    long = " ".join(["word"] * 79) + " end."
    assert measured('<cite id="S1.1">word end</cite>', long)["concision"] == 0.5


def test_one_cited_word_does_not_cover_its_sentence():
    found = measured(
        'The moon of the king is made of cheese and the river is the <cite id="S1.1">Po</cite>.', A
    )
    assert found["citation_recall"] == 0


def test_nothing_cited_and_nothing_said():
    assert set(measured("No citation is here at all.", A).values()) == {0.0}
    assert set(measured("", A).values()) == {0.0}


def test_a_judge_is_asked_once_for_each_case():
    answer = f'<cite id="S1.1,S2.1">Two rivers begin in the Alps.</cite> <cite id="S1.1">{A}</cite>'
    report = Report("", answer, Shelf([source("S1", A), source("S2", B)]))
    asked = []

    async def judge(claim, text):
        asked.append((claim, text))
        return 1.0 if claim == A else 0.5 if "\n" in text else 0.0

    known = asyncio.run(support.verdicts(judge, report.cases))
    found = report.measures(known)
    assert len(asked) == len(set(asked)) == 4
    assert found["citation_precision"] == 1 and found["citation_recall"] == 0.5
