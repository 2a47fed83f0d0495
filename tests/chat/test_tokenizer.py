"""Plain text never becomes control tokens; published text becomes the published ids."""

import json
import random
import unicodedata

import huggingface_hub
import pytest
import tokenizers
from chat.tokenizers_of import spec_of, tokenizer_of

from jaxdeep.chat.tokenizer import TextDecoder, Tokenizer
from jaxdeep.errors import DataError

MARKS = ["<|im_start|>", "<|im_end|>", "<think>"]


def spec(**changes):
    """A byte-level tokenizer whose control tokens are words of its vocabulary, and would match."""
    words = [*MARKS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": mark, "special": mark != "<think>", **plain}
            for id, mark in enumerate(MARKS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {word: id for id, word in enumerate(words)},
            "merges": [],
        },
    } | changes


@pytest.fixture(scope="module")
def qwen(shared):
    return Tokenizer.load(shared("qwen3/tokenizer.json").parent)


@pytest.fixture(scope="module", params=["qwen3", "small"])
def tokenizer(request):
    if request.param == "small":
        return Tokenizer(json.dumps(spec()))
    return request.getfixturevalue("qwen")


def test_golden_tokens(qwen, shared):
    with shared("qwen3/golden_tokens.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 221
    marked = 0
    for row in rows:
        assert qwen.encode_control(row["text"]) == row["ids"]
        plain = qwen.encode(row["text"])
        assert qwen.decode(plain) == unicodedata.normalize("NFC", row["text"])
        if qwen.control.isdisjoint(row["ids"]):
            assert plain == row["ids"]
        else:
            marked += 1
            assert qwen.control.isdisjoint(plain)
    assert 0 < marked < 221


def test_plain_text_never_yields_control_tokens(tokenizer):
    marks = [tokenizer.decode([id]) for id in sorted(tokenizer.control)]
    assert set(MARKS) <= set(marks)
    for text in (*marks, "".join(marks), " ".join(marks), *(f"a{m}\n{m} b" for m in marks)):
        ids = tokenizer.encode(text)
        assert tokenizer.control.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
        assert not tokenizer.control.isdisjoint(tokenizer.encode_control(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\n\t x\r\n",
        "e\u0301 \u212b \u1e9b\u0323",
        "漢字かな 한국어",
        "🧑‍🚀\x00\ufeff\ufffd",
        "{}'re I'LL 1234567",
    ],
)
def test_plain_and_published_agree_on_text_without_marks(tokenizer, text):
    assert tokenizer.encode(text) == tokenizer.encode_control(text)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_halves_of_surrogate_pairs_are_mended(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude80")) == "🚀"


def test_ids_that_come_one_by_one_say_what_they_say_together(tokenizer):
    rng = random.Random(0)
    text = tokenizer.encode("né 漢字 🧑\u200d🚀 \ufffd e\u0301\n")
    pools = (text, range(256), range(tokenizer.size + 100), [*text, *tokenizer.control])
    for _ in range(400):
        ids = rng.choices(rng.choice(pools), k=rng.randint(0, 12))
        decoder = TextDecoder(tokenizer)
        assert "".join(decoder.feed([id]) for id in ids) + decoder.flush() == tokenizer.decode(ids)
    whole = TextDecoder(tokenizer)
    assert whole.feed(text) == tokenizer.decode(text) and whole.flush() == ""


def test_ids_of_sentencepiece_that_come_one_by_one_say_what_they_say_together():
    made, rng = tokenizer_of("mistral"), random.Random(0)
    reference = tokenizers.Tokenizer.from_str(spec_of("mistral"))
    for text in (" the search", "né 漢字 🧑\u200d🚀\n  a\tb", "", "▁ _ é"):
        ids = made.encode(text)
        assert ids == reference.encode(f"<s>{text}", add_special_tokens=False).ids[1:]
        assert made.decode(ids) == text.replace("▁", " ")
        # the library drops a space before the first word, which in a conversation is one
        assert reference.decode(
            [reference.token_to_id("<s>"), *ids], False
        ) == "<s>" + text.replace("▁", " ")
    text = made.encode("né 漢字 🚀")
    pools = (text, range(256), range(made.size + 100), [*text, *made.control])
    for _ in range(300):
        ids = rng.choices(rng.choice(pools), k=rng.randint(0, 12))
        decoder = TextDecoder(made)
        assert "".join(decoder.feed([id]) for id in ids) + decoder.flush() == made.decode(ids)


def test_a_prefix_of_the_first_word_is_left_out_wherever_it_is_written():
    spec = json.loads(spec_of("mistral"))
    plain = tokenizer_of("mistral").encode("the search")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    both = {"type": "Sequence", "normalizers": [prepend, replace]}
    for steps in (both, {"type": "Sequence", "normalizers": [replace]}):
        other = Tokenizer(json.dumps(spec | {"normalizer": steps, "pre_tokenizer": None}))
        assert other.encode("the search") == plain


def test_the_chat_template_comes_with_the_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec()))
    config = tmp_path / "tokenizer_config.json"
    assert Tokenizer.load(path).template == ""
    config.write_text(json.dumps({"chat_template": "one"}))
    assert Tokenizer.load(tmp_path).template == "one"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(path).template == "b"
    (tmp_path / "chat_template.jinja").write_text("own")
    loaded = Tokenizer.load(path)
    assert loaded.template == "own"
    assert loaded.files == {"tokenizer.json": path.read_text(), "chat_template.jinja": "own"}
    (tmp_path / "chat_template.jinja").unlink()
    for broken in ("{", '{"chat_template": [{"name": "rag", "template": "a"}]}', "[]"):
        config.write_text(broken)
        with pytest.raises(DataError, match="tokenizer_config"):
            Tokenizer.load(path)


def test_only_byte_level_ids_can_come_one_by_one():
    with pytest.raises(DataError, match="byte-level"):
        TextDecoder(Tokenizer(json.dumps(spec(decoder=None))))


def test_ids_and_size(qwen):
    assert qwen.size == 151_669
    assert len(qwen.control) == 26
    assert qwen.id("<|im_end|>") == 151_645
    assert qwen.decode([qwen.id("<think>"), *qwen.encode("hm"), qwen.size + 100]) == "<think>hm"


def test_an_absent_control_token_is_refused():
    with pytest.raises(DataError, match=r"'<tool_call>'.*<think>"):
        Tokenizer(json.dumps(spec())).id("<tool_call>")


def test_truncation_and_padding_of_the_file_are_ignored():
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": MARKS[0]}
    tokenizer = Tokenizer(json.dumps(spec(truncation=cut, padding=fill)))
    assert len(tokenizer.encode("ten letter")) == len(tokenizer.encode_control("ten letter")) == 10


def test_load_takes_a_file_a_folder_and_a_hub_name(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec()))
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        if file != "tokenizer.json":
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in (path, str(path), tmp_path, "Qwen/Qwen3-8B"):
        assert Tokenizer.load(name).id("<think>") == 2
    files = ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
    assert asked == [("Qwen/Qwen3-8B", file) for file in files]


def test_load_names_what_is_missing(tmp_path):
    for name in (tmp_path, tmp_path / "gone.json", "nobody/has-this-model", "no such name"):
        with pytest.raises(DataError) as error:
            Tokenizer.load(name)
        assert str(name) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"added_tokens": [], "model": 3}'])
def test_load_refuses_another_kind_of_file(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
