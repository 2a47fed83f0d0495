"""What is done with items once they are read: golds, flags for planted faults, twins, splits."""

import pytest

from jaxdeep.envs.textbook import finish, golds
from jaxdeep.envs.textbook.schema import Book, Data, Item, Section


def exercises(*rows):
    """Items of one section from (question, answer) or (question, answer, changes)."""
    out = []
    for number, (question, answer, *changes) in enumerate(rows, 1):
        item = Item(f"x{number}", "exercise", "s1", str(number), "practice", question, "", answer)
        for name, value in (changes[0] if changes else {}).items():
            setattr(item, name, value)
        out.append(item)
    return out


def finished(*rows):
    data = Data(Book("b"), [Section("s1", "1", "1", "One", 0)], exercises(*rows))
    finish.finish(data, test=0.5, seed=0)
    return data


CLEAN = [(f"Add: ${n} + {n + 3}$", str(2 * n + 3)) for n in range(11, 21)]


def test_a_clean_book_has_no_flag_and_no_note():
    data = finished(
        *CLEAN, ("Is 4 even? (a) Say so. (b) Why?", "(a) Yes (b) 2"), ("What is $2^{10}$?", "1024")
    )
    assert [item.flags for item in data.items] == [[]] * 12 and data.notes == []


# Each fault is planted alone in a copy of the clean book; the flag or note that must report it.
FAULTS = {
    "a date set as math": (("Which year?", "1,2014"), "digits after a comma"),
    "another date": (("When?", "March 3,2014"), "digits after a comma"),
    "a footnote's digit on a sum": (("Add: $7 + 11$", "183"), "footnote"),
    "a footnote's digit on a product": (("Multiply: $9 \\times 11$", "992"), "footnote"),
    "a footnote's digit against the reasoning": (
        ("How many?", "181", {"reasoning": "There are 18."}),
        "footnote",
    ),
    "a lost power": (("Compute $2^{10}$", "210"), "without its power"),
    "another lost power": (("What is $3^4$?", "34"), "without its power"),
    "unreadable characters": (("How far?", "12 \ufffd"), "could not be read"),
    "a private character": (("How far?", "12 \ue123"), "could not be read"),
    "an open bracket": (("Expand.", "(x + 1"), "brackets"),
    "an open brace": (("Expand.", "\\frac{1}{2"), "brackets"),
    "parts too few": (("(a) One? (b) Two? (c) Three?", "(a) 1 (b) 2"), "parts disagree"),
    "parts too many": (("(a) One? (b) Two?", "(a) 1 (b) 2 (c) 3"), "parts disagree"),
    "circled parts": (("ⓐ One? ⓑ Two?", "ⓐ 1 ⓑ 2 ⓒ 3"), "parts disagree"),
    "the previous problem": (
        ("Repeat the previous problem with 9.", "4"),
        "depends on the previous",
    ),
    "the exercise above": (("Solve the exercise above again.", "4"), "depends on the previous"),
    "the last exercise again": (("Redo the last exercise.", "4"), "depends on the previous"),
    "the same question": ((CLEAN[0][0], CLEAN[0][1]), "duplicate of x1"),
    "the same question otherwise answered": ((CLEAN[0][0], "99"), "duplicate with another answer"),
    "a number twice": (("Why?", "Because.", {"number": "3"}), "number occurs twice"),
    "a gap": (("Why so?", "5", {"number": "14"}), "numbers that are missing: 11, 12, 13"),
    "an id twice": (("Why now?", "5", {"id": "x2"}), "id occurs twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault):
    row, expected = FAULTS[fault]
    data = finished(*CLEAN, row)
    said = [flag for item in data.items for flag in item.flags] + data.notes
    assert any(expected in one for one in said), said


@pytest.mark.parametrize("shift", [1, -1])
def test_a_key_that_is_shifted_is_found_and_so_is_one_of_parts(shift):
    answers = [answer for _, answer in CLEAN]
    moved = answers[shift:] + answers[:shift]
    data = finished(
        *((question, answer) for (question, _), answer in zip(CLEAN, moved, strict=True))
    )
    assert any("a shifted key?" in note for note in data.notes)
    assert all("suspicious gold: the key looks shifted by one" in item.flags for item in data.items)


def test_two_editions_in_one_folder_are_found():
    sections = [Section(f"s{n}", "1", "1", "Adding", n) for n in (1, 2)]
    items = exercises(*CLEAN) + exercises(*((q + " Now.", a) for q, a in CLEAN))
    for item in items[10:]:
        item.section, item.id = "s2", item.id + "b"
    data = Data(Book("b"), sections, items)
    finish.finish(data, test=0.2, seed=0)
    assert any("two editions of one book?" in note for note in data.notes)


def test_twins_share_a_group_and_a_split_and_an_example_is_one_of_its_tries():
    rows = [(f"Add ${n}$ and ${n + 1}$.", str(2 * n + 1)) for n in range(20)]
    rows += [
        (f"Name the {word}.", word)
        for word in ["lion", "hare", "mole", "wolf", "newt", "toad", "frog", "crow"]
    ]
    data = finished(*rows)
    assert len({item.group for item in data.items[:20]}) == 1
    assert len({item.split for item in data.items[:20]}) == 1
    assert len({item.group for item in data.items[20:]}) == 8
    assert {item.split for item in data.items[20:]} == {"train", "test"}
    example = Item("e", "example", "s1", "1", "example", "How many?")
    tried = Item("t", "exercise", "s1", "1", "try", "How far?", answer="3")
    data = Data(Book("b"), [Section("s1", "1", "1", "One", 0)], [example, tried])
    finish.finish(data, test=0.2, seed=0)
    assert example.group == tried.group


def test_splits_depend_on_the_seed_alone():
    splits = []
    for seed in (0, 0, 1):
        data = Data(
            Book("b"),
            [Section("s1", "1", "1", "One", 0)],
            exercises(*((f"Name {w}", w) for w in "abcdefghijklmnop")),
        )
        finish.finish(data, test=0.5, seed=seed)
        splits.append([item.split for item in data.items])
    assert splits[0] == splits[1] != splits[2]


def test_near_duplicates_are_counted_without_what_is_shared():
    instruction = "In the following exercises, add the numbers and write the sum in words."
    example = Item(
        "e",
        "example",
        "s1",
        question="A train goes from one town to another town far away in the north at 5 km/h.",
    )
    near = Item(
        "n",
        "exercise",
        "s1",
        question="A train goes from one town to another town far away in the north at 6 km/h.",
    )
    far = Item(
        "f",
        "exercise",
        "s1",
        question=f"{instruction} A bird sings in a tree at night.",
        instruction=instruction,
    )
    other = Item(
        "o",
        "example",
        "s1",
        question=f"{instruction} Two men dig a hole by the road.",
        instruction=instruction,
    )
    assert [(a, b) for a, b, _ in finish.overlaps([example, near, far, other])] == [("n", "e")]


@pytest.mark.parametrize(
    ("answer", "final", "kind"),
    [
        *(("7", "7", "number"), ("", "", "none"), ("Answers will vary.", "", "explanation")),
        *(("[image: a line]", "", "image"), ("ⓐ 2, 9 ⓑ 0", "ⓐ 2, 9 ⓑ 0", "parts")),
        ("(a)~It is $2/4 = 0.5$ of all the people in the group that was asked about it. (b)~Yes, they did so before.", "(a) 0.5 (b) Yes, they did so before.", "parts"),
        ("False. The two trials are independent of each other, which is what the question asks about.", "False", "verdict"),
        ("We add all of the numbers of the table above and divide: 12/48 = 25 = \\$25, as the question asks.", "\\$25", "number"),
        ("The distribution is skewed to the right because most of the people earn less than the mean does.", "", "explanation"),
    ],
)  # fmt: skip
def test_the_short_answer_of_a_printed_one(answer, final, kind):
    assert golds.final_of(answer) == (final, kind)


def test_an_item_whose_layout_is_not_trusted_has_no_short_answer():
    data = finished(("Find it.", "7", {"flags": ["layout"]}))
    assert data.items[0].final == "" and data.items[0].answer == "7"


def test_parts_are_read_from_marks_and_from_lists_of_latex():
    item = exercises(
        (
            r"Say: \begin{parts}\item One? \begin{subparts}\item no\end{subparts} \item Two? \end{parts}",
            "(a)~1 (b)~2",
        )
    )[0]
    golds.grade(item)
    assert [(part.label, part.answer) for part in item.parts] == [("a", "1"), ("b", "2")]
    assert golds.labelled("only (a) one") == {} and golds.labelled("f(a) and g(b)") == {}
