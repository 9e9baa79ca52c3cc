"""Exact top-k by inner product, tile by tile: the corpus may be far larger than memory.

Costs num_queries * TILE_ROWS floats of memory besides the tiles' own, whatever the corpus. Equal scores are ordered by id, the
largest first, as trec_eval does, so the answer depends neither on the order nor on the grouping in which the corpus comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ullme_ray.errors import DataError

TILE_ROWS = 4096
Ids = np.ndarray | Sequence[Any]  # all text or all numbers


def top_k(
    queries: np.ndarray, blocks: Iterable[tuple[Ids, np.ndarray]], k: int, *, repeated_ids: bool = False
) -> list[list[tuple[Any, float]]]:
    """The k best (id, score) of every query, best first; fewer when the corpus is smaller.

    Args:
        queries: (Q, D).
        blocks: the corpus as (ids, vectors (n, D)) of any sizes; an id comes once.
        repeated_ids: an id may come several times, as that of a document in chunks does, and counts by its best vector.

    Raises:
        DataError: a vector is of another width, or not finite.
    """
    search = _TopK(np.ascontiguousarray(queries, dtype=np.float32), k, repeated_ids)
    for ids, vectors in blocks:
        search.add(np.asarray(ids), vectors)
    return search.best()


def best_of(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best ids with their scores, best first."""
    if len(scores) > k:
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]  # the k-th best score
        keep = np.flatnonzero(scores >= threshold)  # k or, with ties at the edge, more
        ids, scores = ids[keep], scores[keep]
    order = np.lexsort((ids, scores))[::-1][:k]
    return ids[order], scores[order]


def merge_hits(found: Iterable[list[list[tuple[Any, float]]]], k: int) -> list[list[tuple[Any, float]]]:
    """The answers of `top_k` over several parts of a corpus as one; an id found in more than one part counts by its best."""
    merged = []
    for hits in zip(*found, strict=True):
        best: dict[Any, float] = {}
        for id_, score in (hit for part in hits for hit in part):
            best[id_] = max(score, best.get(id_, score))
        ordered = sorted(((score, id_) for id_, score in best.items()), reverse=True)[:k]
        merged.append([(id_, score) for score, id_ in ordered])
    return merged


class _TopK:
    def __init__(self, queries: np.ndarray, k: int, repeated_ids: bool) -> None:
        self._queries = queries  # (Q, D)
        self._k = k
        self._repeated_ids = repeated_ids
        self._ids: list[np.ndarray | None] = [None] * len(queries)
        self._scores = [np.empty(0, np.float32) for _ in queries]

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self._queries.shape[1] or len(ids) != len(vectors):
            raise DataError(
                f"{len(ids)} ids with vectors of shape {vectors.shape} cannot be searched by queries of width "
                f"{self._queries.shape[1]}; query and corpus must come from the same model"
            )
        for start in range(0, len(ids), TILE_ROWS):
            tile_ids, tile = ids[start : start + TILE_ROWS], np.asarray(vectors[start : start + TILE_ROWS], dtype=np.float32)
            bad = np.flatnonzero(~np.isfinite(tile).all(axis=1))
            if len(bad):
                raise DataError(f"the vector of {tile_ids[bad[0]]} is not finite; embed it again")
            scores = self._queries @ tile.T  # (Q, T)
            for row in range(len(scores)):
                self._merge(row, tile_ids, scores[row])

    def _merge(self, row: int, ids: np.ndarray, scores: np.ndarray) -> None:
        known = self._ids[row]
        if known is not None:
            if len(known) == self._k:
                keep = np.flatnonzero(scores >= self._scores[row][-1])
                if not len(keep):
                    return
                ids, scores = ids[keep], scores[keep]
            ids, scores = np.concatenate([known, ids]), np.concatenate([self._scores[row], scores])
        if self._repeated_ids:
            # Dropping an id's weaker vectors is exact: the k ids that once stood above it only ever gain.
            order = np.argsort(-scores, kind="stable")
            _, first = np.unique(ids[order], return_index=True)
            ids, scores = ids[order[first]], scores[order[first]]
        self._ids[row], self._scores[row] = best_of(ids, scores, self._k)

    def best(self) -> list[list[tuple[Any, float]]]:
        return [[] if ids is None else list(zip(ids.tolist(), scores.tolist())) for ids, scores in zip(self._ids, self._scores)]
