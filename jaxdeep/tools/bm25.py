"""BM25 over passages, in memory, by the bm25s library."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.tools.corpus import Passage

# bm25s starts JAX as it is imported, only to pick the best k, which is done with numpy below. That
# would claim the accelerator, and before jax.distributed is up; so JAX is hidden from it meanwhile.
_lax = sys.modules.get("jax.lax")
sys.modules["jax.lax"] = None  # type: ignore[assignment]
try:
    import bm25s
finally:
    if _lax is None:
        del sys.modules["jax.lax"]
    else:
        sys.modules["jax.lax"] = _lax
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG, once for each index built

_WORD = re.compile(r"\w+")


class BM25:
    """A ranking of passages by BM25 (Lucene's form, over the bm25s library) on their words.

    Words are runs of letters and digits of title and text in lower case, through `stem` if given.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        k1: float = 1.5,
        b: float = 0.75,
        stem: Callable[[str], str] | None = None,
    ) -> None:
        if not passages:
            raise DataError("no passages to index")
        self.passages = list(passages)
        self._stem = stem
        self._vocabulary: dict[str, int] = {}
        ids = [
            [self._vocabulary.setdefault(w, len(self._vocabulary)) for w in self._words(p)]
            for p in (f"{passage.title} {passage.text}" for passage in self.passages)
        ]
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        if self._vocabulary:
            self._index.index(
                (ids, self._vocabulary), create_empty_token=False, show_progress=False
            )

    def search(self, query: str, k: int) -> list[tuple[Passage, float]]:
        """The best `k` passages that share a word with the query, best first, ties in their order."""
        if k < 1:
            raise ValueError(f"need k >= 1, got {k=}")
        known = (self._vocabulary.get(word) for word in self._words(query))
        ids = [word for word in known if word is not None]
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)
        hits = np.flatnonzero(scores)
        if len(hits) > k:  # sort only what can be among the best
            hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
        best = hits[np.argsort(-scores[hits], kind="stable")][:k]
        return [(self.passages[i], float(scores[i])) for i in best]

    def _words(self, text: str) -> list[str]:
        words = _WORD.findall(text.lower())
        return words if self._stem is None else [self._stem(word) for word in words]
