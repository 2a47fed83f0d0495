"""Tokenizers out of GGUF metadata encode as the originals do."""

import io
import json

import gguf
import pytest
import sentencepiece
import tokenizers

from jaxdeep.chat import gguf_tokenizer
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.errors import DataError

TEXTS = (
    "Hello world, it's 12345 o'clock! I'LL go.",
    "  def f(x):\n\n    return x ** 2\t# done  ",
    "Zürich, 北京 and 서울: naïve café \u0301e",
    "<|im_end|> is no control token here </s>",
    "a" * 40 + " \r\n\r\n  9.81 m/s² 😀👩‍🚀",
    "",
)
CONTROL = ["<|im_start|>", "<|im_end|>"]


def byte_level(pre):
    """A small tokenizer with the published rule of splitting."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    spec = json.loads(tokenizer.to_str())
    steps = gguf_tokenizer.PRE[pre]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    spec["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    spec["normalizer"] = {"type": "NFC"} if pre in gguf_tokenizer.COMPOSES else None
    spec["model"]["ignore_merges"] = pre in gguf_tokenizer.WHOLE_WORDS
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def file_of(path, about, **changes):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (about | changes).items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_string(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", gguf_tokenizer.PRE)
def test_a_byte_level_tokenizer_goes_out_and_in_again(pre, tmp_path):
    original = byte_level(pre)
    about = gguf_tokenizer.metadata(original.to_str(), original.get_vocab_size() + 3)
    steps = gguf_tokenizer.PRE
    assert steps[about["pre"]] == steps[pre]
    assert about["tokens"][-1].startswith("[PAD") and about["token_type"][-1] == 5
    path = file_of(tmp_path / "m.gguf", about)
    rebuilt = Tokenizer(gguf_tokenizer.tokenizer_json(path))
    for text in TEXTS:
        ids = rebuilt.encode_control(text)
        assert ids == original.encode(text).ids
        assert rebuilt.decode(ids) == original.decode(ids, skip_special_tokens=False)
    assert rebuilt.control == {original.token_to_id(name) for name in CONTROL}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_rebuilt_from_its_scores(prefix, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:-1] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.99,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(original.get_piece_size())
    kinds = [
        6
        if original.is_byte(i)
        else 2
        if original.is_unknown(i)
        else 3
        if original.is_control(i)
        else 1
        for i in ids
    ]
    about = {
        "model": "llama",
        "tokens": [original.id_to_piece(i) for i in ids],
        "scores": [float(original.get_score(i)) for i in ids],
        "token_type": kinds,
        "add_space_prefix": prefix,
    }
    spec = gguf_tokenizer.tokenizer_json(file_of(tmp_path / "m.gguf", about))
    rebuilt, ours = tokenizers.Tokenizer.from_str(spec), Tokenizer(spec)
    for text in (*TEXTS, "unseen: Ωμέγα ✓"):
        ids = original.encode(text)
        if "</s>" not in text:  # which it reads as a control token
            assert rebuilt.encode(text, add_special_tokens=False).ids == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)
        # ours has no space before a first word unless there is one
        first = " " * (prefix and text != "")
        assert ours.encode(first + text) == ids and ours.decode(ids) == first + text


def test_the_published_tokenizer_of_qwen3(shared, tmp_path):
    text = shared("qwen3/tokenizer.json").read_text()
    about = gguf_tokenizer.metadata(text, 151_936)
    assert about["pre"] == "qwen2"
    rebuilt = Tokenizer(gguf_tokenizer.tokenizer_json(file_of(tmp_path / "m.gguf", about)))
    original = Tokenizer(text)
    for text in TEXTS:
        assert rebuilt.encode(text) == original.encode(text)
        assert rebuilt.encode_control(text) == original.encode_control(text)
    assert rebuilt.control == original.control


WRONG = {
    "tokens without merges": dict(merges=None),
    "the rule 'chameleon'": dict(pre="chameleon"),
    "kind 'bert'": dict(model="bert"),
    "tokens and 2 types": dict(token_type=[1, 1]),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(said, tmp_path):
    original = byte_level("gpt-2")
    about = gguf_tokenizer.metadata(original.to_str(), original.get_vocab_size())
    with pytest.raises(DataError, match=said):
        gguf_tokenizer.tokenizer_json(file_of(tmp_path / "m.gguf", about, **WRONG[said]))


def test_a_tokenizer_that_gguf_has_no_name_for_is_not_written():
    text = byte_level("gpt-2").to_str().replace('"use_regex":true', '"use_regex":false')
    with pytest.raises(DataError, match="none of gpt-2"):
        gguf_tokenizer.metadata(text, 420)
