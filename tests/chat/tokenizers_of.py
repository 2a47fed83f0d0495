"""Small tokenizers with the control tokens of each family's published one: byte-level BPE, and BPE
as SentencePiece writes it, with merges learned from a text about tags."""

import functools
import json
import random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxdeep.chat.calls import FunctionsMark, LlamaMark, MistralMark
from jaxdeep.chat.chatml import ChatMlMark
from jaxdeep.chat.deepseek import DeepSeekMark
from jaxdeep.chat.llama3 import Llama3Mark
from jaxdeep.chat.mistral import MistralChatMark
from jaxdeep.chat.qwen3 import Mark
from jaxdeep.chat.tokenizer import Tokenizer

LLAMA = (*Llama3Mark, *LlamaMark)
MISTRAL = ("<unk>", *MistralChatMark, *MistralMark)
OLMO3 = (*ChatMlMark, *FunctionsMark)
CONTROL = {
    "qwen3": tuple(Mark),
    "qwen2.5": tuple(mark for mark in Mark if "think" not in mark),
    "chatml": tuple(ChatMlMark),
    "chatml-unguarded": tuple(ChatMlMark),
    "smollm2": tuple(ChatMlMark),
    "llama3": LLAMA,
    "llama3.0": LLAMA,
    "mistral": MISTRAL,
    "mistral-tekken": MISTRAL,
    "deepseek-r1": (*DeepSeekMark, "<think>", "</think>"),
    "olmo2": (*ChatMlMark, "<|endofprompt|>"),
    "olmo3": OLMO3,
    "olmo3.1": OLMO3,
    "olmo3-think": OLMO3,
}
TEXT = (
    "the search of a passage <tool_call> </tool_call> <tool_response> </tool_response> <think> "
    "</think>\n<|user|>\n<|assistant|>\n<|system|>\n<functions> </functions> <function_calls> "
    "</function_calls> [INST] [/INST] <|im_start|>user\nassistant system ipython environment "
    '{"name": "f", "arguments": {"query": "x"}, "parameters": {}} You are a helpful assistant. '
)


@functools.cache
def tokenizer_of(family: str) -> Tokenizer:
    return Tokenizer(spec_of(family))


@functools.cache
def spec_of(family: str) -> str:
    """The text of the `tokenizer.json`."""
    made = json.loads(_sentencepiece() if family == "mistral" else _byte_level())
    first = max(made["model"]["vocab"].values()) + 1
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    made["added_tokens"] = [
        {"id": first + index, "content": str(name), **flags}
        for index, name in enumerate(CONTROL[family])
    ]
    return json.dumps(made)


@functools.cache
def _byte_level() -> str:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False),
    )
    return made.to_str()


@functools.cache
def _sentencepiece() -> str:
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    spec = json.loads(made.to_str())
    words = [f"<0x{byte:02X}>" for byte in range(256)]
    words += sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"] = {word: id for id, word in enumerate(words)}
    return json.dumps(spec)


def _texts() -> list[str]:
    """Runs of the text's words, so that tags are merged and their neighbours are not."""
    rng, words = random.Random(0), TEXT.split(" ")
    return [" ".join(rng.choices(words, k=6)) for _ in range(300)]
