"""The section `data`: what it names, what it refuses, and what an SFT run says about its rows."""

import functools
import json
import re

import jax
import pytest
from run import small

from jaxdeep import config as configs
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.metrics import read_metrics
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rl.objective import Kl
from jaxdeep.run import cli
from jaxdeep.setup import runs, weights
from jaxdeep.setup import sources as rows

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}]}
LONG = {"messages": GOOD["messages"] + [{"role": "user", "content": "e " * 300}] + GOOD["messages"]}
MUTE = {"messages": GOOD["messages"][:1]}
BROKEN = {"messages": [{"role": "robot", "content": "a"}]}


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer.load(ASSETS / "tiny"), "none")


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "talks.jsonl"
    some = [GOOD, LONG, MUTE, BROKEN] * 6
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.fixture
def one_device(monkeypatch):
    """A mesh of one device: compiled sooner, and what is tested here does not depend on it."""
    make = functools.partial(meshes.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", make)


def data(**settings):
    return configs.build(rows.DataConfig, settings, "data")


def test_sources_are_named_by_key_by_name_or_by_file(talks):
    assert list(data(source="jsonl:a/b.jsonl").named) == ["b"]
    mapping = data(sources={"x": {"source": "reading:0"}, "y": {"source": "demos:1", "cap": 9}})
    assert {k: v.source for k, v in mapping.named.items()} == {"x": "reading:0", "y": "demos:1"}
    assert mapping.named["y"].cap == 9
    several = data(sources=({"source": "hf:org/set-1.5:train[:10%]:en"}, {"source": "text:a/*.md"}))
    assert list(several.named) == ["set-1.5", "text"]
    assert rows.name_of("jsonl:data/*.jsonl") == "jsonl"
    twice = ({"source": "jsonl:a/x.jsonl"}, {"source": "json:b/x.json"})
    with pytest.raises(
        ConfigError, match=r"two sources of the name 'x', jsonl:a/x\.jsonl and json:b"
    ):
        _ = data(sources=twice).named
    twice[1]["name"] = "z"
    assert list(data(sources=twice).named) == ["x", "z"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("josnl:a.jsonl", r'Did you mean "jsonl"\?.*jsonl:traces\.jsonl, json:.*hf:.*tfds:.*text:'),
        ("traces.jsonl", "is not a source.*jsonl:traces.jsonl"),
        ("jsonl:", "is not a source"),
        ("jsonl:nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("text:nowhere", "nowhere cannot be read"),
        ("hf:a:b:c:d", "too many parts"),
        ("tfds:a/b:1.0.0:train:x", "too many parts"),
        ("tfds:no_such_set:train", r"no_such_set.*array_record"),
        ("reading:x", "needs a number"),
        ("demos:0", "needs env.taskset=facts"),
    ],
)
def test_a_source_that_cannot_be_is_refused(chat, source, says):
    settings = data(source=source)
    with pytest.raises(JaxdeepError, match=f"(?s){says}"):
        rows.source_of(source, settings, chat, None, T=64)


def test_files_of_a_folder_that_are_no_text_are_counted(chat, tmp_path, capsys):
    for name, text in {"a.md": "a", "b.txt": " ", "c.pdf": "c", "d.html": "d"}.items():
        (tmp_path / name).write_text(text)
    source = f"text:{tmp_path}"
    assert len(rows.source_of(source, data(source=source), chat, None, T=64)) == 1
    said = capsys.readouterr().err
    assert "2 files that do not end in .txt or .md left out" in said and "1 blank files" in said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "set data.source or data.sources, one of them"),
        ({"source": "reading:0", "sources": ({"source": "reading:1"},)}, "one of them"),
        ({"source": "reading:0", "long": "keep"}, "data.long"),
        ({"source": "reading:0", "accumulate": 0}, "accumulate=0"),
        ({"source": "reading:0", "eval": {"rows": 0}}, "eval.rows=0"),
        ({"source": "reading:0", "learn": {"roles": ("robot",)}}, "learn.roles"),
        ({"sources": {"x": {"source": "reading:0", "wieght": 1.0}}}, "wieght"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        data(**settings)


def test_the_shipped_configuration_takes_what_it_advertises():
    flags = [
        "--config.data.learn.spans.think=0",
        "--config.data.learn.roles=assistant,tool",
        "--config.data.eval={'rows': 64, 'every': 50}",
        "--config.data.source=",
        "--config.data.sources={'web': {'source': 'jsonl:a.jsonl', 'weight': 2}}",
    ]
    section = configs.load("configs/search/sft.py", flags).data
    found = configs.build(rows.DataConfig, section, "data")
    assert found.learn.spans == {"think": 0.0} and found.learn.roles == ("assistant", "tool")
    assert found.eval == rows.EvalConfig(rows=64, every=50)
    assert found.named == {"web": rows.SourceConfig("jsonl:a.jsonl", weight=2.0)}
    plain = configs.build(rows.DataConfig, configs.load("configs/search/sft.py").data, "data")
    assert plain == rows.DataConfig(source="jsonl:traces.jsonl")


def test_a_kl_that_only_lowers_the_learning_rate_is_refused():
    with pytest.raises(ConfigError, match="use k2 or k3"):
        runs.SftConfig(Kl("k1", 0.1))
    assert runs.SftConfig(Kl("k1", 0.0))


def run(tmp_path, *flags, steps=3):
    config, workdir = small.config(tmp_path, "sft", steps=steps), tmp_path / "run"
    status = cli.main(["sft", f"--config={config}", f"--workdir={workdir}", *flags])
    return status, read_metrics(workdir / "metrics.jsonl") if (
        workdir / "metrics.jsonl"
    ).exists() else []


@pytest.mark.usefixtures("one_device")
def test_a_run_measures_rows_it_does_not_learn_and_counts_the_others(
    talks, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(small.MODEL, "max_position_embeddings", 128)  # fewer than a batch is long
    status, found = run(
        tmp_path,
        f"--config.data.source=jsonl:{talks}",
        "--config.data.bad_rows=skip",
        "--config.data.eval={'rows': 4, 'every': 2}",
        "--config.batch.length=200",
        "--config.optim.lr=0.05",
        "--config.sft.kl.coef=0.1",
        steps=5,
    )
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert [("eval/loss" in row) for row in found] == [False, True, False, True, True]
    assert found[1]["eval/loss"] > found[4]["eval/loss"] > 0 and found[4]["eval/tokens"] > 3
    assert found[0]["train/kl"] == 0 < found[-1]["train/kl"]  # a fresh adapter changes nothing
    last = {name.removeprefix("data/talks/"): value for name, value in found[-1].items()}
    assert last["rows"] == last["data/rows"] - last["data/skipped"] > 0 < last["tokens"]
    assert last["skipped"] == last["bad"] + last["empty"] + last["long"] == last["data/skipped"]
    for kind, said in (
        ("bad", "malformed"),
        ("empty", "nothing to learn"),
        ("cut", "after a turn"),
    ):
        assert bool(last[kind]) == (said in captured.out), kind
        before, _, _ = captured.err.partition("sft: 1/5")
        assert "talks: of 20 rows" in before and "data.eval: of 4 rows" in before
        assert said in before  # and not only once it is too late
    assert "a row may have 128 tokens" in before and "longer than 128 tokens and cut" in before
    assert last["bad"] and last["cut"] and last["empty"]


def test_malformed_rows_are_met_before_anything_is_loaded(talks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "load_or_init", None)
    more = f"--config.data.sources={{'a': {{'source': 'jsonl:{talks}'}}}}"
    status, found = run(tmp_path, "--config.data.source=", more)
    said = capsys.readouterr().err
    assert status == 2 and not found and "6 malformed rows" in said and "data.bad_rows=skip" in said
    assert [f"talks.jsonl:{n}:" in said for n in range(1, 25)] == [
        n % 4 == 0 and n <= 20 for n in range(1, 25)
    ]


def test_rows_of_which_none_can_be_learned_are_refused(tmp_path, capsys):
    path = tmp_path / "mute.jsonl"
    path.write_text(json.dumps(MUTE) + "\n")
    assert run(tmp_path, f"--config.data.source=jsonl:{path}")[0] == 2
    assert "mute: none of its 1 rows can be learned" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_no_number_names_its_rows_and_keeps_the_state_before(tmp_path, capsys):
    status, found = run(tmp_path, "--config.train.save_every=50", "--config.optim.lr=1e30")
    said, bad = capsys.readouterr().err, len(found) + 1
    assert status == 2 and bad > 1 and f"step {bad}: the loss is" in said
    assert re.search(r"on rows \d+ to \d+ of the walk \(\d+ of demos\)", said)
    assert (tmp_path / "run" / "checkpoints" / str(bad - 1)).is_dir()
