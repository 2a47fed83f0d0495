"""What an engine knows of a request, and of the policy it samples from."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from jaxdeep.sample.pages import Lease
from jaxdeep.types import Completion, Sampling


@dataclasses.dataclass(eq=False)
class AdapterMix:
    """What a request samples from: how much of each held adapter, alpha / rank included."""

    mix_A: np.ndarray
    version: int = 0
    users: int = 0


@dataclasses.dataclass(eq=False)
class Request:
    """A request, and what it holds while in progress."""

    prompt: list[int]
    seed: int
    max_new: int
    sampling: Sampling
    policy: AdapterMix
    future: concurrent.futures.Future
    sink: Callable[[Completion], None] | None
    since: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    chosen: list[float] = dataclasses.field(default_factory=list)
    streamed: int = 0
    shard: int = 0
    lease: Lease | None = None
    fed: int = 0  # tokens of the conversation whose keys and values are, or will be, in its pages
    stops: list[list[int]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.stops = [[s] if isinstance(s, int) else list(s) for s in self.sampling.stop]

    @property
    def content(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def left(self) -> int:
        return self.max_new - len(self.tokens)

    @property
    def stopped(self) -> bool:
        return any(self.tokens[-len(stop) :] == stop for stop in self.stops)

    def said(self, stop: str, start: int = 0) -> Completion:
        """What was sampled from the token `start` on."""
        tokens, logps, chosen = (x[start:] for x in (self.tokens, self.logps, self.chosen))
        return Completion(tokens, logps, stop, chosen, self.policy.version)
