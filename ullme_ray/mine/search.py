"""Exact ranking of passages for a block of queries, and the choice of negatives from it. Knows nothing of Ray.

Costs num_queries * (tile + 2 * depth) floats of memory, whatever the corpus. The order of filters is that of
sentence-transformers' mine_hard_negatives, so that its range_min, range_max, absolute_margin and relative_margin mean the same
as skip_first, depth, margin and 1 - ratio here (theirs lets a query look a few ranks beyond range_max, one a positive).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ullme_ray.spec.job import MineSpec

_CHOICE = 4  # an independent random stream of the job's seed; training has 1 to 3


@dataclass(frozen=True)
class Marked:
    """Pairs of a query and a passage that is never its negative: its positives, and a passage that is the query's own text."""

    rows: np.ndarray  # (M,) query, counted inside its block
    passages: np.ndarray  # (M,)
    is_positive: np.ndarray  # (M,)


@dataclass(frozen=True)
class Ranking:
    """The best unmarked candidates of each query, best first; a score of -inf stands where there are no more."""

    passages: np.ndarray  # (Q, K)
    scores: np.ndarray  # (Q, K)
    marked_scores: np.ndarray  # (M,)


@torch.inference_mode()
def rank(
    queries: np.ndarray,
    tiles: Iterable[tuple[int, np.ndarray]],
    marked: Marked,
    *,
    num_candidates: int,
    depth: int,
    device: str = "cpu",
) -> Ranking:
    """Ranks the first `num_candidates` passages; those behind them are there for the scores of marked pairs alone.

    Args:
        queries: (Q, D).
        tiles: all passages as (number of the first, vectors (T, D)).
    """
    query_vectors = torch.as_tensor(queries, device=device)
    best_scores = torch.empty((len(queries), 0), device=device)
    best_passages = torch.empty((len(queries), 0), dtype=torch.long, device=device)
    marked_scores = np.full(len(marked.rows), np.nan, dtype=np.float32)
    for start, vectors in tiles:
        scores = query_vectors @ torch.as_tensor(vectors, device=device).T  # (Q, T)
        here = np.flatnonzero((marked.passages >= start) & (marked.passages < start + len(vectors)))
        at = torch.as_tensor(marked.rows[here], device=device), torch.as_tensor(marked.passages[here] - start, device=device)
        marked_scores[here] = scores[at].cpu().numpy()
        scores[at] = -torch.inf
        scores = scores[:, : max(0, num_candidates - start)]
        tile_scores, columns = scores.topk(min(depth, scores.shape[1]), dim=1)
        best_scores = torch.cat([best_scores, tile_scores], dim=1)
        best_passages = torch.cat([best_passages, columns + start], dim=1)
        best_scores, order = best_scores.topk(min(depth, best_scores.shape[1]), dim=1)
        best_passages = best_passages.gather(1, order)
    assert not np.isnan(marked_scores).any(), "a marked passage is in no tile"
    found, passages = best_scores.cpu().numpy(), best_passages.cpu().numpy()
    order_of_ties = np.lexsort((passages, -found), axis=-1)
    return Ranking(
        np.take_along_axis(passages, order_of_ties, axis=1), np.take_along_axis(found, order_of_ties, axis=1), marked_scores
    )


def choose_negatives(
    ranking: Ranking, marked: Marked, mine: MineSpec, *, seed: int, first_query: int
) -> tuple[np.ndarray, np.ndarray]:
    """(passages, scores) of every query's negatives, best first, both (Q, negatives_per_query); -1 where there are too few."""
    num_queries = len(ranking.scores)
    worst_positive = np.full(num_queries, np.inf, dtype=np.float32)
    positives = marked.is_positive
    np.minimum.at(worst_positive, marked.rows[positives], ranking.marked_scores[positives])
    usable = np.isfinite(ranking.scores)
    if mine.margin is not None:
        usable &= ranking.scores < (worst_positive - mine.margin)[:, None]
    if mine.ratio is not None:  # a cosine may be below 0, where a plain product would allow higher scores than the positive's
        usable &= ranking.scores < (worst_positive - np.abs(worst_positive) * (1.0 - mine.ratio))[:, None]
    wanted = mine.negatives_per_query
    passages = np.full((num_queries, wanted), -1, dtype=np.int64)
    scores = np.zeros((num_queries, wanted), dtype=np.float32)
    for row in range(num_queries):
        left = np.flatnonzero(usable[row])[mine.skip_first :]
        if mine.choose == "random" and len(left) > wanted:
            generator = np.random.default_rng([seed, _CHOICE, first_query + row])
            left = np.sort(generator.choice(left, wanted, replace=False))
        left = left[:wanted]
        passages[row, : len(left)] = ranking.passages[row, left]
        scores[row, : len(left)] = ranking.scores[row, left]
    return passages, scores
