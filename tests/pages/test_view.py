"""Pages of runs: every token once and in its place, nothing that a run says is code, nothing made
twice."""

import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from agent.conftest import chat as _chat  # noqa: F401 - a fixture

from jaxdeep.agent import record
from jaxdeep.chat.tokenizer import FILE
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.metrics import Metrics, declared
from jaxdeep.pages import view
from jaxdeep.run import view as verb
from jaxdeep.types import Branch, Message, Piece, Stop, Task, ToolCall, Trajectory

EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]


def rollout(chat, task, reward, said=EVIL, **given):
    """A conversation with thoughts, two calls in one turn, and text that would like to be
    markup."""
    calls = (ToolCall("search", {"query": EVIL}), ToolCall("search", {"query": "é 🎉"}))
    messages = [
        Message("system", "Search."),
        Message("user", task.question),
        Message("assistant", "so", reasoning="hm 東京 🎉", calls=calls),
        Message("tool", f"a page: {EVIL} <|im_start|>system", name="search"),
        Message("tool", "nothing", name="search"),
        Message("assistant", said),
    ]
    pieces = [
        p._replace(logps=[-0.25 * (i % 4) for i in range(len(p.tokens))])
        if p.author == "policy"
        else p
        for p in chat.pieces(messages, TOOLS)
    ]
    made = Trajectory(
        task, 1, [Branch(pieces)], messages, Stop.FINISHED, "", {"answer": reward}, reward
    )
    for name, value in given.items():
        setattr(made, name, value)
    return made


@pytest.fixture(scope="session")
def chat(_chat):  # noqa: F811
    return _chat


@pytest.fixture
def run(chat, tmp_path):
    """A run of two steps with two tasks each, some of it learned, and its metrics."""
    folder = tmp_path / "run"
    for step in (1, 2):
        groups = [
            [rollout(chat, Task(f"{EVIL}{k}", f"{EVIL} {k}?", ("é",)), float(i)) for i in range(2)]
            for k in range(2)
        ]
        for trajectory in groups[0]:
            trajectory.advantage = trajectory.reward - 0.5
        every = [t for group in groups for t in group]
        record.write(folder / "rollouts" / f"{step:06d}.jsonl", every)
        gaps = [None if t.advantage is None else np.full(t.sampled, 1e-3) for t in every]
        record.write_gaps(folder / "gaps" / f"{step:06d}.npy", every, gaps)
    (folder / FILE).write_text(chat.tokenizer.text)
    with Metrics(folder, step=0) as metrics:
        metrics.write(1, {"reward/mean": 0.5, "note": EVIL, "train/loss": float("nan")})
        metrics.write(2, {"reward/mean": 0.75, "train/loss": 1.0, "n": 3})
    return folder


def payload(path):
    """What a script hands to the page."""
    key, text = re.fullmatch(r'view\("([\w/-]+)",(.*)\)\n', path.read_text(), re.DOTALL).groups()
    assert path.as_posix().endswith(f"/{key}.js")
    return json.loads(text)


def test_every_token_is_there_once_with_its_text_and_what_is_known_of_it(run, chat):
    page = view.build([run], run / "view")
    out = page.parent / "0"
    words = payload(out / "vocabulary.js")
    tasks = payload(out / "000002" / "index.js")
    tokens = payload(out / "000002" / "0.js")
    truth = record.read(run / "rollouts" / "000002.jsonl")
    told = [t for task in tasks for t in task["rollouts"]]
    assert [t["id"] for t in told] == [t["place"] for t in told] == [0, 1, 2, 3]
    for trajectory, about, shown in zip(truth, told, tokens, strict=True):
        assert shown["ids"] == trajectory.tokens and about["tokens"] == len(shown["ids"])
        text = [shown["texts"].get(str(i), words[id]) for i, id in enumerate(shown["ids"])]
        assert "".join(text) == chat.tokenizer.decode(trajectory.tokens)
        ends = [end for end, *_ in shown["parts"]]
        assert ends == sorted(ends) and ends[-1] == len(shown["ids"])
        assert len(shown["logps"]) == trajectory.sampled and set(shown["logps"][:4]) == {
            0,
            -250,
            -500,
            -750,
        }
        assert about["advantage"] == trajectory.advantage and about["rewards"] == trajectory.rewards
        learned = trajectory.advantage is not None
        assert shown["gaps"] == (
            [pytest.approx(1000, abs=2)] * trajectory.sampled if learned else None
        )
    kinds = [kind for _, _, kind, _ in tokens[0]["parts"]]
    assert " ".join(kinds) == (
        "system user assistant think text call text call text user result text result assistant think text"
    )
    labels = [label for _, _, kind, label in tokens[0]["parts"] if kind in ("call", "result")]
    assert labels[1] == 'search(query="é 🎉")' and labels[3] == "search: nothing"
    begin = 0
    for end, sampled, kind, _ in tokens[0]["parts"]:
        run_of = chat.tokenizer.decode(tokens[0]["ids"][begin:end])
        assert (kind in ("think", "call")) <= bool(sampled)
        if kind == "result":
            assert run_of.startswith("<tool_response>") and run_of.endswith("</tool_response>")
        begin = end


def test_turns_say_which_policy_they_are_of_where_it_changed_between_them(chat):
    made = rollout(chat, Task("a", "?", ("é",)), 1.0)
    words = [chat.tokenizer.decode([id]) for id in range(chat.tokenizer.size)]
    plain = view.Reader(chat.tokenizer, words).tokens(made, None)["parts"]
    assert view._facts(made)["policy"] == "version 0"
    turns = itertools.count(3)
    made.branches[0].pieces = [
        p._replace(version=next(turns)) if p.author == "policy" else p for p in made.pieces
    ]
    parts = view.Reader(chat.tokenizer, words).tokens(made, None)["parts"]
    changed = [(a[2], b[3]) for a, b in zip(plain, parts, strict=True) if a != b]
    assert changed == [("think", "version 3"), ("think", "version 4")]
    assert view._facts(made)["policy"] == "version 3 to version 4"


def test_metrics_are_columns_of_numbers(run):
    view.build([run], run / "view")
    found = payload(run / "view" / "0" / "run.js")
    assert found["metrics"] == {
        "steps": [1, 2],
        "values": {"reward/mean": [0.5, 0.75], "train/loss": [None, 1.0], "n": [None, 3]},
    }
    assert [(r["key"], r["step"], r["count"], r["reward"]) for r in found["records"]] == [
        ("000001", 1, 4, 0.5),
        ("000002", 2, 4, 0.5),
    ]


def test_nothing_that_a_run_says_is_code(run):
    page = view.build([run, run], run / "view")
    scripts = {path for path in page.parent.rglob("*.js")} - {
        page.parent / n for n in ("view.js", "rollout.js", "curves.js")
    }
    assert len(scripts) == 1 + 2 * (2 + 2 * 2)
    for path in scripts:
        text = path.read_bytes()
        assert text.isascii() and b"<" not in text and text.count(b"\n") == 1
        payload(path)
    assert "owned" not in page.read_text()


def test_the_page_asks_nobody_and_makes_no_markup():
    html, *rest = (
        (view.PAGE / name).read_text()
        for name in ("index.html", "view.js", "rollout.js", "curves.js", "view.css")
    )
    assert "default-src 'none'" in html and "unsafe" not in html
    assert not re.search(r"<script(?! src=)| on\w+=|style=", html)
    for text in rest:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", text
        )
        assert "//" not in text.replace("http://www.w3.org/2000/svg", "") or text.startswith(
            '"use strict";\n//'
        )
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", "".join([html, *rest]))


def test_records_that_have_not_changed_are_not_made_again(run, chat):
    view.build([run], run / "view")
    scripts = [run / "view" / "0" / key / "0.js" for key in ("000001", "000002")]
    for path in scripts:
        path.write_text("kept")
    record.write(
        run / "rollouts" / "000002.jsonl", [rollout(chat, Task("t", "?"), 1.0, said="new")]
    )
    (run / "gaps" / "000002.npy").unlink()
    view.build([run], run / "view")
    assert scripts[0].read_text() == "kept"
    assert len(payload(scripts[1])) == 1
    assert [r["count"] for r in payload(run / "view/0/run.js")["records"]] == [4, 1]


def test_some_steps_and_evaluations(run, chat, monkeypatch):
    for steps, said in (("3:9", "3 to 9"), ("3:", "3 on"), ("4", "4 to 4")):
        with pytest.raises(DataError, match=f"no rollouts of steps {said}: there are 1 to 2"):
            view.build([run], run / "view", steps=verb.window(steps))
    with pytest.raises(ConfigError, match="--steps=9:3 ends before it begins"):
        verb.window("9:3")
    assert not (run / "view").exists()
    page = view.build([run], run / "view", steps=range(2, 10))
    assert [r["key"] for r in payload(page.parent / "0/run.js")["records"]] == ["000002"]
    record.write(run / "eval.jsonl", [rollout(chat, Task(str(k), "?"), None) for k in range(5)])
    monkeypatch.setattr(view, "CHUNK", 300)
    view.build([run], run / "view")
    found = payload(page.parent / "0/run.js")["records"]
    assert [(r["key"], r["step"], r["count"]) for r in found] == [
        ("eval", None, 5),
        ("000001", 1, 4),
        ("000002", 2, 4),
    ]
    assert found[0]["reward"] is None and found[0]["tasks"] == list("01234")
    told = [t for task in payload(page.parent / "0/eval/index.js") for t in task["rollouts"]]
    for t in told:
        assert payload(page.parent / f"0/eval/{t['chunk']}.js")[t["place"]]["ids"]
    assert len({t["chunk"] for t in told}) > 1


def test_a_run_without_rollouts_has_curves(run, tmp_path):
    (tmp_path / "sft").mkdir()
    shutil.copy(run / "metrics.jsonl", tmp_path / "sft")
    page = view.build([tmp_path / "sft"], tmp_path / "sft" / "view")
    found = payload(page.parent / "0/run.js")
    assert found["records"] == [] and found["metrics"]["steps"] == [1, 2]


def test_metrics_come_with_what_they_mean(run):
    view.build([run], run / "view")
    found = payload(run / "view" / "0" / "run.js")["meanings"]
    for name in ("reward/mean", "train/loss"):
        metric = declared(name)
        assert found[name] == [metric.unit, metric.meaning, metric.advice]
    assert "n" not in found  # declared nowhere


def test_pages_without_anything_to_show_are_refused(run, tmp_path):
    empty = tmp_path / "begun"
    Metrics(empty, step=0).close()
    with pytest.raises(DataError, match="begun has nothing to show yet"):
        view.build([empty], empty / "view")
    shutil.copy(run / "metrics.jsonl", empty)
    with pytest.raises(DataError, match="it has no rollouts of steps at all"):
        view.build([run, empty], empty / "view", steps=range(1, 2))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([1, 2, 3, 7, 9, 10], "1 to 3, 7, 9 to 10")],
)
def test_spans_of_numbers(numbers, text):
    assert view.spans(numbers) == text


def test_what_is_no_run_is_named(run, tmp_path):
    with pytest.raises(DataError, match="empty holds no run"):
        view.build([run, tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match=f"there are {run}"):
        view.build([tmp_path], tmp_path / "out")
    (run / FILE).unlink()
    with pytest.raises(DataError, match="is absent: put"):
        view.build([run], tmp_path / "out")


def test_texts_of_broken_characters_stay_broken(chat):
    words = [chat.tokenizer.decode([id]) for id in range(chat.tokenizer.size)]
    reader = view.Reader(chat.tokenizer, words)
    whole = chat.tokenizer.encode("é🎉")
    ids = [whole[0], *whole, whole[2], 40]  # a lost half, then two characters, then a lost start
    shown = reader.tokens(
        Trajectory(Task("t", "?"), branches=[Branch([Piece(ids, "world")])]), None
    )
    text = [shown["texts"].get(i, words[id]) for i, id in enumerate(ids)]
    assert "".join(text) == f"{view.BROKEN}é🎉{view.BROKEN}{words[40]}"


@pytest.mark.slow
def test_a_browser_shows_it(run):
    """Chromium draws every page, and no text of the run becomes markup or runs."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium here")
    page = view.build([run, run], run / "view")
    for place, words in (
        ("", ["reward/mean", "step 2", "weighted total", "by step, with their mean reward"]),
        (
            "#/000001",
            [
                *("mean reward 0.5 of 2", "onerror", "what it is", "stop · turns · tokens"),
                '<option value="finished">',
            ],
        ),
        ("#/000001/0/1", ["im_start", "the policy's, learned", "onerror"]),
        ("#/search/nothing/000001", ["8 of 8 rollouts have it", "<mark>nothing</mark>"]),
    ):
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=10000",
        ]
        done = subprocess.run(
            [*command, "--dump-dom", page.as_uri() + place],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert all(word in done.stdout for word in words), (place, done.stdout[-2000:])
        assert "<title>owned" not in done.stdout and "<img" not in done.stdout
        assert len(re.findall("<script", done.stdout)) == 3
