"""Text to token ids and back, with a door that no text can pass.

In comes the name of a `tokenizer.json` (a file, a folder, a model on the Hugging Face hub); out
come ids. `encode` is for text of any origin: whatever it says, no control token comes out. Only
`encode_control` reads `<|im_end|>` and its like in a text, as the published tokenizer does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from jaxdeep.errors import DataError

FILE = "tokenizer.json"


class Tokenizer:
    """The two readings of the text of a `tokenizer.json`: with control tokens and without."""

    def __init__(self, text: str) -> None:
        self.text = text
        spec = json.loads(text) | {"truncation": None, "padding": None}
        names = {token["content"] for token in spec["added_tokens"]}
        # Some tokenizers hold control tokens in their vocabulary too, where a word may match them.
        vocab = {word: id for word, id in spec["model"]["vocab"].items() if word not in names}
        plain = {
            "added_tokens": [],
            "post_processor": None,
            "model": spec["model"] | {"vocab": vocab},
        }
        self._published = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec | plain))
        self._ids = {name: self._published.token_to_id(name) for name in names}
        self.control = frozenset(self._ids.values())
        self.size = max(self._published.get_vocab().values()) + 1

    @classmethod
    def load(cls, name: str | Path) -> Tokenizer:
        """The tokenizer of a file, of a folder that holds one, or of a model on the hub."""
        path = Path(name)
        if path.is_dir():
            path = path / FILE
            if not path.is_file():
                raise DataError(f"{path} is absent: put the model's {FILE} into that folder")
        elif not path.is_file():
            path = _download(str(name))
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not a readable {FILE} ({error!r}): fetch it again"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of the text as plain text: never a control token, whatever it contains.

        Halves of surrogate pairs, which JSON can carry and UTF-8 cannot, become U+FFFD.
        """
        return self._plain.encode(_mend(text), add_special_tokens=False).ids

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of `encode`, and the character of the text that each starts with."""
        found = self._plain.encode(_mend(text), add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def encode_control(self, text: str) -> list[int]:
        """Ids of the text as published: control tokens in it count. For trusted text only."""
        return self._published.encode(_mend(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens shown; ids from `size` up (padding rows) have none."""
        return self._published.decode(ids, skip_special_tokens=False)

    def id(self, control_token: str) -> int:
        """The id of a control token, such as `<|im_end|>`."""
        if control_token not in self._ids:
            known = ", ".join(sorted(self._ids)) or "none"
            raise DataError(f"the tokenizer has no control token {control_token!r}; it has {known}")
        return self._ids[control_token]


def _download(name: str) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    try:
        return Path(huggingface_hub.hf_hub_download(name, FILE))
    except (OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as error:
        raise DataError(
            f"no tokenizer {name!r}: it is no local {FILE}, no folder that holds one, and the "
            f"Hugging Face hub did not give it ({error}). Check the name and the network, "
            "or pass a local path"
        ) from error


def _mend(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
