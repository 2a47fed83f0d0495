"""A new task set works as it is, and nothing that is there is overwritten."""

import pathlib

import pytest

from jaxdeep.run import cli, new


def test_a_new_task_set_passes_its_test_and_is_valid(tmp_path, monkeypatch, capsys):
    root = pathlib.Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "taskset", "my_numbers.py"]) == 0
    said = capsys.readouterr().out
    assert "python -m pytest my_numbers_test.py" in said and "my_numbers.py:MyNumbers" in said
    assert pytest.main(["-q", "-p", "no:cacheprovider", "my_numbers_test.py"]) == 0
    capsys.readouterr()
    config = f"--config={root / 'configs/search/grpo.py'}"
    flags = [config, "--config.env.taskset=my_numbers.py:MyNumbers", "--config.model.path=tiny"]
    assert cli.main(["validate", *flags]) == 0
    said = capsys.readouterr().out
    assert "env: 9 of 9 tasks tried" in said and said.endswith("nothing is wrong\n")
    assert cli.main(["validate", *flags, "--config.env.largest=1"]) == 2
    assert "env.largest=1 must be at least 2 (the largest secret number)" in capsys.readouterr().err
    before = pathlib.Path("my_numbers.py").read_text()
    assert cli.main(["new", "taskset", "my_numbers.py"]) == 2
    assert "my_numbers.py exists, and nothing is overwritten" in capsys.readouterr().err
    pathlib.Path("my_numbers.py").rename("other.py")
    assert cli.main(["new", "taskset", "my_numbers.py"]) == 2
    assert "my_numbers_test.py exists" in capsys.readouterr().err
    assert not pathlib.Path("my_numbers.py").exists()
    assert pathlib.Path("other.py").read_text() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "new takes two words"),
        (["tasket", "a.py"], 'Did you mean "taskset"?'),
        (["taskset"], "new takes two words"),
        (["taskset", "a.txt"], "a.txt is not the name of a Python file, such as mine.py"),
        (["taskset", "a-b.py"], "a-b.py is not the name of a Python file"),
        (["taskset", "class.py"], "class.py is not the name of a Python file"),
        (["taskset", "no/mine.py"], "there is no folder no"),
    ],
)
def test_what_cannot_be_written_is_refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", *words]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "name"),
    [("mine.py", "Mine"), ("two_words.py", "TwoWords"), ("camelCase.py", "CamelCase")],
)
def test_the_task_set_is_named_after_its_file(file, name):
    assert new.class_name(pathlib.Path(file)) == name
