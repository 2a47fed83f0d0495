"""The README pages: every command, example, key and link in them is right.

Shell blocks are run by bash with stand-ins for python, make, git and the commands of clouds, which
write down what they are called with; each call is then checked against the verb, the configuration
and the Makefile that it names. Python blocks whose first line is `# FILE.py` are files; the ones
that show how to add something are run.
"""

import ast
import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import typing

import pytest
from jobs.scripts import CLOUD, lines, stand_in

import jaxdeep.run
from jaxdeep.agent import rollout
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.errors import ConfigError
from jaxdeep.rl import algorithms
from jaxdeep.run import cli
from jaxdeep.setup import builders, past, sources, tasksets, weights
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun
from jaxdeep.setup.sections import ModelConfig, load_run
from jaxdeep.types import Message, Stop, ToolCall, Trajectory

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("jaxdeep", "configs", "launch", "tests", "notebooks")
FRONT = ROOT / "README.md"
PAGES = [FRONT, *sorted(page for name in FOLDERS for page in (ROOT / name).rglob("README.md"))]
HOW_TO = ROOT / "jaxdeep" / "README.md"
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
LANGUAGES = {"sh", "python", "text"}
MADE = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
RUNS = (SftRun, GrpoRun, EvalRun)
SECTIONS = {field.name for run in RUNS for field in dataclasses.fields(run)}
LIMITS = rollout.Limits(
    max_turns=4, max_calls=3, turn_tokens=99, max_tokens=2000, result_tokens=99, seconds=60.0
)


class Block(typing.NamedTuple):
    page: pathlib.Path
    number: int
    language: str
    text: str

    @property
    def file(self) -> str:
        """The name of the file that the block is, empty where it is none."""
        match = re.match(r"# (\S+\.py)\n", self.text)
        return match[1] if match else ""


def label(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path) -> list[Block]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(page, number, *parts) for number, parts in enumerate(fenced)]


def prose(page: pathlib.Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline(page: pathlib.Path) -> list[str]:
    """The code inside the sentences of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def ids(block: Block) -> str:
    return f"{label(block.page)}:{block.number}"


def example(name: str) -> Block:
    """The block of the how-to page that is the file `name`."""
    (block,) = [b for b in blocks(HOW_TO) if b.file == name]
    return block


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What a reader has who followed the pages: a checkout, the files they show, and data."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("configs", "launch", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for block in filter(lambda block: block.file, PYTHON):
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    (folder / "docs").mkdir()
    (folder / "docs" / "moon.md").write_text("# Io\n\nIo is a moon of Jupiter.\n")
    question = json.dumps({"question": "Which planet has the moon Io?", "answer": "Jupiter"})
    for name in ("train", "test", "questions"):
        (folder / f"{name}.jsonl").write_text(question + "\n")
    for name in ("python", "jaxdeep", "make", "pip", "git", *CLOUD):
        body = f"""{{ printf '%s\\x1f' {name} "$@"; printf '\\x1e'; }} >>"$RECORD" """
        stand_in(folder / ".bin", name, body)
    return folder


@pytest.fixture
def inside(workspace, monkeypatch):
    """The workspace as the current folder, from which modules are imported too."""
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(str(workspace))
    verbs = [path.stem for path in (workspace / "jaxdeep" / "run").glob("*.py")]
    monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, *verbs))
    paths = [*jaxdeep.run.__path__, str(workspace / "jaxdeep" / "run")]
    monkeypatch.setattr(jaxdeep.run, "__path__", paths)
    yield workspace
    for block in filter(lambda block: block.file, PYTHON):
        name = block.file.removesuffix(".py").replace("/", ".")
        sys.modules.pop(name, None)
        vars(jaxdeep.run).pop(name.rpartition(".")[2], None)


def calls(script: str, workspace: pathlib.Path, record: pathlib.Path) -> list[list[str]]:
    """The commands that a shell block runs, each as its words. Scripts in launch/ really run, with
    DRY=1; a recipe that one of them is given is asked what it would run."""
    environment = {"DRY": "1", "RECORD": str(record), "TMPDIR": str(record.parent)}
    environment |= {"PATH": f"{workspace / '.bin'}:{os.environ['PATH']}", "HOME": str(workspace)}

    def bash(text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            env=environment,
            cwd=workspace,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    bash(script)
    recorded = record.read_text().split("\x1e")[:-1] if record.exists() else []
    found = [call.split("\x1f")[:-1] for call in recorded]
    joined = script.replace("\\\n", " ")
    for recipe in re.findall(r"launch/recipes/\S+\.sh(?: +--\S+)*|launch/first_job\.sh", joined):
        found += lines(bash(f"bash {recipe}"))
    return found


def check(words: list[str]) -> None:
    """Fails where a command names what does not exist."""
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert set(targets) <= set(MADE), words
        for name, _, value in (word.partition("=") for word in rest if "=" in word):
            assert f"$({name})" in (ROOT / "Makefile").read_text()
            if name == "ARGS" and targets == ["quickstart"]:
                accept("quickstart", shlex.split(value))
            if name == "ARGS" and targets == ["study"]:
                has_flags(ROOT / "tests/bench/study.py", shlex.split(value))
    elif program == "jaxdeep":
        accept(rest[0], rest[1:])
    elif program == "python" and rest[:2] == ["-m", "jaxdeep"]:
        accept(rest[2], rest[3:])
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        assert all(pathlib.Path(word).exists() for word in rest[2:] if word[0] != "-"), words
    elif program == "python":
        has_flags(pathlib.Path(rest[0]), rest[1:])
    elif program == "pip":
        (extras,) = re.fullmatch(r"\.\[(.+)\]", rest[-1]).groups()
        assert set(extras.split(",")) <= set(setup_arguments()["extras_require"])
    elif program == "sbatch":
        scripts = [word for word in rest if word.endswith((".sh", ".sbatch"))]
        assert scripts and all(pathlib.Path(script).is_file() for script in scripts)
    else:
        assert program in (*CLOUD, "git"), words


def accept(name: str, words: list[str]) -> None:
    """Fails where a verb would refuse its flags, its configuration or a value in it."""
    assert name in cli.VERBS, f"{name} is not a verb"
    verb = cli.describe(name)
    if verb.arguments:
        cli.split(verb, words)
        return
    command = cli.parse(verb, words)
    if command.config:
        config = tasksets.load_config(command.config, command.overrides)
    else:  # a run that nobody has made here: one of this configuration stands for it
        grpo = tasksets.load_config("configs/search/grpo.py")
        sections = past.policy_sections(grpo.to_dict(), command.run)
        config = tasksets.override(sections, command.overrides)
    if name == "data":
        builders.load_builder(config)
    for run, section in stages(name, config):
        load_run(run, algorithms.expand(section))


def stages(verb: str, config) -> list[tuple[type, typing.Any]]:
    """The typed runs of a verb, with the configuration of each."""
    if {"sft", "grpo", "test"} <= set(config):
        from jaxdeep.run import quickstart

        test = quickstart.test_config(config, "")
        return [(SftRun, config.sft), (GrpoRun, config.grpo), (EvalRun, test)]
    if verb in ("eval", "chat") or (verb == "export" and "optim" not in config):
        return [(EvalRun, config)]
    if verb in ("sft", "grpo", "export", "plan"):
        return [(GrpoRun if "grpo" in config else SftRun, config)]
    return []


def has_flags(path: pathlib.Path, words: list[str]) -> None:
    source = path.read_text()
    for word in words:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or f'"{flag}"' in source, f"{path} has no {flag}"


def setup_arguments() -> dict[str, typing.Any]:
    """What setup.py gives to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_every_block_says_its_language():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(SHELL) > 10 and len(PYTHON) > 5


@pytest.mark.parametrize("block", SHELL, ids=ids)
def test_commands_are_accepted(block, inside, tmp_path):
    commands = calls(block.text, inside, tmp_path / "record")
    assert commands or "launch/" in block.text
    for words in commands:
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_what_a_command_reads_is_made_before_it(page, inside, tmp_path):
    """The corpus and the questions are what the page commits or the reader has; a run to start from
    is made by an earlier command of the page, or of README, which is read first."""
    made = {"runs/quickstart-quickstart", "runs/grpo"}
    for block in blocks(page):
        if block.language != "sh":
            continue
        commands = calls(block.text, inside, tmp_path / f"record-{block.number}")
        for words in commands:
            verb = words[words.index("jaxdeep") + 1 :] if "jaxdeep" in words[:3] else []
            if not verb or cli.describe(verb[0]).arguments:
                continue
            command = cli.parse(cli.describe(verb[0]), verb[1:])
            if not command.config:
                assert command.run in made, f"{command.run} is made by no earlier command"
                continue
            config = tasksets.load_config(command.config, command.overrides)
            start = config.get("train", {}).get("start", "")
            assert not start or start in made, f"{start} is made by no earlier command"
            made.add(str(command.workdir))
            env = config.get("env", {})
            if verb[0] in ("grpo", "eval", "chat") and env.get("taskset") == "search":
                for name in (env.corpus, env.questions):
                    assert pathlib.Path(name).exists(), f"{name} is made by no command"


def test_a_wrong_command_is_not_accepted(inside):
    grpo = ["python", "-m", "jaxdeep", "grpo", "--config=configs/search/grpo.py"]
    wrong = [
        ["python", "-m", "jaxdeep", "gpro"],
        [*grpo, "--agianst=x"],
        [*grpo, "--config.grpo.ahed=1"],
        [*grpo, "--config.env.corups=docs/"],
        [*grpo, "--config.grpo.group=1"],
        ["python", "-m", "jaxdeep", "grpo", "--config=configs/none.py"],
        ["python", "tests/bench/study.py", "--row=x"],
        ["make", "quickstrat"],
        ["make", "quickstart", "ARGS=--config.sed=1"],
        ["pip", "install", "-e", ".[tpus]"],
        ["sbatch", "launch/slurm/none.sbatch"],
        ["rm", "-rf", "runs"],
    ]
    for words in wrong:
        with pytest.raises((AssertionError, ConfigError)):
            check(words)
        check(grpo)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_keys_and_commands_inside_sentences_exist(page, inside):
    for code in inline(page):
        if code.startswith("make "):
            assert code.split()[1] in MADE, code
        elif code.startswith("python tests/"):
            check(shlex.split(code))
        elif code.startswith("--config.") and not code.startswith("--config.KEY"):
            assert overridden(code), f"{code} is accepted by no configuration"
        elif key := re.fullmatch(r"(\w+)((?:\.\w+)+)(?:=\S*)?", code):
            section, names = key[1], key[2].split(".")[1:]
            if section in SECTIONS and names[-1] not in ("py", "json"):
                assert has_key(section, names), code


def overridden(flag: str) -> bool:
    """Whether one of the configurations takes the override."""
    for verb, path in (("sft", "sft"), ("grpo", "grpo"), ("eval", "eval"), ("quickstart",) * 2):
        with contextlib.suppress(ConfigError):
            accept(verb, [f"--config=configs/search/{path}.py", flag])
            return True
    return False


def has_key(section: str, names: list[str]) -> bool:
    """Whether a section of one of the typed runs has the key, `names` being its parts."""
    if section in ("env", "dev"):
        shipped = tasksets.BUILT_IN.values()
        settings = [tasksets.imported(name, "env.taskset") for name in shipped]
        return names[0] in tasksets.SHARED or any(has_field(one, names) for one in settings)
    hints = [typing.get_type_hints(run).get(section) for run in RUNS]
    return any(has_field(hint, names) for hint in hints if hint)


def has_field(hint: typing.Any, names: list[str]) -> bool:
    if not names:
        return True
    classes = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
    if not classes:
        return typing.get_origin(hint) is not None  # a mapping takes any name
    fields = typing.get_type_hints(classes[0])
    return names[0] in fields and has_field(fields[names[0]], names[1:])


@pytest.mark.parametrize("path", CONFIGS, ids=label)
def test_a_configuration_says_how_it_is_run(path, inside):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    commands = re.findall(r"^ {4}((?:python|make) .+)$", doc, re.MULTILINE)
    assert any(f"--config={label(path)}" in command for command in commands)
    for command in commands:
        check(shlex.split(command))
    assert all(word in doc for word in ("Hardware: ", "Time", "esult"))
    assert label(path).removeprefix("configs/") in (ROOT / "configs/README.md").read_text()


@pytest.mark.parametrize("block", PYTHON, ids=ids)
def test_examples_compile_and_their_imports_exist(block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name.partition(".")[0]), alias.name
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(("jaxdeep", "configs")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(submodule)
        elif isinstance(node, ast.ImportFrom):
            assert importlib.util.find_spec(node.module.partition(".")[0]), node.module


def configured(marker: str, workspace: pathlib.Path, record: pathlib.Path):
    """The configuration of the command of the how-to page that mentions `marker`."""
    (block,) = [b for b in blocks(HOW_TO) if b.language == "sh" and marker in b.text]
    (words,) = calls(block.text, workspace, record)
    command = cli.parse(cli.describe(words[3]), words[4:])
    return tasksets.load_config(command.config, command.overrides)


def play(taskset, turns: list[Message]) -> Trajectory:
    """A scored rollout of the first task in which a script plays the model's part."""
    chat = weights.chat_of(ModelConfig("tiny", thinking="none"))
    policy = ScriptedPolicy(chat, turns)
    work = rollout.group(taskset, taskset[0], policy, chat, size=1, limits=LIMITS, seed=0)
    (played,) = asyncio.run(work)
    asyncio.run(rollout.score(taskset, played))
    assert played.stop is Stop.FINISHED and not played.failure
    return played


def call(name: str, **arguments: typing.Any) -> Message:
    return Message("assistant", calls=(ToolCall(name, arguments),))


def test_the_tool_of_the_example_is_called(inside, tmp_path):
    config = configured("multiply.py", inside, tmp_path / "record")
    taskset = tasksets.EnvConfig.build(config.env).load()
    turns = [call("multiply", a=6, b="7"), call("search", query="Io")]
    played = play(taskset, [*turns, Message("assistant", "<answer>Jupiter</answer>")])
    results = [message.content for message in played.messages if message.role == "tool"]
    assert results[0] == "42.0" and "Io is a moon of Jupiter" in results[1]
    assert played.rewards["answer"] == 1.0


def test_the_environment_of_the_example_is_played(inside, tmp_path, capsys):
    config = configured("guess.py:Guess", inside, tmp_path / "record")
    assert load_run(GrpoRun, algorithms.expand(config)).env.settings.largest == 20
    taskset = tasksets.EnvConfig.build(config.env).load()
    assert len(taskset) == 20
    best = max(weight for weight, _ in taskset.rewards.values())
    for task in (taskset[0], taskset[19]):
        gold = Trajectory(task, messages=taskset.gold(task), stop=Stop.FINISHED)
        asyncio.run(rollout.score(taskset, gold))
        assert gold.reward == best
    runpy.run_path("try_guess.py", run_name="__main__")
    shown = capsys.readouterr().out
    assert "tool: too low\n" in shown and shown.endswith("reward 1.0\n")


def test_an_environment_and_its_tasks_are_short():
    tree = ast.parse(example("guess.py").text)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            source = ast.get_source_segment(example("guess.py").text, node)
            assert len([line for line in source.splitlines() if line.strip()]) <= 15, node.name


def test_the_reward_of_the_example_counts(inside, tmp_path):
    config = configured("brevity.py:brief", inside, tmp_path / "record")
    taskset = tasksets.EnvConfig.build(config.env).load()
    weights_of = {name: weight for name, (weight, _) in taskset.rewards.items()}
    assert weights_of == {"answer": 1.0, "format": 0.1, "brief": 0.1}
    turns = [call("search", query="Io"), call("search", query="moon")]
    played = play(taskset, [*turns, Message("assistant", "<answer>Jupiter</answer>")])
    assert played.rewards["brief"] == 0.5 and played.reward == pytest.approx(1.15)


def test_the_verb_of_the_example_runs(inside, tmp_path, capsys):
    (block,) = [b for b in SHELL if "-m jaxdeep tasks" in b.text]
    (words,) = calls(block.text, inside, tmp_path / "record")
    assert cli.main(words[3:]) == 0
    assert "Which planet has the moon Io?" in capsys.readouterr().out
    assert cli.main(["tasks", "--help"]) == 0
    assert "Print the first tasks of a task set" in capsys.readouterr().out


# Whatever a page lists, it lists whole.


def test_the_lists_of_the_pages_are_complete():
    package = ROOT / "jaxdeep"
    parts = {p.name for p in package.iterdir() if (p / "__init__.py").exists()} | {"assets"}
    files = {p.name for p in package.glob("*.py") if not p.name.startswith("__")}
    text = {label(page): page.read_text() for page in PAGES}
    assert missing(text["jaxdeep/README.md"], (f"| `{part}/`" for part in parts)) == []
    assert missing(text["jaxdeep/README.md"], (f"`{file}`" for file in files)) == []
    assert missing(text["README.md"], (f"| `{verb}` |" for verb in cli.VERBS)) == []
    names = (f"| `{name}` |" for name in algorithms.PRESETS)
    assert missing(text["jaxdeep/rl/README.md"], names) == []
    names = (f"| `{name}` |" for name in tasksets.BUILT_IN)
    assert missing(text["jaxdeep/envs/README.md"], names) == []
    kinds = (f"`{kind}:" for kind in sources.KINDS)
    assert missing(text["jaxdeep/data/README.md"], kinds) == []
    books = (f"({path.name})" for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert missing(text["notebooks/README.md"], books) == []
    targets = (f"# make {target} " for target in MADE)
    assert missing((ROOT / "Makefile").read_text(), targets) == []


def missing(text: str, names: typing.Iterable[str]) -> list[str]:
    return sorted(name for name in names if name not in text)


# Links.


def links(page: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """The files and anchors that a page links to, without the links that leave the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    parts = [target.partition("#") for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, slug) for path, _, slug in parts]


def slugs(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page):
    for path, slug in links(page):
        assert path.is_relative_to(ROOT) and path.exists(), path
        assert not slug or slug in slugs(path), f"{label(path)}#{slug}"


def test_every_page_is_linked_from_another():
    linked = {path for page in PAGES for path, _ in links(page) if path != page}
    assert set(PAGES) - linked <= {FRONT}


def test_the_first_page_is_one_page():
    assert len(FRONT.read_text().splitlines()) <= 150


def test_the_description_of_the_package_has_no_links_into_the_repository():
    text = setup_arguments()["long_description"]
    assert text.startswith("# jaxdeep\n") and len(text) > 0.8 * len(FRONT.read_text())
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link] == []
