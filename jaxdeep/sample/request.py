"""A request to an engine: what was asked for, what it samples from, and how far it is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxdeep.sample.pages import Lease
from jaxdeep.types import Completion, Sampling


@dataclasses.dataclass(eq=False)
class AdapterMix:
    """A weighted sum of the adapters in a bank, which requests sample from. It is also the key of
    the pages that were computed with it, so it is compared by identity.

    `mix_A` is the weight of each slot of the bank times the scale of the adapter in it; zeros are
    the base. `version` is handed on in completions. `users` counts the requests in flight. `named`
    is False once its name stands for something else: then no new request samples from it.
    """

    mix_A: np.ndarray
    version: int = 0
    users: int = 0
    named: bool = True


class Drawn(NamedTuple):
    """Tokens that a call drew for one request, with their log-probabilities as in `Completion`."""

    tokens: list[int]
    logps: list[float]
    drawn_logps: list[float]


@dataclasses.dataclass(eq=False)
class Request:
    """One turn to sample, and its state while it is in flight.

    `on_part` is called with each part of a turn that is streamed. `content` is the prompt and what
    was drawn after it; the keys and values of its first `computed` tokens are in the pages of
    `lease`, or will be after the call that is being prepared.
    """

    prompt: list[int]
    seed: int
    max_new: int
    sampling: Sampling
    mix: AdapterMix
    future: concurrent.futures.Future
    on_part: Callable[[Completion], None] | None = None
    submitted_at: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    drawn_logps: list[float] = dataclasses.field(default_factory=list)
    streamed: int = 0  # tokens that `on_part` has seen
    shard: int = 0
    lease: Lease | None = None
    computed: int = 0
    # kept beside `tokens`: joining the two at every call would copy whole conversations
    content: list[int] = dataclasses.field(init=False)
    stops: list[list[int]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.content = list(self.prompt)
        self.stops = [[s] if isinstance(s, int) else list(s) for s in self.sampling.stop]

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.max_new - len(self.tokens)

    @property
    def stop(self) -> Literal["stop", "length", ""]:
        """Why the turn has ended; "" while it goes on."""
        if any(self.tokens[-len(stop) :] == stop for stop in self.stops):
            return "stop"
        return "" if self.left else "length"

    def append(self, drawn: Drawn) -> None:
        """Add what a call drew."""
        self.content += drawn.tokens
        self.tokens += drawn.tokens
        self.logps += drawn.logps
        self.drawn_logps += drawn.drawn_logps

    def completion(self, start: int = 0) -> Completion:
        """What has been drawn, from the token `start` on."""
        return Completion(
            self.tokens[start:],
            self.logps[start:],
            self.stop,
            drawn_logps=self.drawn_logps[start:],
            version=self.mix.version,
        )
