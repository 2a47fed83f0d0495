"""Each format's reader: what it finds in a small book, and that all of it stands in the files."""

import pytest
from envs.textbook import books

from jaxdeep.envs.textbook import cnxml, html_book, latex, markdown_book, pdf_text, report, verify
from jaxdeep.envs.textbook.files import Folder
from jaxdeep.errors import DataError

READERS = {
    "cnxml": (cnxml, books.CNXML),
    "latex": (latex, books.LATEX),
    "openintro": (latex, books.OPENINTRO),
    "html": (html_book, books.HTML),
    "markdown": (markdown_book, books.MARKDOWN),
    "pdf": (pdf_text, books.PDF),
}


def read(tmp_path, name, more=()):
    reader, files = READERS[name]
    folder = Folder(books.write(tmp_path, {**files, **dict(more)}))
    return reader.read(folder), folder


@pytest.mark.parametrize("name", READERS)
def test_every_field_stands_in_the_files_and_nearly_all_of_the_book_in_a_field(name, tmp_path):
    data, folder = read(tmp_path, name)
    assert verify.failures(data, folder) == []
    assert verify.checked(data) > 5
    least = {"cnxml": 0.995, "pdf": 0.8}.get(name, 0.98)
    assert report.coverage(data, folder) >= least


@pytest.mark.parametrize("name", READERS)
def test_a_changed_field_is_found(name, tmp_path):
    data, folder = read(tmp_path, name)
    item = data.items[0]
    for changed in (
        item.question + " 7",
        item.question[1:] or "7",
        item.question.replace("e", "o", 1),
    ):
        if verify.letters(changed, markup=True) == verify.letters(item.question, markup=True):
            continue
        assert verify.failure(changed, item.spans["question"], folder)
    assert verify.failure(item.question, None, folder) == "no span"


def items(data):
    return {item.number + item.role: item for item in data.items}


def test_cnxml(tmp_path):
    data, _ = read(tmp_path, "cnxml")
    assert (data.book.id, data.book.licence) == ("small", "CC-BY-4.0") and data.notes == []
    assert [section.title for section in data.sections] == ["Sums of Numbers", "Speed"]
    found = items(data)
    example, tried, first, second, third = data.items[:5]
    assert example.question == r"Find the sum ⓐ $\frac{1}{4} + 2$." and example.kind == "example"
    assert example.reasoning == r"It is $\sqrt[3]{8}$ and $\pi$." and example.number == "1.1"
    assert (tried.role, tried.answer, tried.number) == ("try", "7", "1.1")
    assert first.question == "In the following exercises, simplify.\n\n2 + 5"
    assert first.instruction == second.instruction and first.spans["question"].made == "joined"
    assert second.question.endswith("10^{2} + 1") and second.answer == ""
    assert third.needs_image and "[image: a (line) of dots]" in third.question
    assert third.answer == "1.50 m/s\n\nor more" and third.flags == ["several solutions"]
    assert (
        "See Example 1.1." in data.sections[0].text
        and "what comes of adding" in data.sections[0].text
    )
    fast = found["1.2example"]
    assert fast.question == "How fast\n\nHow fast is it?" and fast.reasoning.endswith("Fast.")
    assert fast.depends_on == [example.id]
    assert data.items[-1].question.endswith("(a) at once\n(b) later")


def test_cnxml_that_is_incomplete_or_double_is_said(tmp_path):
    extra = {"modules/m10001-old/index.cnxml": books.CNXML["modules/m10001/index.cnxml"]}
    extra["modules/m10003/index.cnxml"] = "<document><title>broken</document>"
    data, _ = read(tmp_path, "cnxml", extra)
    assert any("a second file of the module m10001" in note for note in data.notes)
    assert any("m10003" in note and "no collection" in note for note in data.notes)
    (tmp_path / "modules/m10002/index.cnxml").unlink()
    data = cnxml.read(Folder(tmp_path))
    assert "m10002 is in the collection, its file is missing" in data.notes


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ('<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><document>&b;</document>', "entity"),
        (
            '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><document>&a;</document>',
            "entity",
        ),
        ("<document>" * 5000 + "</document>" * 5000, "nests more than"),
        ("<document><content>", "no well-formed XML"),
    ],
)
def test_hostile_xml_is_left_out_by_name(module, why, tmp_path):
    data, _ = read(tmp_path, "cnxml", {"modules/m10002/index.cnxml": module})
    (note,) = data.notes
    assert "m10002" in note and "left out" in note and why in note
    assert [section.title for section in data.sections] == ["Speed"]


def test_latex(tmp_path):
    data, _ = read(tmp_path, "latex")
    example, first, second, third = data.items
    assert (
        example.question == "How many are 40{} and 1?"
        and example.reasoning == r"41, or 100\% of them."
    )
    assert (
        first.question == r"Count ${\mathbb N}$ to 50{}, see \ref{a\size}."
        and first.answer == "Done: $50$."
    )
    assert (first.number, second.number) == ("1.1", "2.1")
    assert third.question == "Add $2+2$." and third.answer == "$4$"
    assert "100 % kept" in data.sections[1].text and "hidden" not in data.sections[1].text
    assert [section.title for section in data.sections if section.title] == ["Counting", "Adding"]
    notes = "\n".join(data.notes)
    for said in (
        "/etc/passwd} leads out",
        "../outside} leads out",
        "two-lang is generated",
        "missing}: the file is missing",
    ):
        assert said in notes, said


def test_openintro_and_its_key_of_odd_exercises(tmp_path):
    data, _ = read(tmp_path, "openintro")
    kinds = [(item.kind, item.role, item.number) for item in data.items]
    assert kinds[:2] == [("example", "example", "1.1"), ("exercise", "try", "1.2")]
    assert [item.answer for item in data.items[1:]] == [
        r"It is 20\%.",
        "(a)~It is $2/4 = 0.5$. (b)~Yes.",
        "",
        "True.",
        "(a)~One. (b)~Two.",
    ]
    assert [item.number for item in data.items[2:]] == ["1.1", "1.2", "1.3", "2.1"]
    assert data.items[0].reasoning == r"It is 25\%." and data.notes == []


def test_a_key_under_another_title_or_too_short_is_said(tmp_path):
    text = books.OPENINTRO["main.tex"]
    swapped = text.replace(r"\eocesolch{Data}", r"\eocesolch{Chance}")
    data, _ = read(tmp_path, "openintro", {"main.tex": swapped})
    assert any("come in the place of chapter 'Data'" in note for note in data.notes)
    short = text.replace("\\eocesol{True.}\n", "")
    data, _ = read(tmp_path, "openintro", {"main.tex": short})
    assert any("chapter 1: 1 answers, 2 expected" in note for note in data.notes)


def test_a_file_that_includes_itself_ends(tmp_path):
    data, _ = read(
        tmp_path, "latex", {"two.tex": r"\chapter{A}\input{two}\begin{exc}Add.\end{exc}"}
    )
    assert any("includes itself" in note for note in data.notes)
    assert [item.question for item in data.items][-1] == "Add."


def test_html(tmp_path):
    data, _ = read(tmp_path, "html")
    assert [(item.kind, item.number, item.answer) for item in data.items] == [
        ("example", "1", ""),
        ("example", "2", ""),
        ("exercise", "1", "$7$."),
        ("exercise", "2", "$11$.\n(1) again\n(7) more"),
        ("exercise", "3", ""),
        ("example", "1", ""),
    ]
    one, _, first, second, third, taken = data.items
    assert (one.question, one.reasoning) == ("Add $1+1$.", "It is $2$.")
    assert first.question == "Add the following:\n$y = 3+4$ (2) not a marker"
    assert second.flags == ["answer numbers restart"] and third.needs_image
    assert taken.question == "Take 1." and taken.reasoning == "Done."
    texts = "\n".join(section.text for section in data.sections)
    assert "If $a<b$ then add." in texts and "Well done" in texts and "var x" not in texts
    assert "Next page" in texts and texts.index("Adding") < texts.index("Taking away")
    assert any("no answer to 3" in note for note in data.notes)


def test_markdown(tmp_path):
    data, _ = read(tmp_path, "markdown")
    example, first, second, third, inline = data.items
    assert (example.question, example.reasoning) == ("Find 2 + 3.", "It is 5.")
    assert first.question == "Find each sum.\n3 + 4" and first.answer == "7"
    assert second.question == "Find each sum.\n4 + 5\nin one go" and second.answer == "9"
    assert third.answer == "" and inline.answer == "8"
    assert any("answer 5 has no exercise" in note for note in data.notes)
    assert "[image: a line]" in "\n".join(section.text for section in data.sections)


def test_text_of_a_pdf_emits_only_what_its_layout_allows(tmp_path):
    data, _ = read(tmp_path, "pdf")
    found = {int(item.number): item for item in data.items if item.kind == "exercise"}
    assert [n for n in sorted(found) if "layout" not in found[n].flags] == [1, 2, 3, 4, 5]
    assert {n: item.answer for n, item in found.items() if item.answer} == {
        1: "7", 2: "9", 3: "13", 4: "17", 5: "12", 7: "4",
    }  # fmt: skip
    assert "answer: layout" in found[6].flags  # the 2 of 8n2 was a power
    assert found[5].question.endswith("of the size that\nwe have seen before?")
    example = data.items[0]
    assert example.question == "2 + 3" and example.reasoning.startswith("Add the two\n5")
    assert "harder than the ones before" in data.sections[1].text


def test_books_in_other_encodings_are_read(tmp_path):
    text = books.MARKDOWN["book.md"].replace("count on", "zählen — weiter")
    (tmp_path / "book.md").write_bytes(text.encode("cp1252"))
    folder = Folder(tmp_path)
    data = markdown_book.read(folder)
    assert "zählen — weiter" in data.sections[1].text
    assert verify.failures(data, folder) == []
    (tmp_path / "book.md").write_bytes(text.encode("utf-16"))
    folder = Folder(tmp_path)
    data = markdown_book.read(folder)
    assert "zählen — weiter" in data.sections[1].text and verify.failures(data, folder) == []


def test_nothing_outside_the_folder_is_read(tmp_path):
    (tmp_path / "secret.tex").write_text("secret")
    inside = tmp_path / "book"
    inside.mkdir()
    (inside / "link.tex").symlink_to(tmp_path / "secret.tex")
    folder = Folder(inside)
    for name in ("link.tex", "../secret.tex", str(tmp_path / "secret.tex")):
        with pytest.raises(DataError, match="no file inside"):
            folder.file(name)


# Real books, where they are.


def test_prealgebra_has_its_counts(shared):
    folder = Folder(shared("textbooks/openstax_prealgebra_2e"))
    data = cnxml.read(folder)
    exercises = [item for item in data.items if item.kind == "exercise"]
    assert (len(data.items), len(exercises)) == (1464, 1342)
    assert sum(bool(item.answer or item.reasoning) for item in data.items) == 923
    assert verify.failures(data, folder) == [] and report.coverage(data, folder) >= 0.995


def test_openintro_has_its_counts(shared):
    folder = Folder(shared("textbooks/openintro_statistics"))
    data = latex.read(folder)
    roles = [item.role for item in data.items]
    assert [roles.count(role) for role in ("example", "try", "practice")] == [172, 192, 385]
    assert sum(bool(item.answer) for item in data.items if item.role == "practice") == 194
    assert verify.failures(data, folder) == [] and report.coverage(data, folder) >= 0.98


def test_the_other_books_have_their_counts(shared):
    for name, reader, count in (
        ("open_data_structures", latex, 170),
        ("think_python_2e.tex", latex, 86),
    ):
        assert len(reader.read(Folder(shared(f"textbooks/{name}"))).items) == count
    data = html_book.read(Folder(shared("textbooks/calculus_made_easy")))
    assert sum(item.kind == "exercise" for item in data.items) == 223
    folder = Folder(shared("textbooks/wallace_beginning_intermediate_algebra.md"))
    data = pdf_text.read(folder)
    assert sum(item.kind == "example" for item in data.items) == 556
    assert verify.failures(data, folder) == []
