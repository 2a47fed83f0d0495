"""The builder as a whole: files and report, the older form, corrections, a model that chooses."""

import dataclasses
import json

import pytest
from envs.textbook import books

from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.envs.textbook import choose, edits, html_book, pdf_text, schema, verify
from jaxdeep.envs.textbook.build import Textbook, licence_of
from jaxdeep.envs.textbook.files import Folder
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.run import cli
from jaxdeep.setup import builders


@pytest.fixture
def book(tmp_path):
    return books.write(tmp_path / "book", books.MARKDOWN)


def run(source, workdir, *more):
    flags = [f"--config.data.{name}={value}" for name, value in (("source", source), *more)]
    return cli.main(["data", "--config=configs/textbook/data.py", f"--workdir={workdir}", *flags])


def test_the_verb_writes_the_book_its_report_and_a_page_and_repeats_itself(book, tmp_path, capsys):
    assert run(book, tmp_path / "a") == 0 and run(book, tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert "gradable" in shown and str(tmp_path / "b/book.jsonl") in shown
    for name in ("book.jsonl", "chapters.json", "summary.json", "index.html"):
        first, second = ((tmp_path / run / name).read_bytes() for run in "ab")
        assert first == second, name
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    counts = {name: summary[name] for name in ("examples", "exercises", "answered", "gradable")}
    assert counts == {"examples": 1, "exercises": 4, "answered": 3, "gradable": 3}
    assert summary["coverage"] > 0.98 and summary["fields left out"] == {}
    page = (tmp_path / "a/index.html").read_text()
    assert "answer 5 has no exercise" in page and "No licence was found" in page


def test_what_is_written_is_read_equal_and_the_older_form_both_ways(book, tmp_path):
    run(book, tmp_path / "a")
    data = schema.read(tmp_path / "a/book.jsonl")
    schema.write(tmp_path / "again.jsonl", data)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "a/book.jsonl").read_bytes()
    rows = json.loads((tmp_path / "a/chapters.json").read_text())
    assert rows == schema.chapters(data)
    (example,) = [row for chapter in rows for row in chapter["example_problems"]]
    assert example == {"question": "Find 2 + 3.", "reasoning": "It is 5.", "answer": ""}
    old = schema.read(tmp_path / "a/chapters.json")
    assert schema.chapters(old) == rows
    assert run(tmp_path / "a/chapters.json", tmp_path / "c") == 0
    assert json.loads((tmp_path / "c/summary.json").read_text())["gradable"] == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"v": 1, "type": "page"}', "no book, section or item"),
        ('{"v": 2, "type": "book", "id": "b"}', "version 1"),
        ('{"v": 1, "type": "book", "id": 3}', "is no str"),
        ('{"v": 1, "type": "book", "id": "b", "colour": "red"}', "unknown keys colour"),
        (
            '{"v": 1, "type": "item", "id": "i", "kind": "joke", "section": "s"}',
            "none of 'example'",
        ),
        ("[1]", "no chapter_text"),
        ('[{"chapter_text": "x", "exercises": [{"answer": "1"}]}]', "has no question"),
        ("{", "not JSON"),
        ("", "0 books"),
    ],
)
def test_a_file_that_is_no_book_is_refused_with_its_line(text, why, tmp_path):
    path = tmp_path / "book.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        schema.read(path)


def test_a_field_that_is_not_in_the_files_is_left_out_by_name(book, tmp_path, monkeypatch):
    from jaxdeep.envs.textbook import markdown_book

    read = markdown_book.read

    def rewriting(folder):
        data = read(folder)
        data.items[1].answer = "8"
        data.items[2].question = "Something else entirely"
        return data

    monkeypatch.setattr(markdown_book, "read", rewriting)
    built = Textbook(str(book)).build(tmp_path / "out")
    left = built.summary["fields left out"]
    assert len(left) == 2 and built.summary["exercises"] == 3 and built.summary["answered"] == 1
    assert all("stands where the source has" in why for why in left.values())


def test_corrections_are_applied_and_logged(book, tmp_path):
    run(book, tmp_path / "a")
    first, second = [item.id for item in schema.read(tmp_path / "a/book.jsonl").items[1:3]]
    fixes = tmp_path / "fixes.jsonl"
    rows = [
        {"id": first, "set": {"final": "70"}, "why": "a slip", "by": "K"},
        {"id": second, "drop": True},
    ]
    fixes.write_text("\n".join(map(json.dumps, rows)))
    assert run(book, tmp_path / "b", ("edits", fixes)) == 0
    data = schema.read(tmp_path / "b/book.jsonl")
    fixed = next(item for item in data.items if item.id == first)
    assert fixed.final == "70" and fixed.flags == ["edited: final"]
    assert second not in [item.id for item in data.items]
    log = [json.loads(line) for line in (tmp_path / "b/edits.jsonl").read_text().splitlines()]
    assert log[0]["before"] == {"final": "7"} and log[0]["by"] == "K"
    assert log[1]["dropped"]["question"].startswith("Find each sum.")
    assert json.loads((tmp_path / "b/summary.json").read_text())["edits"] == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": "nobody", "drop": true}', "which the book does not have"),
        ('{"id": "x", "set": {"split": 3}}', "cannot be set"),
        ('{"id": "x", "set": {"spans": "y"}}', "cannot be set"),
        ('{"id": "x", "set": {}, "drop": true}', "either drop or set"),
        ('{"drop": true}', "is not"),
        ("nonsense", "not JSON"),
    ],
)
def test_a_wrong_correction_is_refused(line, why, book, tmp_path):
    (tmp_path / "fixes.jsonl").write_text(line)
    with pytest.raises(DataError, match=why):
        edits.apply(schema.Data(schema.Book("b")), edits.read(tmp_path / "fixes.jsonl"))


# A model that chooses.

PLAIN = {"a.html": "<h1>Sums</h1><p>A riddle: what is 2 + 2?<p>It is 4.<p>Next: 3 + 3?<p>Six."}


def choices(answer):
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return answer

    return ask, asked


def chosen(tmp_path, answer):
    folder = Folder(books.write(tmp_path, {"a.html": PLAIN["a.html"].replace("<p>", "\n<p>")}))
    data = html_book.read(folder)
    ask, asked = choices(answer)
    return data, folder, choose.choose(data, folder, ask), asked


def test_a_model_chooses_lines_and_the_text_is_the_books(tmp_path):
    answer = 'Here: [{"kind": "exercise", "question": [2, 2], "answer": [3, 3]}]'
    data, folder, came, asked = chosen(tmp_path, answer)
    (item,) = data.items
    assert (came.added, came.refused) == (1, [])
    assert item.question.strip() == "A riddle: what is 2 + 2?" and item.answer.strip() == "It is 4."
    assert verify.failures(data, folder) == [] and "2: A riddle" in asked[0]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ('[{"kind": "exercise", "question": "What is 2 + 2?"}]', "no range of lines"),
        ('[{"kind": "exercise", "question": [2, 99]}]', "no range of lines"),
        ('[{"kind": "exercise", "question": [3, 2]}]', "no range of lines"),
        ('[{"kind": "exercise", "question": [true, 2]}]', "no range of lines"),
        ('[{"kind": "exercise", "question": [2, 2], "final": "4"}]', "other keys"),
        ('[{"kind": "exercise", "question": [2, 3], "answer": [3, 3]}]', "overlap"),
        ('[{"kind": "poem", "question": [2, 2]}]', "no kind"),
        ('[{"kind": "exercise", "answer": [2, 2]}]', "no question"),
        ("The answer is 4.", "no list of JSON"),
        ("[2, 2]", "no kind"),
    ],
)
def test_what_is_no_choice_is_refused_and_counted(answer, why, tmp_path):
    data, _, came, _ = chosen(tmp_path, answer)
    assert data.items == [] and came.added == 0
    assert came.refused and all(why in one for one in came.refused)


def test_a_line_belongs_to_one_item(tmp_path):
    row = {"kind": "exercise", "question": [2, 2]}
    _, _, came, _ = chosen(tmp_path, json.dumps([row, row]))
    assert came.added == 1 and "lines of another item" in came.refused[0]


def test_a_policy_is_asked_through_its_chat(tiny_chat):
    policy = ScriptedPolicy(tiny_chat, ["[]", "no"])
    ask = choose.of_policy(policy, tiny_chat, max_new=50)
    assert ask("Which lines?") == "[]"
    shown = tiny_chat.tokenizer.decode(policy.prompts[0])
    assert "Which lines?" in shown
    cut = choose.of_policy(ScriptedPolicy(tiny_chat, ["[[1, 2]]"]), tiny_chat, max_new=1)
    assert "]]" not in cut("Which lines?")


@pytest.fixture(scope="module")
def tiny_chat():
    from jaxdeep.setup import weights
    from jaxdeep.setup.sections import ModelConfig

    return weights.chat_of(ModelConfig("tiny", thinking="none"))


def test_the_chooser_of_a_configuration_is_used(tmp_path):
    folder = books.write(tmp_path / "book", {"a.html": PLAIN["a.html"].replace("<p>", "\n<p>")})
    (tmp_path / "mine.py").write_text(
        'def ask(prompt):\n    return \'[{"kind": "exercise", "question": [2, 2], "answer": [3, 3]}]\'\n'
    )
    built = Textbook(str(folder), chooser=f"{tmp_path}/mine.py:ask").build(tmp_path / "out")
    assert built.summary["exercises"] == 1 and built.summary["flags"] == {"chosen by a model": 1}
    with pytest.raises(ConfigError, match="no function 'other'"):
        Textbook(str(folder), chooser=f"{tmp_path}/mine.py:other").build(tmp_path / "out")


# Input that cannot be used.


@pytest.mark.parametrize(
    ("files", "settings", "why"),
    [
        ({}, {}, "holds no CNXML"),
        ({"notes.md": " \n"}, {}, "holds no text"),
        ({"main.tex": "\\documentclass{book}\\begin{document}\\end{document}"}, {}, "holds no text"),
        ({"book.pdf": "not a PDF"}, {}, "cannot be read"),
        ({"a.json": "{}", "b.json": "{}"}, {}, "holds 2 JSON files"),
        ({"book.md": "# A\n\nText."}, {"edits": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"a.collection.xml": "<c/>", "b.collection.xml": "<c/>", "m10001.cnxml": "<d/>"}, {}, "several collections"),
    ],
)  # fmt: skip
def test_input_that_cannot_be_used_is_refused(files, settings, why, tmp_path):
    source = books.write(tmp_path / "book", files)
    source.mkdir(exist_ok=True)
    with pytest.raises(DataError, match=why):
        Textbook(str(source), **settings).build(tmp_path / "out")


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    for section, why in (
        ({}, "data.builder is None"),
        ({"builder": "textbok"}, 'Did you mean "textbook"'),
        ({"builder": "textbook"}, "data.source must be set"),
        ({"builder": "textbook", "source": "x", "test": 2.0}, "is a share"),
        ({"builder": "textbook", "source": "x", "format": "word"}, "none of cnxml"),
        ({"builder": "dataclasses:field"}, "must be a frozen dataclass"),
    ):
        with pytest.raises(ConfigError, match=why):
            builders.BuilderConfig.build(section)
    with pytest.raises(DataError, match="does not exist"):
        Textbook(str(tmp_path / "none")).build(tmp_path / "out")


def test_a_builder_of_ones_own_is_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(
        "import dataclasses\n"
        "from jaxdeep.data.build import Built\n\n\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Own:\n"
        "    rows: int = 2\n\n"
        "    def build(self, workdir):\n"
        "        return Built('Own', [{'n': self.rows}], ['a note'], {'n': self.rows}, [])\n"
    )
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({{'data': {{'builder': '{tmp_path}/own.py:Own', 'rows': 3}}}})\n"
    )
    assert cli.main(["data", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/out"]) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text()) == {"n": 3}
    assert "a note" in (tmp_path / "out/index.html").read_text()


def test_a_pdf_is_converted_page_by_page(tmp_path):
    pdfium = pytest.importorskip("pypdfium2")
    document = pdfium.PdfDocument.new()
    document.new_page(200, 200)
    document.save(tmp_path / "empty.pdf")
    with pytest.raises(DataError, match="holds no text, only images"):
        pdf_text.convert(tmp_path / "empty.pdf", tmp_path / "out")


def test_the_licence_is_that_of_the_licence_file(tmp_path):
    books.write(
        tmp_path, {"LICENSE": "Creative Commons Attribution-ShareAlike 3.0 Unported", "a.md": "# A"}
    )
    assert licence_of(Folder(tmp_path)) == "CC-BY-SA-3.0"
    books.write(tmp_path, {"LICENSE": "see http://creativecommons.org/licenses/by-nc-sa/4.0/"})
    assert licence_of(Folder(tmp_path)) == "CC-BY-NC-SA-4.0"
    books.write(tmp_path, {"LICENSE": "All rights reserved."})
    assert licence_of(Folder(tmp_path)) == ""


def test_schema_objects_say_their_version():
    data = schema.Data(schema.Book("b"), [schema.Section("s", "1", "1", "T", 0)])
    assert [(row["v"], row["type"]) for row in schema.lines(data)] == [(1, "book"), (1, "section")]
    assert dataclasses.is_dataclass(schema.Item)
