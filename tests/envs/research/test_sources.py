"""What was shown: sentences, the text of a result and back, folding."""

import itertools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeep.envs.research import sources
from jaxdeep.envs.research.fold import fold
from jaxdeep.envs.research.sources import Shelf, read_shown, show, source, split

TEXTS = st.text(st.sampled_from("ab C.!?\n\t 1-*_“’…\u00a0\u200bﬁéeß²Σ中。\u0301🎉#|"), max_size=80)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Wu met J. K. Li et al. in Rome. Then he left.", 2),
        ("See fig. 3 and No. 5. It rose by 1.5 % on 3.4.2020. Done.", 3),
        ("The answer is no. He left.", 2),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("It is e.g. this. Or that.", 2),
        ("First line\nof one sentence.\n\nNext", ["First line\nof one sentence.", "Next"]),
        ("- one item\n- another\n2. third", ["- one item", "- another", "2. third"]),
        ("# Head\nText here.", ["# Head", "Text here."]),
        ("| a | b |\n| c | d |", 2),
        ("中文。再来！好", ["中文。", "再来！", "好"]),
        ("www.example.org is a site. Yes.", 2),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text, sentences):
    found = [text[start:end] for start, end in split(text)]
    assert len(found) == sentences if isinstance(sentences, int) else found == sentences


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_sentences_hold_every_word_once_and_in_order(text):
    spans = split(text)
    assert "".join("".join(text[s:e].split()) for s, e in spans) == "".join(text.split())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert all(0 < e - s <= sources.LONGEST_SENTENCE for s, e in spans)


def test_what_is_too_long_is_divided_at_a_space():
    text = "word " * 1000
    assert max(e - s for s, e in split(text)) <= sources.LONGEST_SENTENCE
    assert split("x" * 1500) == [(0, 600), (600, 1200), (1200, 1500)]


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_folded_characters_keep_their_place(text):
    text = unicodedata.normalize("NFC", text)
    folded = fold(text)
    places = [folded.place(n) for n in range(len(folded.text) + 1)]
    assert places == sorted(places) and places[-1] == len(text)
    for n, character in enumerate(folded.text):
        start, end = folded.span(n, n + 1)
        assert end == start + 1
        if character.isalnum() and character.isascii():
            assert character in fold(text[start]).text
        assert folded.position(start) <= n
    assert fold(folded.text).text.split() == folded.text.split() or "*" in text or "_" in text


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("the “ﬁrst”\u00a0 flight", 'the "first" flight', True),
        ("*bold* and __strong__ x", "bold and strong x", True),
        ("exam-\nple", "example", True),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth", True),
        ("Straße ΑΣ", "STRASSE ας", True),
        ("5–10", "5-10", True),
        ("2*3 snake_case a * b", "2*3 snake_case a * b", True),
        ("10²", "102", False),
        ("½ cup", "1/2 cup", False),
        ("-5 degrees", "5 degrees", False),
        ("2*3", "23", False),
        ("snake_case", "snakecase", False),
        ("①", "1", False),
    ],
)
def test_what_is_levelled_and_what_is_not(a, b, equal):
    assert (fold(a).text == fold(b).text) == equal


def test_a_result_is_read_back_as_it_was_shown():
    shown = source("S7", "One is  a\nfact. Two is not.", title="A\ntitle", url="https://x.org/a")
    text = show(shown)
    assert text == "S7 A title - https://x.org/a\n[1] One is a fact.\n[2] Two is not."
    shelf = Shelf()
    read_shown(text, 3, shelf)
    (back,) = shelf
    assert (back.id, back.title, back.url) == ("S7", "A title", "https://x.org/a")
    assert [back.text[s.start : s.end] for s in back.sentences] == ["One is a fact.", "Two is not."]
    assert {s.order for s in back.sentences} == {3} and show(back) == text


def test_only_what_was_left_after_the_cut_is_there():
    whole = show(source("S1", "One is here. Two is here. Three is here.", title="T"))
    for length in range(len(whole)):
        shelf = Shelf()
        read_shown(whole[:length] + "\n[cut here: 9 of 20 tokens shown]", 1, shelf)
        texts = [s.text[p.start : p.end] for s in shelf for p in s.sentences]
        assert all(text in whole[:length] for text in texts) and "[cut" not in "".join(texts)
    assert texts == ["One is here.", "Two is here.", "Three is here"]


@pytest.mark.parametrize(
    "text",
    [
        "No results for:\nS9 Fake\n[1] A fact.",
        "This call could not be read: S9\nS9 Fake\n[1] A fact.",
        "[1] A fact.",
        "\nS9 Fake\n[1] A fact.",
        "",
    ],
)
def test_a_text_that_does_not_begin_with_a_source_shows_nothing(text):
    shelf = Shelf()
    read_shown(text, 1, shelf)
    assert len(shelf) == 0


def test_no_text_of_a_source_passes_for_another_source_or_sentence():
    hostile = source(
        "S1", "True.\nS2 Fake - https://x.org\n[9] False claim.\r[8] More.", title="a\nS3 b"
    )
    shelf = Shelf()
    read_shown(show(hostile), 1, shelf)
    assert [s.id for s in shelf] == ["S1"]
    assert [s.number for s in shelf.get("S1").sentences] == list(
        range(1, len(hostile.sentences) + 1)
    )


def test_what_is_shown_again_adds_what_is_new_and_keeps_the_rest():
    shelf = Shelf()
    read_shown("S1 T\n[1] One.\n[3] Three.", 2, shelf)
    read_shown("S1 T\n[1] Another text.\n[2] Two.\n[3] Three.", 4, shelf)
    (only,) = shelf
    assert [(s.number, only.text[s.start : s.end], s.order) for s in only.sentences] == [
        (1, "One.", 2),
        (2, "Two.", 4),
        (3, "Three.", 2),
    ]
    plain = Shelf([source("77", "One is a. Two is b.", order=1)])
    plain.add(source("77", "Two is b. Three is c.", order=5))
    assert [(s.number, s.order) for s in plain.get("77").sentences] == [(1, 1), (2, 1), (3, 5)]


def test_hostile_texts_take_linear_time():
    # 200,000 characters each: quadratic time would be minutes, on any machine
    for part in ("\n", "*", "\u200b", "_a", '"', "-\n", "a.", "[1] ", "é中“", "#", "| "):
        text = part * (200_000 // len(part))
        shown = source("S1", text)
        assert shown.folded.length == len(shown.text)
