"""BM25 (bm25s, its Lucene form with k1 = 1.5 and b = 0.75): what plain word matching reaches on the same set.

Words are lower-cased, English stop words left out, nothing stemmed. Passages that share no word with a query are not listed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

import bm25s
import numpy as np

from ullme_ray.retrieval.topk import best_of

FINGERPRINT = f"bm25s-{importlib.metadata.version('bm25s')}-lucene-k1=1.5-b=0.75-english"


def bm25_run(queries: Mapping[str, str], passages: Mapping[str, str], k: int) -> dict[str, dict[str, float]]:
    """Query id -> the k best passage ids with their scores, all above 0."""
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    words = _words(list(passages.values()))
    if not any(words):  # bm25s cannot index a corpus without a single word
        return {query: {} for query in queries}
    index.index(words, show_progress=False)
    ids = np.array(list(passages))
    run = {}
    for query, query_words in zip(queries, _words(list(queries.values()))):
        scores = index.get_scores(query_words) if query_words else np.zeros(len(ids), np.float32)
        best_ids, best_scores = best_of(ids, scores, k)
        run[query] = {id_: score for id_, score in zip(best_ids.tolist(), best_scores.tolist()) if score > 0}
    return run


def _words(texts: list[str]) -> list[list[str]]:
    words = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    assert isinstance(words, list)
    return words
