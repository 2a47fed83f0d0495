"""The tokenizer that a GGUF file carries in its metadata, as the text of a `tokenizer.json`, and
back.

Byte-level BPE (`tokenizer.ggml.model` gpt2) is rebuilt from its tokens, merges and the name of its
pre-tokenizer; SentencePiece BPE (llama) from its tokens and scores. Both are refused where the file
does not say enough to split texts as the original does.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdeep.errors import DataError
from jaxdeep.gguf_file import GgufFile, open_gguf

CONTROL, USER_DEFINED, UNKNOWN, BYTE = 3, 4, 2, 6  # of tokenizer.ggml.token_type
NORMAL = 1

# How the text is split before merges, by `tokenizer.ggml.pre`: facts of the published tokenizers.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex,
    }


DIGITS = {"type": "Digits", "individual_digits": True}
GPT2_STEPS = [_byte_level(True)]
PRE = {
    "gpt-2": GPT2_STEPS,
    "olmo": GPT2_STEPS,
    "smollm": [DIGITS, _byte_level(True)],
    "llama-bpe": [_split(LLAMA3), _byte_level(False)],
    "dbrx": [_split(LLAMA3), _byte_level(False)],  # OLMo 2 and 3
    "qwen2": [_split(QWEN2), _byte_level(False)],
    "deepseek-r1-qwen": [_split(QWEN2), _byte_level(False)],
    "tekken": [_split(TEKKEN), _byte_level(False)],
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "gpt2": "gpt-2",
}
COMPOSES = ("qwen2", "deepseek-r1-qwen")  # texts are brought to NFC first
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is in the vocabulary is not split again


def tokenizer_json(path: str | pathlib.Path) -> str:
    """The text of a `tokenizer.json` that encodes as the tokenizer of a GGUF file does. DataError
    where it cannot be rebuilt."""
    file = open_gguf(path)
    kind = file.get("tokenizer.ggml.model")
    if kind == "gpt2":
        spec = _byte_level_bpe(file)
    elif kind == "llama":
        spec = _sentencepiece_bpe(file)
    else:
        raise DataError(
            f"{path} has a tokenizer of the kind {kind!r}; gpt2 and llama can be rebuilt: set "
            "model.tokenizer to the folder or hub id of the model it was made from"
        )
    return json.dumps(spec, ensure_ascii=False)


def chat_template(path: str | pathlib.Path) -> str:
    """The chat template of a GGUF file; "" if it has none."""
    return open_gguf(path).metadata.get("tokenizer.chat_template", "")


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    tokens = file.get("tokenizer.ggml.tokens")
    kinds = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise DataError(f"{file.path} has {len(tokens)} tokens and {len(kinds)} types of them")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise DataError(f"{file.path} has the token {twice!r} twice")
    return tokens, kinds


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens that are matched in texts before anything is split."""
    return [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _spec(added: list[dict[str, Any]], model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return head | parts | steps | {"model": model}


def _bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **changes: Any) -> dict:
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return plain | changes | {"vocab": vocab, "merges": merges}


def _byte_level_bpe(file: GgufFile) -> dict[str, Any]:
    tokens, kinds = _tokens(file)
    if not file.metadata.get("tokenizer.ggml.merges"):
        raise DataError(
            f"{file.path} has tokens without merges, which do not say how texts are split: set "
            "model.tokenizer to the folder or hub id of the model it was made from"
        )
    pre = file.metadata.get("tokenizer.ggml.pre", "missing")
    pre = ALIASES.get(pre, pre)
    if pre not in PRE:
        raise DataError(
            f"{file.path} splits texts by the rule {pre!r} (tokenizer.ggml.pre), none of "
            f"{', '.join(PRE)}: set model.tokenizer to that of the model it was made from"
        )
    merges = [merge.split(" ") for merge in file.metadata["tokenizer.ggml.merges"]]
    added = _added(tokens, kinds)
    steps = PRE[pre]
    return _spec(
        added,
        _bpe(
            {token: id for id, token in enumerate(tokens)},
            merges,
            ignore_merges=pre in WHOLE_WORDS,
        ),
        normalizer={"type": "NFC"} if pre in COMPOSES else None,
        pre_tokenizer=steps[0]
        if len(steps) == 1
        else {"type": "Sequence", "pretokenizers": list(steps)},
        decoder=_byte_level(True),
    )


def _sentencepiece_bpe(file: GgufFile) -> dict[str, Any]:
    """Merges are what the scores imply: of two neighbours that join to a piece, those whose piece
    has the best score are joined first."""
    tokens, kinds = _tokens(file)
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise DataError(f"{file.path} has {len(tokens)} pieces and {len(scores or ())} scores")
    if not any(kind == BYTE for kind in kinds):
        raise DataError(f"{file.path} has no tokens for single bytes: some texts have no ids")
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = []
    for piece, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != NORMAL:
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort()
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    space = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    unknown = next(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None
    )
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    added = _added(tokens, kinds)
    return _spec(
        added,
        _bpe(
            vocab,
            [[a, b] for *_, a, b in merges],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown,
        ),
        normalizer={"type": "Sequence", "normalizers": [*space, replace]},
        decoder={
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
    )


def metadata(text: str, size: int) -> dict[str, Any]:
    """What a GGUF file says of the byte-level tokenizer of a `tokenizer.json`, for a vocabulary of
    `size` rows: the keys below `tokenizer.ggml.`. DataError for another kind of tokenizer."""
    spec = json.loads(text)
    model = spec["model"]
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pre = next((name for name in PRE if _same_steps(PRE[name], steps)), None)
    if model.get("type") != "BPE" or pre is None:
        raise DataError(
            "the tokenizer is not one that GGUF has a name for: its rule for splitting texts is "
            f"none of {', '.join(PRE)}"
        )
    added = {token["id"]: token for token in spec["added_tokens"]}
    named = {id: token for token, id in model["vocab"].items()}
    named |= {id: token["content"] for id, token in added.items()}
    tokens, kinds = [], []
    for id in range(size):
        tokens.append(named.get(id, f"[PAD{id}]"))
        special = id in added and added[id].get("special")
        unused = 5
        kinds.append(
            CONTROL
            if special
            else USER_DEFINED
            if id in added
            else NORMAL
            if id in named
            else unused
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


def _same_steps(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> bool:
    """Whether two pre-tokenizers split alike; offsets aside."""

    def essence(step: Mapping) -> Any:
        pattern = step.get("pattern")
        kind = step.get("type")
        regex = step.get("use_regex", True) if kind == "ByteLevel" else None
        prefix = step.get("add_prefix_space", False)
        return kind, json.dumps(pattern), regex, prefix, step.get("individual_digits")

    return [essence(step) for step in ours] == [essence(step) for step in theirs]
