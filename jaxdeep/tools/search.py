"""What a search tool needs: an engine that ranks passages, a cache in front of it, results as
text."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Protocol

from jaxdeep.tools.corpus import Passage

SEARCH = "search"
"""The name that a model calls the search tool by, in every environment that has one."""

NO_RESULTS = "No results."


class Retriever(Protocol):
    """A search engine."""

    def search(self, query: str, k: int) -> Sequence[tuple[Passage, float]]:
        """The best `k` passages with their scores, best first."""
        ...


class CachedRetriever:
    """A search engine with a cache of its last `size` answers (LRU; 0 keeps none), for one that is
    slow or is paid for by the query."""

    def __init__(self, engine: Retriever, size: int) -> None:
        self.engine, self.size = engine, size
        self._answers: collections.OrderedDict[tuple[str, int], Sequence[tuple[Passage, float]]]
        self._answers, self._lock = collections.OrderedDict(), threading.Lock()

    def search(self, query: str, k: int) -> Sequence[tuple[Passage, float]]:
        """The best `k` passages with their scores, best first."""
        return self.look_up(query, k)[0]

    def look_up(self, query: str, k: int) -> tuple[Sequence[tuple[Passage, float]], bool]:
        """The answer of `search`, and whether it came from the cache."""
        with self._lock:  # tools run in threads
            if (query, k) in self._answers:
                self._answers.move_to_end((query, k))
                return self._answers[query, k], True
        # Without the lock: one slow query must not make others wait. The same query asked twice at
        # the same time then goes to the engine twice, which is harmless.
        answer = self.engine.search(query, k)
        with self._lock:
            self._answers[query, k] = answer
            while len(self._answers) > self.size:
                self._answers.popitem(last=False)
        return answer, False


def show(hits: Sequence[tuple[Passage, float]]) -> str:
    """The text of search results for a model: title and passage of each, numbered from 1."""
    texts = (f"Result {n}: {hit.title}\n{hit.text}" for n, (hit, _) in enumerate(hits, start=1))
    return "\n\n".join(texts) or NO_RESULTS
