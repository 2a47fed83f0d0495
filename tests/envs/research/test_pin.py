"""Quotations against sources: every status, and a suite of mutations."""

import collections
import json
import os
import pathlib
import random

import pytest
from envs.research import mutations, world

from jaxdeep.envs.research.cite import reference
from jaxdeep.envs.research.pin import Status, pin
from jaxdeep.envs.research.sources import Shelf, Source, source

DATA = pathlib.Path(os.environ.get("JAXDEEP_TEST_DATA", "../shared/data"))
CHANGES = (*mutations.ALTERED, *mutations.BENIGN)


@pytest.fixture(scope="module")
def shelf():
    first = (
        "The currency of Cyprus is the Euro. It was not adopted in 1,312 days of 2008. The non-profit "
        "organisation reported sixteen important results. It fell to -5 degrees there by 3.5 % a year. "
        "The currency of Cyprus is the Euro. The king's crown was gold."
    )
    second = "Nicosia is the capital of Cyprus. Paris is the capital of France."
    late = source("S3", "This was shown after the answer had been given.", order=9)
    return Shelf(
        [source("S1", first, order=1), source("S2", second, order=2), late, Source("S4", "", ())]
    )


STATUSES = [
    ("S1.1", "", "exact", "The currency of Cyprus is the Euro."),
    ("S1.2-3", "", "exact", None),
    ("s2.1", "", "exact", "Nicosia is the capital of Cyprus."),
    ("S2", "", "exact", None),
    ("S1.1", "currency of Cyprus", "exact", "currency of Cyprus"),
    ("S1.2", "It was not adopted in 1,312 days of 2008", "exact", None),
    ("S1.1", "“currency  of *Cyprus*”", "normalised", "currency of Cyprus"),
    ("S1", "currency of Cyprus", "ambiguous", "currency of Cyprus"),
    ("S1.3", "organisation reported sixteen imporant results", "repaired", None),
    ("S1.3", "organisation reported the sixteen improtant results", "repaired", None),
    ("S1.3", "organisation reported sixteen important result", "altered", None),
    ("S1.3", "organisation reported sixten important results", "altered", None),
    ("S1.2", "It was adopted in 1,312 days of 2008", "altered", None),
    ("S1.1", "The currency of Cyprus is Euro the", "altered", None),
    ("S1.5", "The currency of Cyprus is Euro", "repaired", "The currency of Cyprus is the Euro"),
    ("S1.2", "It was not adopted in 1,313 days of 2008", "altered", None),
    ("S1.2", "It was not adopted in 312 days of 2008", "altered", None),
    ("S1.2", "312 days of 2008", "altered", None),
    ("S1.3", "profit organisation reported sixteen", "altered", None),
    ("S1.4", "5 degrees there by", "altered", None),
    ("S1.4", "5 % a year", "altered", None),
    ("S1.4", "-5 degrees there by 3.5", "altered", None),
    ("S1.6", "s crown was gold", "altered", None),
    ("S1.2", "currency of Cyprus is", "wrong_sentence", None),
    ("S1", "Nicosia is the capital", "misattributed", None),
    ("S1", "Berlin has many fine parks and bears", "fabricated", None),
    ("S1", "Euro", "too_short", None),
    ("S9", "", "unknown_source", None),
    ("", "", "unknown_source", None),
    ("S1.7", "", "out_of_range", None),
    ("S1.0", "", "out_of_range", None),
    ("S1.3-2", "", "out_of_range", None),
    ("S1.1-999999999", "", "out_of_range", None),
    ("S3.1", "", "not_yet_shown", None),
    ("S3", "", "not_yet_shown", None),
    ("S4", "", "no_text", None),
]


@pytest.mark.parametrize(("handle", "quote", "status", "text"), STATUSES)
def test_statuses(shelf, handle, quote, status, text):
    found = pin(reference(handle), quote, 5, shelf)
    assert found.status == status
    place = shelf.get(found.source).text[found.start : found.end] if found.status.pinned else ""
    assert bool(place) == found.status.pinned
    assert text is None or place == text


def test_every_status_has_a_case():
    assert {status for *_, status, _ in STATUSES} == {*Status} - {Status.CHANGED}


def test_notes_say_where_it_is_or_what_was_meant(shelf):
    assert "S2" in pin(reference("S1"), "Nicosia is the capital", 5, shelf).note
    assert "sentence 1" in pin(reference("S1.2"), "currency of Cyprus is", 5, shelf).note
    assert "1 to 6" in pin(reference("S1.9"), "", 5, shelf).note
    assert "77" in pin(reference("PMID:77"), "", 5, Shelf([source("77", "A text.")])).note
    assert pin(reference("S1"), "", 5, Shelf()).note == "no source was shown"


def mutated(shelf, rng, sentences):
    """(mutation, status) for each change to each of some sentences."""
    for each in list(shelf):
        for sentence in each.sentences[:sentences]:
            quote = each.text[sentence.start : sentence.end]
            if len(quote.split()) < 6:
                continue
            for change in CHANGES:
                said = change(quote, rng)
                if said and said != quote:
                    handle = reference(f"{each.id}.{sentence.number}")
                    yield change, pin(handle, said, 1, shelf).status, (quote, said)


def judge(found):
    """The bounds of the suite: nothing altered is exact or normalised, at most 1 % of it repaired,
    at least 99.5 % of harmless changes have a place."""
    altered = collections.Counter(s for m, s, _ in found if m in mutations.ALTERED)
    benign = collections.Counter(s for m, s, _ in found if m in mutations.BENIGN)
    wrong = [case for m, s, case in found if m in mutations.ALTERED and s.pinned]
    assert altered.total() >= 1000 and benign.total() >= 1000
    assert altered[Status.EXACT] == altered[Status.NORMALISED] == altered[Status.AMBIGUOUS] == 0, (
        wrong
    )
    assert altered[Status.REPAIRED] <= 0.01 * altered.total(), wrong
    pinned = sum(count for status, count in benign.items() if status.pinned)
    assert pinned >= 0.995 * benign.total()


def test_mutations():
    rng = random.Random(5)
    found = list(mutated(world.prose(rng, 60), rng, 4))
    judge(found)
    assert {m for m, *_ in found} == set(CHANGES)


def test_mutations_of_real_passages():
    path = DATA / "musique" / "corpus.json"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rows = json.loads(path.read_text())
    rng = random.Random(1)
    rows = rng.sample(list(rows.values()) if isinstance(rows, dict) else rows, 250)
    judge(list(mutated(Shelf(source(f"S{n}", row["text"]) for n, row in enumerate(rows)), rng, 1)))


def test_wrong_sources_are_named_and_unseen_texts_are_fabricated():
    rng = random.Random(2)
    shelf, unseen = world.prose(rng, 40), world.prose(rng, 40)
    everything = "\n".join(s.text for s in shelf)
    for n, each in enumerate(list(shelf)):
        other = list(shelf)[(n + 7) % 40]
        quote = other.text[slice(*other.sentences[1][1:3])]
        if quote not in each.text and everything.count(quote) == 1:
            found = pin(reference(each.id), quote, 1, shelf)
            assert found.status is Status.MISATTRIBUTED and other.id in found.note
    for each, strange in zip(shelf, unseen, strict=True):
        quote = strange.text[slice(*strange.sentences[0][1:3])]
        assert not pin(reference(each.id), quote, 1, shelf).status.pinned


def test_a_page_of_many_megabytes_takes_linear_time():
    rng = random.Random(3)
    text = " ".join(s.text for s in world.prose(rng, 50)) * 200  # 5 MB
    quote = "The needle of this text stands here, at its very end, once."
    shelf = Shelf([source("S1", f"{text} {quote}")])
    assert pin(reference("S1"), quote, 1, shelf).status is Status.EXACT
    assert pin(reference("S1"), quote.upper(), 1, shelf).status is Status.NORMALISED
    assert pin(reference("S1"), quote.replace("once", "twice"), 1, shelf).status is Status.ALTERED
    assert pin(reference("S1"), "Nothing at all like it was ever printed", 1, shelf).status in (
        Status.FABRICATED,
        Status.ALTERED,
    )
