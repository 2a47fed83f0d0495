"""A BM25 search engine over passages in memory, built on the bm25s library."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np

from jaxdeep.errors import DataError
from jaxdeep.tools.corpus import Passage
from jaxdeep.tools.words import index_words, query_words

# bm25s starts JAX when it is imported, only for its own top-k, which is done with numpy below. That
# would claim the accelerator in host processes, and before jax.distributed is initialized
# elsewhere: while it is imported, it must not find JAX.
_lax = sys.modules.get("jax.lax")
sys.modules["jax.lax"] = None  # type: ignore[assignment]
try:
    import bm25s
finally:
    if _lax is None:
        del sys.modules["jax.lax"]
    else:
        sys.modules["jax.lax"] = _lax
# It logs at DEBUG for each index that is built, unless told otherwise.
logging.getLogger("bm25s").setLevel(logging.WARNING)


class BM25:
    """Ranks passages by BM25 in Lucene's form.

    The words of a passage are those of its title and text (`words.index_words`), through `stem` if
    given. `k1` says how much a repeated word counts, `b` how much
    a long passage is discounted. DataError without a passage.
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
            [self._vocabulary.setdefault(w, len(self._vocabulary)) for w in index_words(p, stem)]
            for p in (f"{passage.title} {passage.text}" for passage in self.passages)
        ]
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        if self._vocabulary:
            self._index.index(
                (ids, self._vocabulary), create_empty_token=False, show_progress=False
            )

    def search(self, query: str, k: int) -> list[tuple[Passage, float]]:
        """The best `k` passages that share a word with the query, with their scores, best first; of
        equal ones the earlier first. ValueError: k below 1."""
        if k < 1:
            raise ValueError(f"need k >= 1, got {k=}")
        words = query_words(query, self._stem)
        ids = [self._vocabulary[word] for word in words if word in self._vocabulary]
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)
        hits = np.flatnonzero(scores)
        # A partition takes linear time: only the hits that can be among the best k are sorted. All
        # that tie with the k-th stay, so that the stable sort decides between them.
        if len(hits) > k:
            hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
        best = hits[np.argsort(-scores[hits], kind="stable")][:k]
        return [(self.passages[i], float(scores[i])) for i in best]
