"""What every search engine offers a tool: ranked passages, a cache before it, and their text for a model."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Protocol

from jaxdeep.tools.corpus import Passage

NO_RESULTS = "No results."


class Retriever(Protocol):
    """What a search engine has to offer: the best `k` passages with their scores, best first."""

    def search(self, query: str, k: int) -> Sequence[tuple[Passage, float]]: ...


class CachedRetriever:
    """A search engine whose last `size` answers are kept, for one that is slow or is paid by the query."""

    def __init__(self, engine: Retriever, size: int) -> None:
        self.engine, self.size = engine, size
        self._held: collections.OrderedDict[tuple[str, int], Sequence[tuple[Passage, float]]]
        self._held, self._lock = collections.OrderedDict(), threading.Lock()

    def search(self, query: str, k: int) -> Sequence[tuple[Passage, float]]:
        """The best `k` passages with their scores, best first."""
        return self.look_up(query, k)[0]

    def look_up(self, query: str, k: int) -> tuple[Sequence[tuple[Passage, float]], bool]:
        """The answer of `search`, and whether it was known from before."""
        with self._lock:  # tools run in threads
            if known := (query, k) in self._held:
                self._held.move_to_end((query, k))
                return self._held[query, k], known
        found = self.engine.search(query, k)
        with self._lock:
            self._held[query, k] = found
            while len(self._held) > self.size:
                self._held.popitem(last=False)
        return found, False


def show(hits: Sequence[tuple[Passage, float]]) -> str:
    """Hits as a model reads them."""
    shown = (f"Result {n}: {hit.title}\n{hit.text}" for n, (hit, _) in enumerate(hits, start=1))
    return "\n\n".join(shown) or NO_RESULTS
