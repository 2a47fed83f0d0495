"""The architecture of a model, from a Hugging Face `config.json`, and how to compute it.

The names of arrays end in the letters of their dimensions: `x_BTD` is [B, T, D]. The letters are

    A  adapters in a bank                    N  query heads
    B  rows of a batch or of a call          P  pages (in the host half: prompts)
    C  devices along the axis `context`      Q  queries: positions that attend
    D  width                                 R  rank of an adapter
    E  experts                               S  slots of a page; keys that are attended to
    F  width of the mlp (of one expert)      T  positions of a row
    G  rollouts of a prompt                  V  vocabulary
    H  width of a head                       W  tokens of a stop sequence
    J  keys and values of the kv heads, 2 K  X  pages in a row's table
    K  kv heads                              Y  slots of the pages that are read together
    L  layers                                Z  stop sequences of a row
    M  query heads of a kv head

A small letter is a part of its capital: a device's share inside `shard_map` (`tokens_bt`), or one
block of a loop (`q_BNqH`). Some are sizes of their own, where their capital does not occur: `i` and
`o` the inputs and outputs of any linear, `y` and `z` numbers of blocks, and in a mixture `k` the
experts of a token, `n` the (token, expert) pairs, `m` those of one block. A digit is a dimension of
that size. A function that runs on one device's shard may write what it was given in capitals: the
rows it sees are its B.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.gguf_file import is_gguf
from jaxdeep.model import attention, gguf, hf_config, rope
from jaxdeep.model.families import FAMILIES, Family

REMAT = {"dots": ("linear", "attention"), "attention": ("attention",), "full": ()}
"""The named values of a layer that are kept for the backward pass, beside the layer's input, by
`model.remat`; everything else is recomputed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture, and how to compute it. It knows nothing of adapters."""

    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    theta: float
    eps: float
    tie: bool  # the embedding is also the head
    limit: int  # positions the model is made for
    family: str = "qwen3"  # a row of families.FAMILIES
    biases: tuple[str, ...] = ()  # linears that have one
    E: int = 0  # 0: dense
    top_k: int = 0  # experts per token
    norm_top_k: bool = True  # whether the weights of a token's experts are scaled to sum to one
    scaling: rope.Scaling | None = None  # of the rotary frequencies; None: plain
    window: int = 0  # the last positions that a windowed layer attends to; 0: there is none
    windowed: tuple[bool, ...] = ()  # which layers are; (): all, where there is a window
    dtype: str = "bfloat16"
    quant: str = ""  # "int8": the frozen linears are stored as int8, one scale per output
    remat: str = "full"  # the backward pass recomputes everything but REMAT[remat]
    attention: str = "auto"  # the kernel, one of attention.KINDS
    chunk: int = 256  # positions whose logits exist at one time

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ConfigError(f"model.remat={self.remat!r}: choose one of {', '.join(REMAT)}")
        if self.attention not in attention.KINDS:
            raise ConfigError(
                f"model.attention={self.attention!r}: choose one of {', '.join(attention.KINDS)}"
            )
        if self.quant not in ("", "int8"):
            raise ConfigError(f"model.quant={self.quant!r}: choose '' or 'int8'")
        if self.windowed and (not self.window or len(self.windowed) != self.L):
            raise ValueError(f"{self.windowed} of {self.L} layers have a window of {self.window}")

    @property
    def kind(self) -> Family:
        """What the models of this family have in common."""
        return FAMILIES["qwen3_moe" if self.E and self.family == "qwen3" else self.family]

    @property
    def windows(self) -> tuple[int, ...]:
        """How many of the last positions each layer attends to; 0: all of them."""
        return tuple(self.window * on for on in self.windowed or (True,) * self.L)

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | Mapping[str, Any], **changes: Any) -> Config:
        """The configuration in `source`: a config.json, its folder, or its content.

        `changes` replaces fields. CheckpointError for an architecture this package cannot compute.
        """
        hf, name = _read(source)
        return cls(**hf_config.architecture(hf, name) | changes)

    def to_hf(self) -> dict[str, Any]:
        """The same architecture as the content of a Hugging Face `config.json`."""
        return hf_config.content(self)


def _read(source: str | pathlib.Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The content of a config.json, and what error messages call it."""
    if isinstance(source, Mapping):
        return source, "the given config"
    path = pathlib.Path(source).expanduser()
    if is_gguf(path):
        return gguf.hf_config(path), str(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(path.read_text()), str(path)
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: no readable config.json ({error})") from error
