"""Every reader of JSON lines takes them compressed as well, and says what is wrong with a file."""

import gzip
import json
import sys

import pytest

from jaxdeep import files
from jaxdeep.agent import record
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.data import sources
from jaxdeep.envs.search.tasks import read_questions
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import DataError
from jaxdeep.tools.corpus import read_corpus
from jaxdeep.types import Message, Stop, Task, Trajectory


def zstd(data):
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as parallel compressors write
    return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))


WAYS = {".gz": gzip.compress, ".zst": zstd}
TALK = [{"role": "user", "content": "Wie heißt du?"}, {"role": "assistant", "content": "Zoë\u2028"}]


def packed(path, way):
    """The file beside its compressed twin."""
    twin = path.with_name(path.name + way)
    twin.write_bytes(WAYS[way](path.read_bytes()))
    return path, twin


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer.load(ASSETS / "tiny"), "none")


@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_read_may_be_compressed(tmp_path, chat, way):
    rows = [{"messages": TALK, "n": n} for n in range(5)]
    plain, twin = (
        sources.Conversations(sources.files(path), chat)
        for path in packed(lines(tmp_path / "talk.jsonl", rows), way)
    )
    assert [twin[i] for i in range(5)] == [plain[i] for i in range(5)] and len(twin) == 5
    assert twin.rows.location(3).endswith(f"talk.jsonl{way}:4")

    (tmp_path / "list.json").write_text(json.dumps(rows))
    plain, twin = map(sources.files, packed(tmp_path / "list.json", way))
    assert [twin[i] for i in range(5)] == [plain[i] for i in range(5)] == rows

    questions = [{"question": f"{n}?", "answer": n} for n in range(3)]
    plain, twin = packed(lines(tmp_path / "q.jsonl", questions), way)
    assert [t.answers for t in read_questions(twin)] == [("0",), ("1",), ("2",)]

    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in {"a.md": "# One\ntext", "b.txt": "two", "c.jsonl": '{"text": "3"}'}.items():
        (folder / name).write_text(text)
    want = read_corpus(folder)
    for path in list(folder.iterdir()):
        packed(path, way)[0].unlink()
    assert [(d.title, d.text) for d in read_corpus(folder)][:1] == [("One", "# One\ntext")]
    assert [d.text for d in read_corpus(folder)] == [d.text for d in want]
    windows = [sources.Texts(folder, chat, 64)[n] for n in range(2)]
    assert "two" in chat.tokenizer.decode([id for piece in windows[1] for id in piece.tokens])

    record.write(
        tmp_path / "r.jsonl",
        [Trajectory(Task("t", "?"), messages=[Message("user", "\u2028")], stop=Stop.FINISHED)],
    )
    plain, twin = map(record.read, packed(tmp_path / "r.jsonl", way))
    assert plain == twin


def test_what_a_file_is_is_told_by_its_bytes(tmp_path):
    path = tmp_path / "plain.jsonl"  # compressed by a server, and named as it was
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert sources.files(path)[0] == {"a": 1} and files.is_compressed(path)
    path = tmp_path / "unpacked.jsonl.gz"  # unpacked by a browser
    path.write_bytes(b'{"a": 1}\n')
    assert sources.files(path)[0] == {"a": 1} and not files.is_compressed(path)
    assert files.kind("a.jsonl.gz") == files.kind("b/a.jsonl") == ".jsonl" and files.kind("a") == ""


@pytest.mark.parametrize("read", [files.read_text, lambda path: sources.files(path)])
def test_a_damaged_file_is_named(tmp_path, read):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (whole[:-20], whole[:20] + b"xxxx" + whole[24:]):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
            read(path)
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read(tmp_path / "none.jsonl")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(DataError, match=r"pip install 'jaxdeep\[zst\]'"):
        files.read_text(path)
