"""`jaxdeep ask` with a script in the place of a model."""

import contextlib
import json

import pytest
from envs.research import world

from jaxdeep.agent import record
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.envs.research import readers
from jaxdeep.run import ask, cli
from jaxdeep.setup import weights
from jaxdeep.setup.policy import OpenPolicy
from jaxdeep.setup.sections import ModelConfig
from jaxdeep.types import Message, Stop, ToolCall

FILES = {"report.json", "report.md", "report.html", "trajectory.jsonl", "sources", "config.json"}


@pytest.fixture
def command(tmp_path):
    rows = ({"title": t, "text": " ".join(facts)} for t, facts in world.PASSAGES.items())
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    question = json.dumps({"question": world.QUESTION, "answer": world.ANSWER})
    (tmp_path / "questions.jsonl").write_text(question)
    return [
        "ask",
        "--config=configs/research/eval.py",
        f"--config.env.corpus={tmp_path / 'corpus.jsonl'}",
        f"--config.env.questions={tmp_path / 'questions.jsonl'}",
        f"--workdir={tmp_path / 'ask'}",
    ]


@pytest.fixture
def plays(monkeypatch):
    """Makes a script the policy."""

    def play(*turns):
        chat = weights.chat_of(ModelConfig("tiny", thinking="none"))

        @contextlib.contextmanager
        def opened(run, name):
            yield OpenPolicy(chat, ScriptedPolicy(chat, turns))

        monkeypatch.setattr(ask, "open_policy", opened)

    return play


def search(*queries):
    return Message("assistant", calls=tuple(ToolCall("search", {"query": q}) for q in queries))


def test_a_question_becomes_a_report(command, plays, tmp_path, capsys):
    plays(
        search("population 920,000"),
        search("mayor river Pedieos"),
        search("20 countries"),
        Message("assistant", f"<answer>{world.GOLD}</answer>"),
    )
    assert cli.main([*command, f"--question={world.QUESTION}"]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "ask"
    assert said.startswith("Euro\n") and "4 exact" in said and str(out / "report.html") in said
    assert {path.name for path in out.iterdir()} >= FILES
    (from_json,), (from_md,) = readers.read(out / "report.json"), readers.read(out / "report.md")
    assert from_json.counts == from_md.counts == {"exact": 4}
    assert from_json.question == world.QUESTION and from_json.answer == world.GOLD
    (played,) = record.read(out / "trajectory.jsonl")
    assert played.stop is Stop.FINISHED
    (again,) = readers.read(out / "trajectory.jsonl")
    assert again.counts == {"exact": 4} and again.question == world.QUESTION
    for name in ("report.json", "report.md", "trajectory.jsonl"):
        assert cli.main(["check", str(out / name), f"--sources={out / 'sources'}"]) == 0
    assert world.QUESTION in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ('<answer>**Euro** <cite id="S7.1">of nobody</cite></answer>', "1 unknown_source"),
        ("no answer at all", "no answer (finished)"),
        ("<answer>**Euro** is", "the report was cut"),
    ],
)
def test_what_went_wrong_is_told(command, plays, tmp_path, capsys, turn, said):
    plays(Message("assistant", turn))
    (tmp_path / "ask" / "sources").mkdir(parents=True)
    (tmp_path / "ask" / "sources" / "S9.txt").write_text("of an older question")
    assert cli.main([*command, "--question=Which?"]) == 0
    assert said in capsys.readouterr().out
    assert list((tmp_path / "ask" / "sources").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --question"),
        (["--question= "], "needs --question"),
        (["--question=q", "--temperature=hot"], "--temperature=hot"),
        (["--question=q", "--seed=1.5"], "--seed=1.5"),
        (["--question=q", "--config.env.taskset=search"], "has no source_tools"),
    ],
)
def test_what_cannot_be_asked(command, words, message, capsys):
    assert cli.main([*command, *words]) == 2
    assert message in capsys.readouterr().err
