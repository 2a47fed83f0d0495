"""Each kind of source, from files written here: the same rows, none of them in memory before its
turn."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from jaxdeep import config as configs
from jaxdeep.chat.qwen3 import Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.data import sources
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import DataError

TOOLS = [{"name": "search", "parameters": {"type": "object", "properties": {"q": {}}}}]


def talk(i, *more):
    turns = [{"role": "user", "content": f"Wer ist Nr. {i}, é?"}, *more]
    return {"messages": [*turns, {"role": "assistant", "content": f"Nummer {i}."}], "id": i}


ROWS = [talk(i) for i in range(7)]


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer.load(ASSETS / "tiny"), "none")


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def pieces(rows, chat):
    source = sources.Conversations(rows, chat)
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def want(chat, tmp_path_factory):
    return pieces(sources.files(write(tmp_path_factory.mktemp("a") / "a.jsonl", ROWS)), chat)


# files


def test_a_line_is_read_when_it_is_asked_for(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for i in range(600):
            file.write(json.dumps({"i": i, "x": "x" * 100_000}) + "\n" * (1 + i % 3))
    assert path.stat().st_size > 60e6
    tracemalloc.start()
    rows = sources.files(path)
    assert len(rows) == 600 and [rows[i]["i"] for i in (0, 599, 17)] == [0, 599, 17]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert rows.location(0) == f"{path}:1" and rows.location(2) == f"{path}:4"
    assert rows.location(3) == f"{path}:7"


def test_a_pattern_joins_its_files_in_order(tmp_path, chat, want):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.jsonl", ROWS[3:5])
    write(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "deep" / "c.json").write_text(json.dumps(ROWS[5:]))
    assert pieces(sources.files(f"{tmp_path}/*.jsonl"), chat) == want[:5]
    rows = sources.files(f"{tmp_path}/**/*.json*")
    assert pieces(rows, chat) == want
    assert [rows.location(i) for i in (0, 4, 6)] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b.jsonl:2",
        f"{tmp_path}/deep/c.json[1]",
    ]
    with pytest.raises(DataError, match="no file matches"):
        sources.files(f"{tmp_path}/*.jsonlines")
    with pytest.raises(DataError, match="a folder"):
        sources.files(tmp_path)


def test_unchecked_lines_are_refused_one_by_one(tmp_path, chat):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps(ROWS[0]).encode(),
        b'{"mess',
        b'{"a": "\xff"}',
        json.dumps(ROWS[1]).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    source = sources.Conversations(sources.files(path, check=False), chat)
    assert len(source) == 4 and source[0] and source[3]
    for index, says in ((1, r"a\.jsonl:2: the line is not JSON"), (2, r"a\.jsonl:3: .*not JSON")):
        with pytest.raises(DataError, match=says):
            source[index]


def tool(name, argument):
    schema = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_row_is_the_same_by_every_way_in(tmp_path, chat, datasets):
    row = {
        "tools": [tool("search", "query"), tool("open", "url")],
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call("search", query="x"), call("open", url="y")],
            },
        ],
    }
    table = datasets.Dataset.from_list([row])  # gives each object the keys of all, with nulls
    table.to_json(tmp_path / "exported.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    write(tmp_path / "as_written.jsonl", [row])
    text = {key: json.dumps(value) for key, value in table[0].items()}
    write(tmp_path / "text.jsonl", [text])
    ways = [
        *(sources.files(tmp_path / f"{n}.jsonl") for n in ("as_written", "exported", "text")),
        *(sources.hugging_face(f"{tmp_path}/{n}", "train", "") for n in ("a.parquet", "saved")),
        sources.hugging_face(f"{tmp_path}/*.parquet", "train", ""),
        sources.hugging_face(f"{tmp_path}/exported.jsonl", "train[:1]", ""),
    ]
    found = [pieces(way, chat) for way in ways]
    assert all(one == found[0] for one in found)
    said = chat.tokenizer.decode([id for piece in found[0][0] for id in piece.tokens])
    assert "null" not in said and '{"query": "x"}' in said
    with pytest.raises(DataError, match="no such file"):
        sources.hugging_face(f"{tmp_path}/none.parquet", "train", "")


# datasets


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_saved_data_set(tmp_path, chat, want, datasets):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([4])).save_to_disk(tmp_path / "two")
    assert pieces(sources.hugging_face(str(tmp_path / "one"), "train", ""), chat) == want
    rows = sources.hugging_face(str(tmp_path / "two"), "test", "")
    assert pieces(rows, chat) == want[4:5] and rows.location(0) == f"hf:{tmp_path}/two:test[0]"
    with pytest.raises(DataError, match="has no split 'dev', only train, test"):
        sources.hugging_face(str(tmp_path / "two"), "dev", "")


def test_a_folder_of_parquet(tmp_path, chat, want, datasets, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "train-00000.parquet")
    folder = str(tmp_path / "data")
    assert pieces(sources.hugging_face(folder, "train", ""), chat) == want
    assert pieces(sources.hugging_face(folder, "train[2:4]", ""), chat) == want[2:4]
    for name, split in ((folder, "dev"), (str(tmp_path / "none"), "train")):
        with pytest.raises(DataError, match=rf"hf:{name}: no split '{split}'"):
            sources.hugging_face(name, split, "")


def test_keys_that_a_table_adds_are_gone_again(tmp_path, chat, datasets):
    def call(**arguments):
        function = {"name": "search", "arguments": arguments}
        turn = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
        return talk(0, turn, {"role": "tool", "content": "it"}) | {"tools": TOOLS}

    rows = [call(q="a"), call(k=2, deep={"x": 1}), talk(1) | {"tools": []}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    plain = pieces(sources.files(write(tmp_path / "a.jsonl", rows)), chat)
    assert pieces(sources.hugging_face(str(tmp_path / "d"), "train", ""), chat) == plain


# TFDS

TFDS = """
import sys
import json
import numpy as np
import tensorflow_datasets as tfds
from jaxdeep.data import sources
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import DataError

folder, rows = sys.argv[1], json.loads(sys.argv[2])

class Talks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {"messages": tfds.features.Sequence(turn), "id": tfds.features.Scalar(np.int64)}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, description="talks", features=features)
    def _split_generators(self, downloads):
        return {"train": self._generate_examples(rows), "test": self._generate_examples(rows[:2])}
    def _generate_examples(self, some):
        yield from ((row["id"], row) for row in some)

Talks(data_dir=folder, file_format="array_record").download_and_prepare()
chat = Qwen3Chat(Tokenizer.load(ASSETS / "tiny"), "none")
out = {}
for name, split in ((f"{folder}/talks/1.0.0", "train"), (f"{folder}/talks/1.0.0", "train[:3]")):
    found = sources.tensorflow_dataset(name, split)
    source = sources.Conversations(found, chat)
    ids = [found[i]["id"] for i in range(len(found))]
    out[split] = [(i, source[n]) for n, i in enumerate(ids)]
for name, split in (
    (f"{folder}/talks/1.0.0", "dev"),
    ("no_such_data_set", "train"),
    ("mnist", "train"),
    (folder, "train"),
):
    try:
        sources.tensorflow_dataset(name, split)
    except DataError as error:
        out[f"{name}:{split}"] = str(error)
out["loaded"] = [name for name in ("tensorflow", "jax") if name in sys.modules]
print(json.dumps(out))
"""


def test_tfds_by_number_without_tensorflow(tmp_path, want):
    pytest.importorskip("array_record")
    for name in ("tensorflow", "jax"):  # importing either fails
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text("raise RuntimeError('imported')")
    path = f"{tmp_path}/blocked{os.pathsep}{configs.ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", TFDS, str(tmp_path), json.dumps(ROWS)],
        capture_output=True,
        text=True,
        cwd=configs.ROOT,
        env=os.environ | {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    train = {i: [tuple(piece) for piece in row] for i, row in out["train"]}
    assert train == {i: [tuple(piece) for piece in row] for i, row in enumerate(want)}
    assert [i for i, _ in out["train[:3]"]] == [i for i, _ in out["train"]][:3]
    assert out["loaded"] == []
    for place in (
        f"{tmp_path}/talks/1.0.0:dev",
        "no_such_data_set:train",
        "mnist:train",
        f"{tmp_path}:train",
    ):
        assert "file_format='array_record'" in out[place], place


def test_without_the_library_the_line_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(DataError, match=r"pip install 'tensorflow-datasets>=4\.9\.9' array_record"):
        sources.tensorflow_dataset("talks", "train")


# plain text

CHAPTER = "One.\n\nTwo is longer than one.\n\n\nThree\nhas lines.\n\n    Four is indented."


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def windows(source):
    out = []
    for i in range(len(source)):
        first, rest = source[i]
        assert first.author == "world" and len(first.tokens) == 1 and rest.author == "policy"
        out.append(first.tokens + rest.tokens)
    return out


@pytest.mark.parametrize("T", [4, 7, 12, 20, 100])
def test_windows_of_text_lose_nothing_and_end_with_paragraphs_where_they_can(tmp_path, chat, T):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.md").write_text(CHAPTER)
    (tmp_path / "b" / "c.txt").write_text("Last.\n")
    (tmp_path / "b" / "d.txt").write_text(" \n")
    (tmp_path / "b" / "e.csv").write_text("no")
    found = windows(sources.Texts(tmp_path, chat, T))
    end = chat.tokenizer.id(Mark.EOT)
    parts = [chat.tokenizer.encode(part) for part in sources.paragraphs(CHAPTER)]
    assert "".join(sources.paragraphs(CHAPTER)) == CHAPTER and len(parts) == 4
    last = chat.tokenizer.encode("Last.\n")
    assert flat(found) == [*flat(parts), end, *last, end]
    assert all(0 < len(window) <= T for window in found)
    ends = {sum(map(len, parts[: i + 1])) for i in range(4)} | {sum(map(len, parts)) + 1}
    at = 0
    for window in found[: -len(last) - 1]:
        before, at = at, at + len(window)
        if at not in ends and at < max(ends):  # cut inside a paragraph: one that fills the window
            assert len(window) == T
            assert not [e for e in ends if before < e < at]
    if T == 100:
        assert len(found) == 2


def test_paragraphs_are_encoded_as_the_whole_text_is(shared):
    tokenizer = Tokenizer.load(shared("qwen3/tokenizer.json"))
    text = shared("apollo13/mission_report.md").read_text()[:200_000]
    source = sources.Texts(shared("apollo13/mission_report.md"), Qwen3Chat(tokenizer), 512)
    found = windows(source)
    ids = flat(found)
    want = tokenizer.encode(text)
    assert ids[: len(want) - 10] == want[:-10]
    assert sum(len(window) for window in found) / len(found) > 400


def test_text_that_is_not_there_is_named(tmp_path, chat):
    (tmp_path / "a.txt").write_text(" \n\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    for place, says in (
        (tmp_path / "a.txt", "holds no text"),
        (tmp_path / "b.txt", "b.txt cannot be read"),
        (tmp_path / "none", "none cannot be read"),
    ):
        with pytest.raises(DataError, match=says):
            sources.Texts(place, chat, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file that ends in \.txt or \.md"):
        sources.Texts(tmp_path / "empty", chat, 8)
