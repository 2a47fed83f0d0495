"""The command line: what it runs, what it refuses, and that help never waits for jax."""

import errno
import shlex
import subprocess
import sys

import pytest

import jaxdeep.run
from jaxdeep import config as configs
from jaxdeep.run import cli

VERB = '''"""Trains nothing at all.

A second paragraph.
"""

import no_such_library_for_help_to_import

DEFAULT_CONFIG: str | None = "configs/one.py"
EXAMPLE = "python -m jaxdeep fake --config=configs/one.py"
FLAGS = {"against": "another workdir to compare with", "dry-run": "print and stop"}
'''

RUNS = '''"""Runs."""

DEFAULT_CONFIG = None
EXAMPLE = "python -m jaxdeep runs --config=configs/one.py"
FLAGS = {"fail": "what to raise", "dry-run": "a flag with a dash"}


def main(config, workdir, fail="", dry_run=""):
    print(config.train.steps, workdir, dry_run)
    if fail:
        raise eval(fail)
    return 3
'''

CONFIG = """from ml_collections import ConfigDict
def get_config(arg=None):
    return ConfigDict({"train": {"steps": 5 if arg else 10}})
"""


@pytest.fixture
def verbs(tmp_path, monkeypatch):
    """Two verbs, `fake` and `runs`, in a folder of their own, and a configuration in ./configs."""
    (tmp_path / "verbs").mkdir()
    (tmp_path / "verbs" / "fake.py").write_text(VERB)
    (tmp_path / "verbs" / "runs.py").write_text(RUNS)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "one.py").write_text(CONFIG)
    monkeypatch.setattr(jaxdeep.run, "__path__", [*jaxdeep.run.__path__, str(tmp_path / "verbs")])
    monkeypatch.setattr(cli, "VERBS", ("fake", "runs"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("jaxdeep.run.runs", None)
    vars(jaxdeep.run).pop("runs", None)


def test_the_verbs_are_listed_with_their_first_lines(verbs, capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert "  fake  Trains nothing at all.\n  runs  Runs.\n" in out
        assert max(map(len, out.split("\n"))) <= 80


def test_help_of_a_verb_shows_docstring_example_and_flags_without_importing(verbs, capsys):
    assert cli.main(["fake", "--workdir=x", "--help"]) == 0
    out = capsys.readouterr().out
    assert "A second paragraph." in out
    assert "python -m jaxdeep fake --config=configs/one.py" in out
    assert "default configs/one.py" in out
    assert "--against=..." in out and "another workdir to compare with" in out


def test_a_run_gets_its_configuration_workdir_and_flags(verbs, capsys):
    argv = ["runs", "--config=configs/one.py", "--config.train.steps", "7", "--dry-run", "yes"]
    assert cli.main(argv) == 3
    assert capsys.readouterr().out == "7 runs/runs-one yes\n"
    assert cli.main(["runs", "--config", "configs/one.py:smoke", "--workdir=a/b"]) == 3
    assert capsys.readouterr().out == "5 a/b \n"
    assert cli.main(["runs", "--config", "configs/one.py:smoke"]) == 3
    assert capsys.readouterr().out == "5 runs/runs-one-smoke \n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fakes"], "'fakes' is not a verb. Did you mean \"fake\"? The verbs are fake, runs"),
        (["fake", "--agianst=x"], 'fake has no flag --agianst. Did you mean "against"?'),
        (["fake", "--configs=x"], 'Did you mean "config"?'),
        (["fake", "against=x"], "'against=x' is not a flag"),
        (["fake", "--against"], "--against needs a value"),
        (["fake", "--against", "--workdir=x"], "--against needs a value"),
        (["fake", "--config.trian.steps=1"], 'Did you mean "train.steps"?'),
        (["fake", "--config=configs/two.py"], "configs/two.py does not exist"),
        (["runs"], "runs needs --config=FILE.py, as in\n  python -m jaxdeep runs"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_imported(verbs, capsys, argv, says):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.startswith("error: ")
    assert captured.out == ""


def test_a_verb_with_words_takes_them_in_place_of_a_configuration(verbs, capsys):
    source = VERB.replace("import no_such_library_for_help_to_import", 'ARGUMENTS = "RUN [RUN2]"')
    source += (
        "\n\ndef main(*runs, against='', dry_run=''):\n    print(runs, against)\n    return 4\n"
    )
    (verbs / "verbs" / "fake.py").write_text(source)
    assert cli.main(["fake", "a/b", "--against", "x", "c"]) == 4
    assert capsys.readouterr().out == "('a/b', 'c') x\n"
    assert cli.main(["fake", "--help"]) == 0
    out = capsys.readouterr().out
    assert "jaxdeep fake RUN [RUN2]" in out and "--against=..." in out and "--workdir" not in out
    for flag in ("--config=x", "--workdir=x", "--config.a=1"):
        assert cli.main(["fake", "a", flag]) == 2
        assert "fake has no flag" in capsys.readouterr().err
    sys.modules.pop("jaxdeep.run.fake")


@pytest.mark.parametrize(
    ("fail", "status", "says"),
    [
        ("__import__('jaxdeep').errors.DataError('no corpus')", 2, "error: no corpus\n"),
        ("KeyboardInterrupt()", 130, "interrupted\n"),
        ("MemoryError()", 1, "ran out of memory"),
        (f"OSError({errno.ENOSPC}, 'No space', 'runs/x')", 1, "the disk is full at runs/x"),
    ],
)
def test_failures_for_people_have_a_message_and_a_status(verbs, capsys, fail, status, says):
    assert cli.main(["runs", "--config=configs/one.py", f"--fail={fail}"]) == status
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_only_a_verb_that_can_go_on_says_so(verbs, capsys, monkeypatch):
    monkeypatch.setattr(cli, "RESUMED", ("runs",))
    assert cli.main(["runs", "--config=configs/one.py", "--fail=KeyboardInterrupt()"]) == 130
    said = capsys.readouterr().err
    assert (
        said
        == "interrupted; the same command continues from the last checkpoint, if there is one\n"
    )


def test_a_bug_keeps_its_traceback(verbs):
    for fail, kind in (("ValueError('bug')", ValueError), ("OSError(2, 'gone')", OSError)):
        with pytest.raises(kind):
            cli.main(["runs", "--config=configs/one.py", f"--fail={fail}"])


def test_the_command_is_there_as_a_module_and_answers_without_jax():
    program = (
        "import runpy, sys; sys.modules['jax'] = None; sys.argv = ['jaxdeep', '--version']\n"
        "runpy.run_module('jaxdeep', run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=configs.ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, jaxdeep.__version__)


def test_help_lists_the_keys_of_a_verb_with_its_configuration(capsys):
    assert cli.main(["grpo", "--help=config.optim"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr must be set    float, above 0\n" in out and "mesh.data" not in out
    config = ["--config=configs/search/grpo.py", "--config.optim.clip=0.5"]
    assert cli.main(["grpo", "--help=config", *config]) == 0
    out = capsys.readouterr().out
    assert "optim.clip = 0.5 (default 1.0)    float, at least 0\n" in out
    assert "env with env.taskset=search" in out and "taskset=maze" not in out
    assert cli.main(["quickstart", "--help=config.grpo.env"]) == 0
    assert "grpo.env with grpo.env.taskset=facts" in capsys.readouterr().out
    assert cli.main(["view", "--help=metrics"]) == 0
    assert "train/entropy (nats a token)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["view", "--help=config"], "view has help on metrics"),
        (["grpo", "--help=keys"], "grpo has help on config, config.SECTION and metrics"),
        (["grpo", "--help=config.optim.lrr"], 'no such key. Did you mean "optim.lr"?'),
    ],
)
def test_help_on_nothing_is_refused(argv, says, capsys):
    assert cli.main(argv) == 2
    assert says in capsys.readouterr().err


def test_the_help_says_what_each_status_means(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for status, meaning in cli.STATUSES.items():
        assert f"  {status:<4}{meaning}\n" in f"{out}\n"


@pytest.mark.parametrize("name", cli.VERBS)
def test_an_example_names_files_that_are_there_or_says_what_it_needs(name):
    verb = cli.describe(name)
    words = [word.partition("=")[2] or word for word in shlex.split(verb.example)[4:]]
    paths = [word for word in words if "/" in word and not word.startswith("configs/")]
    assert verb.needs or not [path for path in paths if not path.startswith("runs/")]
    assert verb.needs or "runs/" not in verb.example.replace("--workdir=runs/", "")


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_describes_itself_with_an_example_that_works(name):
    verb = cli.describe(name)
    assert verb.doc.splitlines()[0].endswith(".")
    python, m, package, first, *rest = shlex.split(verb.example)
    assert (python, m, package, first) == ("python", "-m", "jaxdeep", name)
    if verb.arguments:
        words, flags = cli.split(verb, rest)
        assert words and not flags
        return
    command = cli.parse(verb, rest)
    assert command.config or command.run
    if command.config:
        configs.load(command.config, command.overrides)


TAKES_RUN = RUNS.replace('FLAGS = {"fail"', 'RUN = "optional"\nFLAGS = {"fail"').replace(
    "config.train.steps", "config.to_dict()"
)


@pytest.mark.parametrize(
    ("words", "where", "overrides"),
    [
        (["a/b"], ("", "a/b", "runs/runs-b"), ()),
        (["gs://bucket/b/"], ("", "gs://bucket/b/", "runs/runs-b"), ()),
        (["a/b", "--best"], ("", "a/b", "runs/runs-b"), ("--config.train.best=True",)),
        (
            ["a/b", "--config=c.py", "--config.x=1", "--best"],
            ("c.py", "a/b", "runs/runs-b"),
            ("--config.train.start=a/b", "--config.x=1", "--config.train.best=True"),
        ),
        (["--config=c.py", "--workdir=w"], ("c.py", "", "w"), ()),
    ],
)
def test_a_run_may_take_the_place_of_a_configuration(verbs, words, where, overrides):
    (verbs / "verbs" / "runs.py").write_text(TAKES_RUN)
    command = cli.parse(cli.describe("runs"), words)
    assert (command.config, command.run, str(command.workdir)) == where
    assert command.overrides == overrides


def test_a_verb_without_run_or_configuration_names_both(verbs, capsys):
    (verbs / "verbs" / "runs.py").write_text(TAKES_RUN)
    assert cli.main(["runs"]) == 2
    assert "runs needs the folder of a run, or --config=FILE.py" in capsys.readouterr().err
    assert cli.main(["runs", "a", "b"]) == 2
    assert "'b' is not a flag" in capsys.readouterr().err
    assert cli.main(["runs", "a", "--best=yes"]) == 2
    assert "--best=yes: write --best alone" in capsys.readouterr().err
    assert cli.main(["runs", "--help"]) == 0
    said = capsys.readouterr().out
    assert "jaxdeep runs RUN" in said and "--best  " in said


def test_a_workdir_that_cannot_be_is_refused_before_the_verb_begins(verbs, capsys):
    (verbs / "file").write_text("x")
    for place, says in (("file", "is a file"), ("file/run", "lies below")):
        assert cli.main(["runs", "--config=configs/one.py", f"--workdir={place}"]) == 2
        said = capsys.readouterr()
        assert f"--workdir={place} {says}" in said.err and said.out == ""


def test_a_workdir_may_begin_with_a_tilde(verbs, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    command = cli.parse(cli.describe("runs"), ["--config=~/c.py", "--workdir=~/runs/a"])
    assert str(command.workdir) == "/home/me/runs/a"


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself(name, capsys):
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example:" in said and ("Flags:" in said) == ("  --" in said)
