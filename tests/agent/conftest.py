"""A chat over a tokenizer of 256 bytes and the control tokens: no file, no download."""

import pytest
import tokenizers

from jaxdeep.chat.qwen3 import Mark, Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def chat():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({byte: id for id, byte in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([str(mark) for mark in Mark])
    return Qwen3Chat(Tokenizer(tokenizer.to_str()))
