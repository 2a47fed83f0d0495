"""What rows become is known before training, and is what training then counts."""

import itertools
import json

import pytest

from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.data import sources
from jaxdeep.data.check import SHOWN, check, joined
from jaxdeep.data.mix import Mix, Position, WeightedSource, hold_out, packed_batches
from jaxdeep.envs.toy.facts import ASSETS
from jaxdeep.errors import DataError
from jaxdeep.types import Piece

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
KINDS = {
    "rows": {"messages": TALK, "source": "web"},
    "cut": {"messages": [*TALK, {"role": "user", "content": "e " * 50}, TALK[1]]},
    "long": {"messages": [{"role": "user", "content": "e " * 50}, TALK[1]]},
    "empty": {"messages": TALK[:1]},
    "bad": {"messages": [{"role": "robot"}]},
}
ORDER = [kind for kind in KINDS for _ in range(8)]


class Endless:
    def __getitem__(self, index):
        return [Piece([1, 2], "world"), Piece([3], "policy")]


@pytest.fixture
def mix(tmp_path):
    chat = Qwen3Chat(Tokenizer.load(ASSETS / "tiny"), "none")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(KINDS[kind]) + "\n" for kind in ORDER))
    source = sources.Conversations(sources.files(path), chat)
    return Mix({"a": WeightedSource(source, 1.0), "b": WeightedSource(Endless(), 1.0)}, seed=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_all_rows_are_read_once_and_counted_by_reason(mix, parts):
    read = []
    whole = joined(
        check(mix, 64, "cut", part=part, parts=parts, on_row=lambda: read.append(1))
        for part in range(parts)
    )
    assert len(read) == len(ORDER) and list(whole.tallies) == ["a"]  # the other has no end
    tally = whole.tallies["a"]
    assert (tally.rows, tally.cut, tally.long, tally.empty, tally.bad) == (16, 8, 8, 8, 8)
    assert whole.unread["a"] == {"source": 8}
    first = ORDER.index("bad")
    assert list(whole.errors["a"]) == list(range(first, first + SHOWN))
    assert all(f"a.jsonl:{n + 1}: message 0" in said for n, said in whole.errors["a"].items())
    dropped = check(mix, 64, "drop").tallies["a"]
    assert (dropped.rows, dropped.cut, dropped.long) == (8, 0, 16)


def test_what_is_found_is_what_an_epoch_counts(mix):
    alone = Mix({"a": mix.parts["a"]}, seed=0)
    want = check(alone, 64, "cut").tallies["a"]
    batches = packed_batches(alone, Position(), B=1, T=160, seed=0, longest=64, bad="skip")
    position = next(p for _, p in batches if p.read >= len(ORDER))
    more = check(Mix({"a": WeightedSource(Walk(alone, position.read))}, 0), 64, "cut").tallies["a"]
    assert position.tallies["a"] == more and want.cut == 8


class Walk:
    """The first rows of a walk, as a source."""

    def __init__(self, mix, count):
        self.mix, self.count = mix, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.mix.row(*self.mix.pick(index))


def test_a_sequence_is_never_longer_than_it_may_be_though_the_batch_is(mix):
    def lengths(**settings):
        batches = packed_batches(mix, Position(), B=2, T=160, seed=0, bad="skip", **settings)
        for batch, _ in itertools.islice(batches, 12):
            yield batch.positions_BT.max() + 1, batch.segments_BT.max()

    assert max(length for length, _ in lengths()) > 64
    longest, segments = map(max, zip(*lengths(longest=64), strict=True))
    assert longest <= 64 and segments > 1  # still packed
    with pytest.raises(DataError, match="longer than 4 tokens"):
        list(lengths(longest=4))


def test_held_out_rows_are_not_in_it(mix):
    kept, held = hold_out(mix.parts["a"].source, 10, seed=0)
    found = check(Mix({"a": WeightedSource(kept)}, 0), 64, "cut")
    apart = check(Mix({"a": WeightedSource(held)}, 0), 64, "cut")
    assert joined([found, apart]).tallies == check(mix, 64, "cut").tallies
    assert sum((found.unread["a"] + apart.unread["a"]).values()) == 8
