"""Verbs from Python: as the command, with errors that are raised, inside a notebook's event loop
too."""

import asyncio
import json

import pytest
from ml_collections import ConfigDict
from run import small

import jaxdeep
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.run import cli
from jaxdeep.workdir import Workdir

VERB = '''"""Writes down what it was given."""

import asyncio

DEFAULT_CONFIG = None
RUN = "optional"
EXAMPLE = "python -m jaxdeep told --config=configs/one.py"
FLAGS = {"dry-run": "print and stop", "status": "what to return"}


def main(config, workdir, dry_run="", status="0"):
    async def work():
        workdir.mkdir()
        (workdir / "config.json").write_text(f"[{config.train.steps}, {dry_run!r}]")

    asyncio.run(work())
    return int(status)
'''


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A verb `told`, and the path of a configuration."""
    (tmp_path / "verbs").mkdir()
    (tmp_path / "verbs" / "told.py").write_text(VERB)
    monkeypatch.setattr(jaxdeep.run, "__path__", [*jaxdeep.run.__path__, str(tmp_path / "verbs")])
    monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, "told"))
    yield small.config(tmp_path, "sft", steps=3)
    vars(jaxdeep.run).pop("told", None)


def test_a_verb_is_given_what_the_command_gives_it(told, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("of a run")  # not the one that is meant
    monkeypatch.chdir(tmp_path / "here")
    config = jaxdeep.load_config(told, "train.steps=7")
    assert isinstance(config, ConfigDict) and config.train.steps == 7
    run = jaxdeep.run_verb("told", config, tmp_path / "a", dry_run="1")
    assert run == Workdir(tmp_path / "a")
    assert run.config.read_text() == "[7, '1']"
    config.train.steps = 8
    assert jaxdeep.run_verb("told", config, str(tmp_path / "b")).config.read_text() == "[8, '']"
    assert jaxdeep.run_verb("told", told, tmp_path / "c").config.read_text() == "[3, '']"


def test_inside_an_event_loop_as_in_a_notebook(told, tmp_path):
    async def cell():
        run = jaxdeep.run_verb("told", told, tmp_path / "a")
        await asyncio.sleep(0)  # the loop goes on
        return json.loads(run.config.read_text().replace("'", '"')), asyncio.get_running_loop()

    async def both():
        found, loop = await cell()
        assert loop is asyncio.get_running_loop()
        return found

    assert asyncio.run(both()) == [3, ""]


@pytest.mark.parametrize(
    ("verb", "flags", "error", "says"),
    [
        ("tell", {}, ConfigError, "'tell' is not a verb. Did you mean \"told\"?"),
        ("told", {"dry": 1}, ConfigError, 'told has no flag --dry. Did you mean "dry-run"?'),
        ("told", {"status": 2}, JaxdeepError, "told ended with status 2"),
        ("view", {}, ConfigError, "view takes RUN"),
    ],
)
def test_what_is_wrong_is_raised(told, tmp_path, verb, flags, error, says):
    with pytest.raises(error) as raised:
        jaxdeep.run_verb(verb, told, tmp_path / "a", **flags)
    assert says in str(raised.value)
    with pytest.raises(ConfigError, match=r"none\.py does not exist"):
        jaxdeep.run_verb("told", "none.py", tmp_path / "b")
