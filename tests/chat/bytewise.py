"""A tokenizer small enough to see through: one id a byte, and the marks."""

import json

import tokenizers

from jaxdeep.chat.qwen3 import Mark
from jaxdeep.chat.tokenizer import Tokenizer


def tokenizer() -> Tokenizer:
    """One id a byte, and the marks."""
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return Tokenizer(
        json.dumps(
            {
                "added_tokens": [
                    {"id": 256 + index, "content": mark, **flags} for index, mark in enumerate(Mark)
                ],
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": {"type": "ByteLevel", **byte_level},
                "post_processor": None,
                "decoder": {"type": "ByteLevel", **byte_level},
                "model": {
                    "type": "BPE",
                    "vocab": {letter: id for id, letter in enumerate(alphabet)},
                    "merges": [],
                },
            }
        )
    )
