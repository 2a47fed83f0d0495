"""Text to token ids and back, where no text can forge a control token.

`Tokenizer.load` takes a `tokenizer.json`: a file, a folder that holds one, or a model on the
Hugging Face hub. `encode` is for text of any origin: whatever it says, no control token comes out.
Only `encode_control` reads `<|im_end|>` and its like in a text, as the published tokenizer does.
`TextDecoder` turns ids into text while they are still being sampled.

Byte-level vocabularies and those of SentencePiece with tokens for single bytes are known. What
SentencePiece puts before the first word of a text is left out, in both directions: a text in a
conversation is no first one, and published templates write that space themselves.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxdeep.chat import gguf_tokenizer
from jaxdeep.errors import DataError
from jaxdeep.gguf_file import is_gguf
from jaxdeep.workdir import home

FILE = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"  # which has the template of older models
SPACE = "▁"  # how SentencePiece writes a space
SINGLE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for, as GPT-2 assigned them:
    printable Latin-1 characters stand for themselves, the other bytes for the characters from
    U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= set(range(ord("®"), ord("ÿ") + 1))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


BYTES = _byte_alphabet()


class Tokenizer:
    """A `tokenizer.json`, given as its text, read in two ways: with its control tokens and without.

    `control` are the ids of the control tokens, `size` is one more than the largest id. `template`
    is the chat template that came with it, "" where none did.
    """

    def __init__(self, text: str, template: str = "") -> None:
        self.text = text
        self.template = template
        spec = json.loads(text) | {"truncation": None, "padding": None}
        spec |= {
            key: _without_first_space(spec.get(key)) for key in ("normalizer", "pre_tokenizer")
        }
        names = {token["content"] for token in spec["added_tokens"]}
        # Some tokenizers have control tokens in their vocabulary as well, where plain text that
        # spells one would match it: the plain reading has neither.
        vocab = {word: id for word, id in spec["model"]["vocab"].items() if word not in names}
        model = spec["model"] | {"vocab": vocab}
        if names & spec["model"]["vocab"].keys() and (merges := model.get("merges")):
            model["merges"] = [merge for merge in merges if not names & _words(merge)]
        plain = {"added_tokens": [], "post_processor": None, "model": model}
        self._published = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec | plain))
        self._ids = {name: self._published.token_to_id(name) for name in names}
        self.control = frozenset(self._ids.values())
        self.size = max(self._published.get_vocab().values()) + 1
        self.byte_level = (spec.get("decoder") or {}).get("type") == "ByteLevel"
        self.byte_fallback = bool(spec["model"].get("byte_fallback"))

    @classmethod
    def load(cls, name: str | Path) -> Tokenizer:
        """The tokenizer of a file (tokenizer.json or GGUF), of a folder that holds one, or of a
        model on the hub."""
        path = home(name)
        if is_gguf(path) and path.is_file():
            return cls(gguf_tokenizer.tokenizer_json(path), gguf_tokenizer.chat_template(path))
        if path.is_dir():
            path = path / FILE
            if not path.is_file():
                raise DataError(f"{path} is absent: put the model's {FILE} into that folder")
        if not path.is_file():
            path = _download(str(name), FILE, needed=True)
            templates = [_download(str(name), file) for file in (TEMPLATE, CONFIG)]
        else:
            templates = [path.parent / TEMPLATE, path.parent / CONFIG]
        try:
            return cls(path.read_text(encoding="utf-8"), _template(templates))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not a readable {FILE} ({error!r}): fetch it again"
            ) from error

    @property
    def files(self) -> dict[str, str]:
        """The text of each file that `load` reads, by its name."""
        return {FILE: self.text} | ({TEMPLATE: self.template} if self.template else {})

    def encode(self, text: str) -> list[int]:
        """Ids of the text as plain text: never a control token, whatever it contains.

        Halves of surrogate pairs, which JSON can carry and UTF-8 cannot, become U+FFFD.
        """
        return self._plain.encode(_mend(text), add_special_tokens=False).ids

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of `encode`, and for each the index of the character that it starts with."""
        encoding = self._plain.encode(_mend(text), add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def encode_control(self, text: str) -> list[int]:
        """Ids of the text as the published tokenizer reads it: control tokens in it count. For
        trusted text only."""
        return self._published.encode(_mend(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included; ids from `size` up (padding of the embedding)
        have none. Bytes that are not UTF-8 become U+FFFD."""
        if self.byte_fallback and not self.byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return self._published.decode(ids, skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer or one of SentencePiece, which need not be
        whole characters; none for ids from `size` up."""
        token = self._published.id_to_token(id) or ""
        if not self.byte_level:
            if id in self.control:
                return token.encode()
            byte = SINGLE_BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        try:
            return bytes(BYTES[letter] for letter in token)
        except KeyError:  # a control token with letters outside the alphabet
            return token.encode()

    def has(self, control_token: str) -> bool:
        """Whether there is such a control token."""
        return control_token in self._ids

    def id(self, control_token: str) -> int:
        """The id of a control token, such as `<|im_end|>`; DataError where there is none."""
        if control_token not in self._ids:
            known = ", ".join(sorted(self._ids)) or "none"
            raise DataError(f"the tokenizer has no control token '{control_token}'; it has {known}")
        return self._ids[control_token]


class TextDecoder:
    """`Tokenizer.decode` for ids that come bit by bit, at constant work per id: the texts of `feed`
    and `flush` joined are what `decode` says of all ids between two flushes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not (tokenizer.byte_level or tokenizer.byte_fallback):
            raise DataError(
                "only the text of a byte-level tokenizer, or of one of SentencePiece with tokens for "
                "single bytes, can be decoded token by token"
            )
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete."""
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        """U+FFFD for the beginning of a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


def _words(merge: str | Sequence[str]) -> set[str]:
    """The words that a merge is of, and the one that it makes."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}


def _without_first_space(step: Any) -> Any:
    """A step of a tokenizer without what it would put before the first word of a text."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    if step.get("type") == "Metaspace":
        return step | {"prepend_scheme": "never"}
    for inside in ("normalizers", "pretokenizers"):
        if step.get("type") == "Sequence" and inside in step:
            kept = [_without_first_space(inner) for inner in step[inside]]
            return step | {inside: [inner for inner in kept if inner is not None]}
    return step


def _template(paths: Iterable[Path | None]) -> str:
    """The chat template in the first of these files that has one: a file of its own, or in a
    configuration, by name where there are several."""
    for path in paths:
        if path is None or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if path.name != CONFIG:
            return text
        try:
            found = json.loads(text).get("chat_template") or ""
            if isinstance(found, list):
                found = {entry["name"]: entry["template"] for entry in found}["default"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} has no chat_template that can be read ({error!r})") from error
        return found
    return ""


def _download(name: str, file: str, *, needed: bool = False) -> Path | None:
    """A file of a model on the hub; None where it has no such file, unless that is needed."""
    import huggingface_hub  # slow to import, and only needed here
    from huggingface_hub.errors import EntryNotFoundError as absent

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except (OSError, ValueError, absent) as error:
        if isinstance(error, absent) and not needed:
            return None
        raise DataError(
            f"no tokenizer {name!r}: it is no local {FILE}, no folder that holds one, and the "
            f"Hugging Face hub did not give it ({error}). Check the name and the network, "
            "or pass a local path"
        ) from error


def _mend(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which the tokenizer would refuse."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
