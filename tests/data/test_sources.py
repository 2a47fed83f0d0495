"""Rows of real traces as they were written, and a walk that loses none and can stop anywhere."""

import collections
import itertools
import json
import random
import re
import unicodedata

import numpy as np
import pytest

from jaxdeep.chat.qwen3 import Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.data import sources
from jaxdeep.data.mix import Position, packed_batches
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import DataError
from jaxdeep.types import Piece


def Conversations(path, chat):
    return sources.Conversations(sources.files(path), chat)


TALK = [{"role": "user", "content": "Read."}, {"role": "assistant", "content": "Unknown"}]
TOOL = {"name": "search", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def qwen(shared):
    return Tokenizer.load(shared("qwen3/tokenizer.json"))


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer.load(ASSETS / "tiny"), "none")


# conversations


def learned(chat, pieces):
    """What is learned from a row, turn by turn, without the `<|im_end|>` that closes each."""
    tokens = [id for piece in pieces if piece.author == "policy" for id in piece.tokens]
    end = chat.tokenizer.id(Mark.END)
    assert tokens[-1] == end
    runs = [list(run) for closed, run in itertools.groupby(tokens, end.__eq__) if not closed]
    assert tokens.count(end) == len(runs)
    return [chat.tokenizer.decode(run) for run in runs]


def canonical(text):
    """A turn with its calls read and white space around its marks gone, in one normal form."""
    parts = re.split(r"(</?think>|</?tool_call>)", unicodedata.normalize("NFC", text))
    out, before = [], ""
    for part in parts:
        said = part.strip()
        if said:
            out.append(json.loads(said) if before == Mark.CALL else said)
            before = part
    return out


def test_all_that_the_assistant_of_webdancer_wrote_is_learned_and_nothing_else(qwen, shared):
    path, chat = shared("traces/webdancer.jsonl"), Qwen3Chat(qwen)
    raw = [json.loads(line)["messages"] for line in path.open(encoding="utf-8")]
    source = Conversations(path, chat)
    assert len(source) == len(raw) == 100
    turns = 0
    for index, messages in enumerate(raw):
        wrote = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [canonical(turn) for turn in learned(chat, source[index])] == [
            canonical(turn) for turn in wrote
        ]
        turns += len(wrote)
    assert turns == 205


def test_all_that_the_assistant_of_glaive_wrote_is_learned_and_nothing_else(qwen, shared):
    path, chat = shared("traces/glaive_toolcall_en.json"), Qwen3Chat(qwen, "none")
    raw = json.loads(path.read_text(encoding="utf-8"))
    source = Conversations(path, chat)
    assert len(source) == len(raw) == 300
    kinds = collections.Counter()
    for index, row in enumerate(raw):
        wrote = [t for t in row["conversations"] if t["from"] in ("gpt", "function_call")]
        for said, turn in zip(learned(chat, source[index]), wrote, strict=True):
            kinds[turn["from"]] += 1
            if turn["from"] == "gpt":
                assert said == unicodedata.normalize("NFC", turn["value"])
            else:
                calls = json.loads(turn["value"])
                calls = calls if isinstance(calls, list) else [calls]
                inner = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", said, re.DOTALL)
                assert [json.loads(call) for call in inner] == calls
                assert "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in inner) == said
    assert kinds == {"gpt": 746, "function_call": 211}


def test_a_row_starts_with_the_world_and_its_tools(qwen, shared):
    chat = Qwen3Chat(qwen, "none")
    path = shared("traces/glaive_toolcall_en.json")
    source = Conversations(path, chat)
    for index, row in enumerate(json.loads(path.read_text(encoding="utf-8"))[:50]):
        first = source[index][0]
        names = [tool["name"] for tool in json.loads(row["tools"])]
        assert first.author == "world"
        shown = re.findall(
            r'\{"type": "function", "function": \{"name": "(.*?)"', decode(chat, first)
        )
        assert shown == names


def decode(chat, *pieces):
    return chat.tokenizer.decode([id for piece in pieces for id in piece.tokens])


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_jsonl_json_sharegpt_and_every_form_of_tools_say_the_same(tmp_path, chat):
    shared_gpt = [{"from": "human", "value": "Read."}, {"from": "gpt", "value": "Unknown"}]
    wrapped = {"type": "function", "function": TOOL}
    rows = [
        {"messages": TALK, "tools": [wrapped]},
        {"messages": TALK, "tools": [TOOL]},
        {"messages": TALK, "tools": json.dumps([TOOL])},
        {"conversations": shared_gpt, "tools": [TOOL]},
    ]
    lines = Conversations(write(tmp_path / "a.jsonl", *rows), chat)
    listing = tmp_path / "a.json"
    listing.write_text(json.dumps(rows, indent=2), "utf-8")
    listed = Conversations(listing, chat)
    assert len(lines) == len(listed) == 4
    first = lines[0]
    assert '"name": "search"' in decode(chat, first[0])
    assert all(source[i] == first for source in (lines, listed) for i in range(4))
    plain = Conversations(
        write(tmp_path / "b.jsonl", *({"messages": TALK, "tools": no} for no in (None, [], "[]"))),
        chat,
    )
    assert plain[0] == plain[1] == plain[2] != first


def test_only_line_ends_part_lines(tmp_path, chat):
    odd = "a\u2028b\u2029c\x85d\x1ce"
    row = {"messages": [TALK[0], {"role": "assistant", "content": odd}]}
    path = write(tmp_path / "a.jsonl", row, row)
    source = Conversations(path, chat)
    assert len(source) == 2
    row = source[1]
    assert learned(chat, row) == [odd]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert Conversations(path, chat)[1] == row


@pytest.mark.parametrize(
    ("content", "message"),
    {
        "empty": (b"", "holds no conversation"),
        "blank": (b"\n \n", "holds no conversation"),
        "empty list": (b"[]", "holds no conversation"),
        "bad line": (b'{"messages": []}\n\n{"mess', r"x\.jsonl:3 is not JSON"),
        "bad list": (b'[{"messages": []},', r"x\.jsonl is not JSON"),
        "not text": (b'{"messages": "\xff"}', "cannot be read"),
    }.values(),
)
def test_a_file_that_cannot_be_used_says_where(tmp_path, chat, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        Conversations(path, chat)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path, chat):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read") as error:
            Conversations(path, chat)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    {
        "neither": ({"text": "a", "id": 1}, "messages or conversations, found text, id"),
        "no list": ({"messages": None}, "list of messages"),
        "no object": (["a"], "must be an object"),
        "bad role": ({"messages": [{"role": "bot", "content": "a"}]}, "message 0"),
        "bad turn": ({"conversations": ["a"]}, "message 0"),
        "broken call": (
            {"messages": [TALK[0], {"role": "assistant", "content": "<tool_call>\n{</tool_call>"}]},
            "message 1: .*not valid JSON",
        ),
        "tools no JSON": ({"messages": TALK, "tools": "["}, "tools is not JSON"),
        "tools no list": ({"messages": TALK, "tools": {"name": "f"}}, "tools must be a list"),
        "tools no objects": ({"messages": TALK, "tools": ["f"]}, "tools must be a list"),
    }.values(),
)
def test_a_row_that_cannot_be_used_says_where(tmp_path, chat, row, message):
    good = {"messages": TALK}
    lines = Conversations(write(tmp_path / "x.jsonl", good, row, good), chat)
    (tmp_path / "x.json").write_text(json.dumps([good, row, good]), "utf-8")
    listed = Conversations(tmp_path / "x.json", chat)
    for source, place in ((lines, r"x\.jsonl:2: "), (listed, r"x\.json\[1\]: ")):
        assert source[0] == source[2]
        with pytest.raises(DataError, match=f"{place}.*{message}"):
            source[1]


# the walk


class Endless:
    """Row i starts with token i and is `length(i)` long; where `mute(i)` nothing is learned."""

    def __init__(self, length, mute=lambda i: False):
        self.length, self.mute = length, mute

    def __getitem__(self, index):
        rest = [1] * (self.length(index) - 1)
        return [Piece([index], "world"), Piece(rest, "world" if self.mute(index) else "policy")]


class Finite(Endless):
    def __init__(self, n, length, mute=lambda i: False):
        super().__init__(length, mute)
        self.n = n

    def __len__(self):
        return self.n


def mixed(index):
    """A length from 2 to 24, now and then one that is too long for 32."""
    rng = random.Random(index)
    return 50 if rng.random() < 0.15 else rng.randint(2, 24)


SOURCES = {
    "endless": Endless(mixed, lambda i: i % 11 == 3),
    "finite": Finite(37, mixed, lambda i: i % 11 == 3),
    "smaller than a batch": Finite(3, lambda i: 4),
}


def markers(batch):
    """The numbers of the rows in a batch."""
    return batch.tokens_BT[(batch.positions_BT == 0) & (batch.segments_BT > 0)].tolist()


START = Position()


def walk(source, count, position=START, *, B=3, T=32, seed=5):
    return list(itertools.islice(packed_batches(source, position, B=B, T=T, seed=seed), count))


@pytest.mark.parametrize("name", SOURCES)
def test_a_walk_resumed_anywhere_is_the_walk_that_never_stopped(name):
    source = SOURCES[name]
    whole = walk(source, 24)
    for stop, (_, position) in enumerate(whole[:-4]):
        for (a, here), (b, there) in zip(
            walk(source, 4, Position(*position)), whole[stop + 1 :], strict=False
        ):
            assert here == there
            assert all((x == y).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_lost_or_repeated_between_batches(name):
    source = SOURCES[name]
    # the order of the walk: that of a source of the same size whose rows fill a batch each
    even = Finite(source.n, lambda i: 2) if hasattr(source, "n") else Endless(lambda i: 2)
    order = [n for batch, _ in walk(even, 700, B=1, T=2) for n in markers(batch)]
    before = Position()
    for batch, after in walk(source, 24):
        passed = order[before.read : after.read]
        fit = [i for i in passed if source.length(i) <= 32 and not source.mute(i)]
        assert sorted(markers(batch)) == sorted(fit)
        assert after.skipped - before.skipped == len(passed) - len(fit)
        # the next row is what had no room
        free_B = 32 - (batch.segments_BT > 0).sum(1)
        assert source.length(order[after.read]) > free_B.max()
        before = after
    assert before.read > 37


def test_the_rows_of_an_endless_source_come_in_order():
    seen = [n for batch, _ in walk(Endless(lambda i: 4), 10, B=1, T=4) for n in markers(batch)]
    assert seen == list(range(10))


@pytest.mark.parametrize("n", [1, 2, 17])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(n):
    source = Finite(n, lambda i: 4)

    def epochs(seed):
        seen = [k for batch, _ in walk(source, 3 * n, B=1, T=4, seed=seed) for k in markers(batch)]
        return [seen[i : i + n] for i in range(0, 3 * n, n)]

    first = epochs(0)
    assert all(sorted(epoch) == list(range(n)) for epoch in first)
    assert epochs(0) == first
    if n == 17:
        different = [tuple(epoch) for seed in (0, 1, 2) for epoch in epochs(seed)]
        assert len(set(different)) == 9


def test_an_epoch_is_shuffled_once_and_not_for_every_row(monkeypatch):
    shuffles = []
    shuffle = random.Random.shuffle
    monkeypatch.setattr(
        random.Random, "shuffle", lambda rng, x: (shuffles.append(1), shuffle(rng, x))
    )
    walk(Finite(1234, lambda i: 4), 100, B=1, T=4)
    assert len(shuffles) == 1


def test_rows_that_are_too_long_or_teach_nothing_are_counted():
    source = Finite(10, lambda i: 9 if i in (2, 5) else 4, lambda i: i == 7)
    *_, (_, position) = walk(source, 21, B=1, T=4)  # three epochs of seven
    assert position.read - position.skipped == 21
    seen = collections.Counter(n for batch, _ in walk(source, 21, B=1, T=4) for n in markers(batch))
    assert seen == {n: 3 for n in range(10) if n not in (2, 5, 7)}
    assert 6 <= position.skipped <= 9


@pytest.mark.parametrize("source", [Finite(4, lambda i: 9), Endless(lambda i: 9)])
def test_a_source_with_nothing_that_fits_is_refused(source):
    with pytest.raises(DataError, match="longer than 8 tokens"):
        walk(source, 1, T=8)


def test_a_source_with_nothing_to_learn_is_refused():
    with pytest.raises(DataError, match="nothing to learn"):
        walk(Finite(4, lambda i: 5, lambda i: True), 1, T=8)


@pytest.mark.parametrize("n", [2, 3, 9, 400])
def test_one_good_row_is_enough(n):
    source = Finite(n, lambda i: 4 if i == 0 else 9)
    batches = walk(source, 40 if n < 10 else 3, B=1, T=4)
    assert all(markers(batch) == [0] for batch, _ in batches)


def test_batches_of_a_walk_have_one_shape():
    for batch, _ in walk(SOURCES["endless"], 10):
        assert {part.shape for part in batch} == {(3, 32)}
        assert {part.dtype for part in batch} == {np.dtype(np.int32), np.dtype(np.float32)}
