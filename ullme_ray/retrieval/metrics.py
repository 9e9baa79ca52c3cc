"""Retrieval measures as trec_eval defines them: nDCG@k, recall@k, MRR@k and MAP, per query and as a mean.

Rules that decide the last digits (the tests compare them with trec_eval itself):
- Passages are ranked by score, highest first; equal scores by id, the largest first. Scores are compared as float32.
- nDCG gains are the judged scores themselves, discounted by log2(rank + 1); the ideal ranking holds all judged passages.
- A passage is relevant when its judged score is 1 or more; an unjudged one is not.
- MRR@k is 0 when no relevant passage is in the first k.
- A judged query that the run lacks counts as 0 in the mean, and so does one without relevant passages.
  (trec_eval leaves missing queries out unless told -c; that rewards a system for failing.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Qrels = Mapping[str, Mapping[str, int]]  # query id -> passage id -> judged score
Run = Mapping[str, Mapping[str, float]]  # query id -> passage id -> score


def rank(scores: Mapping[str, float]) -> list[str]:
    """Passage ids, best first."""
    return [passage for _, passage in sorted(((np.float32(score), id_) for id_, score in scores.items()), reverse=True)]


def score_run(qrels: Qrels, run: Run, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Every measure of every judged query.

    Args:
        measures: names such as `ndcg@10`, `recall@100`, `mrr@10`, `map`; without `@k` the whole run counts.
    """
    parsed = [(name, *_parse(name)) for name in measures]
    result = {}
    for query, judged in qrels.items():
        ranked = rank(run.get(query, {}))
        gains = [max(judged.get(passage, 0), 0) for passage in ranked]
        ideal = sorted((score for score in judged.values() if score > 0), reverse=True)
        result[query] = {name: measure(gains[:k], ideal[:k], len(ideal)) for name, measure, k in parsed}
    return result


def mean_scores(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of every measure over all queries."""
    names = next(iter(per_query.values()), {}).keys()
    return {name: math.fsum(scores[name] for scores in per_query.values()) / len(per_query) for name in names}


def _ndcg(gains: Sequence[int], ideal: Sequence[int], num_relevant: int) -> float:
    return _dcg(gains) / _dcg(ideal) if ideal else 0.0


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(position + 2) for position, gain in enumerate(gains))


def _recall(gains: Sequence[int], ideal: Sequence[int], num_relevant: int) -> float:
    return sum(gain > 0 for gain in gains) / num_relevant if num_relevant else 0.0


def _reciprocal_rank(gains: Sequence[int], ideal: Sequence[int], num_relevant: int) -> float:
    return next((1.0 / (position + 1) for position, gain in enumerate(gains) if gain > 0), 0.0)


def _average_precision(gains: Sequence[int], ideal: Sequence[int], num_relevant: int) -> float:
    found, total = 0, 0.0
    for position, gain in enumerate(gains):
        if gain > 0:
            found += 1
            total += found / (position + 1)
    return total / num_relevant if num_relevant else 0.0


_Measure = Callable[[Sequence[int], Sequence[int], int], float]
_MEASURES: dict[str, _Measure] = {"ndcg": _ndcg, "recall": _recall, "mrr": _reciprocal_rank, "map": _average_precision}


def _parse(name: str) -> tuple[_Measure, int | None]:
    kind, separator, cut = name.partition("@")
    if kind not in _MEASURES or (separator and not (cut.isdigit() and int(cut) > 0)):
        raise ValueError(f"{name!r} is not a measure; use one of {', '.join(_MEASURES)}, each with or without @k")
    return _MEASURES[kind], int(cut) if separator else None
