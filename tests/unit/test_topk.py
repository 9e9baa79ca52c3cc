"""Tiled top-k equals a full sort, whatever the tiles, with ties decided by id."""

from __future__ import annotations

import numpy as np
import pytest

from ullme_ray.errors import DataError
from ullme_ray.retrieval import topk
from ullme_ray.retrieval.metrics import rank
from ullme_ray.retrieval.topk import merge_hits, top_k


def whole_numbers(rows: int, seed: int) -> np.ndarray:
    """Vectors of small whole numbers: inner products are exact in float32 and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, size=(rows, 8)).astype(np.float32)


def brute_force(queries: np.ndarray, ids: list, vectors: np.ndarray, k: int) -> list:
    scores = queries @ vectors.T
    best = [sorted(zip(row.tolist(), ids), reverse=True)[:k] for row in scores]
    return [[(id_, score) for score, id_ in row] for row in best]


@pytest.mark.parametrize("block_rows", [1, 7, 64, 500])
@pytest.mark.parametrize("tile_rows", [1, 33, 4096])
@pytest.mark.parametrize("as_text", [True, False])
def test_equals_a_full_sort_for_any_tiles(monkeypatch, block_rows, tile_rows, as_text):
    monkeypatch.setattr(topk, "TILE_ROWS", tile_rows)
    queries, vectors = whole_numbers(9, 1), whole_numbers(500, 2)
    ids = [f"passage-{n}" if as_text else n for n in range(500)]
    blocks = [(ids[s : s + block_rows], vectors[s : s + block_rows]) for s in range(0, 500, block_rows)]
    expected = brute_force(queries, ids, vectors, 10)
    assert any(row[-1][1] == row[-2][1] for row in expected), "no ties at the edge: the test would prove little"
    assert top_k(queries, iter(blocks), 10) == expected
    assert top_k(queries, reversed(blocks), 10) == expected


def test_order_of_ties_is_that_of_the_measures():
    ids, vectors = ["a", "c", "b", "Z"], np.ones((4, 8), np.float32)
    hits = top_k(vectors[:1], [(ids, vectors)], 3)[0]
    assert [id_ for id_, _ in hits] == rank(dict.fromkeys(ids, 1.0))[:3] == ["c", "b", "a"]


def test_small_and_empty_corpora():
    queries, vectors = whole_numbers(2, 1), whole_numbers(3, 2)
    assert [len(row) for row in top_k(queries, [(["a", "b", "c"], vectors)], 10)] == [3, 3]
    assert top_k(queries, [], 10) == [[], []]
    assert [len(row) for row in top_k(queries, [([], vectors[:0]), (["a"], vectors[:1])], 10)] == [1, 1]


def test_broken_vectors_are_refused():
    queries, vectors = whole_numbers(2, 1), whole_numbers(3, 2)
    with pytest.raises(DataError, match="width 8"):
        top_k(queries, [(["a", "b", "c"], vectors[:, :4])], 2)
    vectors[1, 3] = np.nan
    with pytest.raises(DataError, match="vector of b is not finite"):
        top_k(queries, [(["a", "b", "c"], vectors)], 2)


@pytest.mark.parametrize("block_rows", [1, 7, 500])
def test_an_id_that_comes_again_counts_by_its_best_vector(monkeypatch, block_rows):
    monkeypatch.setattr(topk, "TILE_ROWS", 16)
    queries, vectors = whole_numbers(9, 1), whole_numbers(500, 2)
    ids = [f"document-{n % 60}" for n in range(500)]
    blocks = [(ids[s : s + block_rows], vectors[s : s + block_rows]) for s in range(0, 500, block_rows)]
    best: list[dict] = [{} for _ in queries]
    for row, scores in zip(best, queries @ vectors.T):
        for id_, score in zip(ids, scores.tolist()):
            row[id_] = max(score, row.get(id_, score))
    expected = [sorted(((i, s) for i, s in row.items()), key=lambda hit: (hit[1], hit[0]), reverse=True)[:10] for row in best]
    assert top_k(queries, blocks, 10, repeated_ids=True) == expected
    halves = [top_k(queries, part, 10, repeated_ids=True) for part in (blocks[::2], blocks[1::2])]
    assert merge_hits(halves, 10) == expected
