"""Answers as levels: parsing and measures."""

import itertools
import math

import pytest
from envs.research import world
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeep.envs.research import explain
from jaxdeep.envs.research.explain import parse


def shape(node):
    text = node.text
    return (node.title, text[slice(*node.gist)].strip(), text[slice(*node.detail)].strip(),
            [shape(child) for child in node.children])  # fmt: skip


def test_levels():
    text = (
        "The **top**.\n\n## A *b* `c`\nGist a.\n\nDetail a.\n\n```\n# no heading\n```\n\n> # nor this\n\n"
        "### A1\nGist a1.\n\nB head\n------\n- item one\n- item two\n\nDetail b.\n"
    )
    assert shape(parse(text)) == (
        "",
        "The **top**.",
        "",
        [
            ("A b c", "Gist a.", "Detail a.\n\n```\n# no heading\n```\n\n> # nor this", [("A1", "Gist a1.", "", [])]),
            ("B head", "- item one\n- item two", "Detail b.", []),
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("", "", "", [])),
        ("Only text.\n\nMore.", ("", "Only text.\n\nMore.", "", [])),
        ("# Title\n\nTop.\n\n## A\nx", ("Title", "Top.", "", [("A", "x", "", [])])),
        ("# Title\n\n## A\nx", ("Title", "", "", [("A", "x", "", [])])),
        ("# A\nx\n\n# B\ny", ("", "", "", [("A", "x", "", []), ("B", "y", "", [])])),
        ("#### Deep\nx\n\n## A\ny", ("", "", "", [("Deep", "x", "", []), ("A", "y", "", [])])),
        ("t\n\n## A\n\n## B\nx", ("", "t", "", [("A", "", "", []), ("B", "x", "", [])])),
        ("# Alone", ("Alone", "", "", [])),
    ],
)
def test_any_report_is_a_tree(text, expected):
    assert shape(parse(text)) == expected


@given(st.lists(st.sampled_from(["# ", "## ", "a b. ", "\n", "\n\n", "```\n", "> ", "- ", "---\n", "1. ", "|a|\n"]),
                max_size=30).map("".join))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_parts_lie_in_order_and_lose_no_words(text):
    root = parse(text)
    spans = [span for node in root.walk() for span in (node.gist, node.detail)]
    assert all(0 <= s <= e <= len(text) for s, e in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    explain.measures(root, [(0, len(text))], ["a b"])


@pytest.mark.parametrize(
    ("top", "answer"),
    [
        ("The answer is the **Euro**: so.", "Euro"),
        ("Euro", "Euro"),
        ("**Euro**, not **Franc**", "Euro"),
        ("2 ** 3 ** 4", "2 ** 3 ** 4"),
        ("", ""),
    ],
)
def test_the_short_answer(top, answer):
    assert explain.short_answer(parse(f"{top}\n\n## More\n**Lira**\n\n## And\nx")) == answer


@pytest.mark.parametrize(
    ("top", "alone"),
    [
        ("The currency is the Euro.", True),
        ("It follows the law of 1990.", True),
        ("See below for the answer.", False),
        ("This report will explain the matter.", False),
        ("The answer is given in the next section.", False),
        ("As discussed below, it is the Euro.", False),
        ("The above holds for Cyprus.", False),
        ("详见下文。", False),
        ("", False),
    ],
)
def test_whether_the_top_stands_alone(top, alone):
    assert explain.top_alone(parse(f"{top}\n\n## A\nx\n\n## B\ny")) == alone


def test_novelty_counts_runs_of_three_words_that_are_new():
    root = parse("a b c d\n\n## x\na b c d e\n\n## y\na b c d e")
    assert explain.novelties(root) == [2 / 4, 1 / 4]
    assert explain.novelties(parse("top\n\n## A\n\n## B\nx"))[0] == 0


def test_linked_parts_share_a_word_with_the_part_above():
    assert explain.linked(parse("Cyprus pays.\n\n## Cyprus\nx\n\n## Bananas\nyellow")) == 0.5
    assert explain.linked(parse("Cyprus pays.")) == 1


@pytest.mark.parametrize(
    ("below", "contradicts"),
    [
        ("The tower of Pisa has 294 steps today.", True),
        ("The tower of Pisa has not 296 steps.", True),
        ("The tower of Pisa has 296 steps.", False),
        ("The tower of Pisa has 296 steps and 7 bells.", False),
        ("The bell of Rome weighs 9 tons.", False),
    ],
)
def test_contradictions(below, contradicts):
    root = parse(f"The tower of Pisa has 296 steps.\n\n## More\n{below}")
    assert bool(explain.contradictions(root)) == contradicts
    same = parse(f"The tower of Pisa has 296 steps. {below}")  # one level: a list may do so
    assert explain.contradictions(same) == []


def test_contradictions_are_those_that_comparing_all_pairs_finds():
    sentences = [f"The {a} tower of {b} has {n} steps." for a in ("old", "new") for b in ("Rome", "Pisa")
                 for n in (3, 4)]  # fmt: skip
    root = parse(
        "\n\n".join(
            [sentences[0], *(f"{'#' * (2 + n % 2)} T\n{s}" for n, s in enumerate(sentences))]
        )
    )
    rows = [
        (n.depth, root.text[slice(*s)])
        for n in root.walk()
        for p in (n.gist, n.detail)
        for s in n.sentences(p)
    ]
    pairs = sum(
        a[0] != b[0] and explain._contradict(explain.content(a[1]), explain.content(b[1]))
        for k, a in enumerate(rows)
        for b in rows[:k]
    )
    assert len(explain.contradictions(root)) == pairs > 0


NUGGET = "The capital of Cyprus is Nicosia."


def everything(text):
    return [(0, len(text))]


def test_the_cost_of_a_nugget_is_what_is_read_before_it_is_known():
    text = "One two three.\n\n## Four five\nSix seven.\n\nEight. The capital of Cyprus is Nicosia.\n\n## Nine\nTen."
    root = parse(text)
    # top 3, title and gist 2 + 2, title and gist 1 + 1, then the detail: 1 + 6
    assert explain.nugget_costs(root, [NUGGET], everything(text)) == [16]
    assert explain.nugget_costs(root, [NUGGET], []) == [math.inf]
    assert explain.nugget_costs(root, ["The capital of Malta is Valletta."], everything(text)) == [
        math.inf
    ]


def test_a_nugget_may_be_said_in_several_ways():
    text = "Nicosia is the seat of government in Cyprus."
    forms = (NUGGET, "Nicosia is the seat of government in Cyprus.")
    assert explain.nugget_costs(parse(text), [forms], everything(text)) == [8]


def test_a_reader_who_skips_finds_what_the_titles_name():
    text = ("Top words.\n\n## The moon\nIt is far.\n\nMuch text. " + "filler words here. " * 30
            + "\n\n## The capital Nicosia of Cyprus\nGist.\n\nThe capital of Cyprus is Nicosia.")  # fmt: skip
    root = parse(text)
    (skip,) = explain.skip_costs(root, [NUGGET], everything(text))
    (all_of_it,) = explain.nugget_costs(root, [NUGGET], everything(text))
    assert skip == 2 + (2 + 3) + (5 + 1) + 6 < all_of_it
    hidden = parse(text.replace("The capital Nicosia of Cyprus", "More"))
    assert explain.skip_costs(hidden, [NUGGET], everything(hidden.text)) == [math.inf]


def test_words_without_evidence_count_for_nothing():
    good = "Top.\n\n## A\nThe capital of Cyprus is Nicosia."
    stuffed = "Capital Cyprus Nicosia, capital Cyprus Nicosia is the capital.\n\n## A\nx"
    start = good.index("The capital")
    at = explain.measures(parse(good), [(start, len(good))], [NUGGET])["nugget_auc"]
    assert at > explain.measures(parse(stuffed), [], [NUGGET])["nugget_auc"] == 0


def test_the_area_under_the_curve():
    assert explain.auc([1, 1024]) == 0.5 and explain.auc([32]) == 0.5
    assert explain.auc([math.inf, 2000]) == 0 == explain.auc([])


def test_sizes():
    good = explain.sizes(parse(world.GOLD))
    assert good == (True, True, True, 1.0)
    long = parse("w " * 61 + "\n\n" + "## A\nx\n\n" * 8 + "## B\n" + "y " * 46)
    assert explain.sizes(long) == (False, False, True, pytest.approx(8 / 9))
    assert not explain.sizes(parse("t\n\n# A\na\n\n## B\nb\n\n### C\nc\n\n#### D\nd")).depth


def test_factual_sentences():
    text = "Cyprus pays in euro. Is that so? Yes. See below for more facts.\n\n## Title of this part\n- Cyprus is an island."
    root = parse(text)
    assert [text[slice(*span)] for span in root.factual] == [
        "Cyprus pays in euro.",
        "Cyprus is an island.",
    ]
