"""Which rows a step sees: every row once per epoch on any number of ranks, and never a positive for a negative."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from ullme_ray.errors import DataError
from ullme_ray.pairs import Pair, Source
from ullme_ray.spec import JobSpec
from ullme_ray.train.collate import Example
from ullme_ray.train.data import BatchSampler


def make_job(path: str = "x", **train: Any) -> JobSpec:
    settings = {"data": [{"path": path}], "global_batch_size": 12, "max_steps": 40, **train}
    return JobSpec.model_validate({"name": "t", "model": {"base": "m"}, "train": settings})


def make_sampler(sources: list[Source], *, seed: int = 3, **train: Any) -> BatchSampler:
    spec = make_job(**train).train
    assert spec is not None
    return BatchSampler(sources, spec, seed=seed)


def make_source(name: str, num_rows: int, *, weight: float = 1.0, num_negatives: int = 1) -> Source:
    rows = range(num_rows)
    return Source(
        name,
        weight,
        [Pair(f"{name} q{i}", (f"{name} p{i}",), tuple(f"{name} n{i}.{j}" for j in range(num_negatives))) for i in rows],
    )


@pytest.mark.parametrize("num_rows", [1, 5, 12, 13, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_every_row_once_per_epoch_on_any_number_of_ranks(num_rows: int, world_size: int) -> None:
    sampler = make_sampler([make_source("s", num_rows)])
    per_rank = 12 // world_size
    walk: list[Example] = []
    for step in range(40):
        batch = [e for rank in range(world_size) for e in sampler.examples(step, rank * per_rank, per_rank)]
        assert [e.row for e in batch] == list(range(12))
        walk += batch
    epochs = [walk[start : start + num_rows] for start in range(0, len(walk) - num_rows + 1, num_rows)]
    assert len(epochs) == 480 // num_rows
    for epoch in epochs:
        assert {e.query for e in epoch} == {f"s q{i}" for i in range(num_rows)}
    if num_rows > 5:
        assert [e.query for e in epochs[0]] != [e.query for e in epochs[1]], "epochs are shuffled anew"
    # The same step asked of a new sampler, out of order and on one rank: what a resumed run does.
    again = make_sampler([make_source("s", num_rows)])
    for step in (39, 0, 17):
        assert again.examples(step, 0, 12) == walk[step * 12 : (step + 1) * 12]


def test_sources_are_mixed_by_weight_one_per_batch_and_each_walked_whole() -> None:
    sampler = make_sampler([make_source("a", 30, weight=3.0), make_source("b", 7)], max_steps=400)
    seen: dict[str, list[str]] = {"a": [], "b": []}
    for step in range(400):
        queries = [e.query for e in sampler.examples(step, 0, 12)]
        (source,) = {query[0] for query in queries}
        seen[source] += queries
    assert len(seen["a"]) / 4800 == pytest.approx(0.75, abs=0.08)
    for source, size in (("a", 30), ("b", 7)):
        counts = Counter(seen[source])
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_short_of_negatives_are_filled_up_with_other_rows_passages() -> None:
    sampler = make_sampler([make_source("s", 20, num_negatives=1)], negatives_per_query=3)
    for step in range(20):
        for example in sampler.examples(step, 0, 12):
            number = example.query.removeprefix("s q")
            assert example.negatives[0] == f"s n{number}.0"
            assert all(text.startswith("s p") for text in example.negatives[1:]), "its one negative would be counted thrice"
            assert not set(example.negatives) & set(example.positives)


def test_a_positive_of_the_same_query_in_another_row_is_not_drawn_as_negative() -> None:
    pairs = [Pair("same", (f"p{i}",), ()) for i in range(10)] + [Pair("other", ("far",), ())]
    sampler = make_sampler([Source("s", 1.0, pairs)])
    drawn = {(e.query, text) for step in range(20) for e in sampler.examples(step, 0, 12) for text in e.negatives}
    assert {text for query, text in drawn if query == "same"} == {"far"}


def test_negatives_and_positives_are_drawn_without_repetition_while_there_are_enough() -> None:
    pairs = [Pair(f"q{i}", ("p0", "p1", "p2"), tuple(f"n{j}" for j in range(5))) for i in range(4)]
    sampler = make_sampler([Source("s", 1.0, pairs)], positives_per_query=2, negatives_per_query=4)
    drawn: Counter[str] = Counter()
    for step in range(40):
        for example in sampler.examples(step, 0, 12):
            assert len(set(example.positives)) == 2
            assert len(set(example.negatives)) == 4
            drawn.update(example.negatives)
    shares = np.array(list(drawn.values())) / sum(drawn.values())
    assert len(shares) == 5
    assert abs(shares - 0.2).max() < 0.03


def test_one_passage_everywhere_is_told_and_does_not_hang() -> None:
    sampler = make_sampler([Source("s", 1.0, [Pair(f"q{i}", ("p",), ()) for i in range(3)])])
    with pytest.raises(DataError, match="no other one was found as negative"):
        sampler.examples(0, 0, 1)
