"""`jaxdeep check` as a command."""

import json

import pytest
from envs.research import world

from jaxdeep.envs.research.report import Report, to_json, to_markdown
from jaxdeep.run import cli


@pytest.fixture
def write(tmp_path):
    def write_report(answer, name="report.json"):
        report = Report(world.QUESTION, answer, world.shelf(), 8, id="q\x1b[31m")
        text = to_markdown(report) if name.endswith(".md") else json.dumps(to_json(report))
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_report


def test_a_right_report_passes(write, capsys):
    assert cli.main(["check", write(world.GOLD), write(world.GOLD, "report.md")]) == 0
    said = capsys.readouterr().out
    assert said.count("exact           S1.2") == 2 and "\x1b" not in said
    assert said.endswith("passed: 8 of 8 references have a place in a source\n")


@pytest.mark.parametrize(
    ("citation", "status", "rc"),
    [
        ('<cite id="S9.1">x y z</cite>', "unknown_source", 1),
        ('<cite id="S1" quote="nothing like this was ever shown">x</cite>', "fabricated", 1),
        ('<cite id="S1" quote="Nicosia lies on the river">x</cite>', "misattributed", 1),
        ('<cite id="S1.9">x</cite>', "out_of_range", 0),
        ('<cite id="S1" quote="The population of Cyprus is 930,000">x</cite>', "altered", 0),
        ('<cite id="S1" quote="Cyprus">x</cite>', "too_short", 0),
        ("no citation", "no citations", 0),
    ],
)
def test_the_exit_status_follows_the_statuses(write, capsys, citation, status, rc):
    assert cli.main(["check", write(f"**Euro** {citation}")]) == rc
    said = capsys.readouterr().out
    assert status in said and ("failed: 1" in said) == bool(rc)


def test_a_report_without_sources_fails(tmp_path, capsys):
    path = tmp_path / "a.md"
    path.write_text("A is b [1].")
    assert cli.main(["check", str(path)]) == 1
    assert "no source was shown" in capsys.readouterr().out


def test_sources_are_checked_against_their_texts(write, tmp_path, capsys):
    folder = tmp_path / "sources"
    folder.mkdir()
    for n, facts in enumerate(world.PASSAGES.values(), 1):
        (folder / f"S{n}.txt").write_text(" ".join(facts))
    path = write(world.GOLD)
    assert cli.main(["check", path, f"--sources={folder}"]) == 0
    (folder / "S2.txt").write_text("Nicosia was renamed.")
    capsys.readouterr()
    assert cli.main(["check", path, "--sources", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "3 exact, 1 changed" in said and "3 of 4" in said


def test_a_page_can_be_written(write, tmp_path, capsys):
    page = tmp_path / "pages" / "report.html"
    path = write(world.GOLD)
    assert cli.main(["check", path, f"--page={page}"]) == 0
    assert world.QUESTION in page.read_text()
    assert cli.main(["check", path, path, f"--page={page}"]) == 2
    assert "is for one report, and there are 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["none.json"], ["a", "--nosuch=1"]])
def test_what_cannot_be_checked(words, capsys):
    assert cli.main(["check", *words]) == 2
    assert "error: " in capsys.readouterr().err


def test_many_problems_are_counted(write, capsys):
    cli.main(["check", write("<cite>x y z</cite> " * 3)])
    said = capsys.readouterr().out
    assert "without an id (3 times)" in said and said.count("names no source") == 3
