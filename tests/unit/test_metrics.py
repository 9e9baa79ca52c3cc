"""The measures equal trec_eval's own code (pytrec_eval, which mteb installs), ties and missing queries included."""

from __future__ import annotations

import random

import pytest
import pytrec_eval

from ullme_ray.retrieval.metrics import mean_scores, rank, score_run

K = 10
THEIRS = {f"ndcg@{K}": f"ndcg_cut_{K}", f"recall@{K}": f"recall_{K}", "map": "map", "mrr": "recip_rank", "ndcg": "ndcg"}


def random_case(seed: int) -> tuple[dict, dict]:
    """Few distinct scores (many ties), graded judgements, judged passages missing from the run, queries without a run."""
    draw = random.Random(seed)
    passages = [f"p{number}" for number in range(40)]
    qrels, run = {}, {}
    for number in range(6):
        query = f"q{number}"
        qrels[query] = {p: draw.choice([0, 1, 1, 2, 3]) for p in draw.sample(passages, draw.randint(1, 12))}
        if draw.random() < 0.8:
            levels = [draw.gauss(0, 1) for _ in range(draw.choice([2, 5, 1000]))]
            run[query] = {p: draw.choice(levels) for p in draw.sample(passages, draw.randint(1, 40))}
    return qrels, run


def test_equals_trec_eval_on_random_runs_with_ties_and_missing_queries():
    compared = missing = tied = 0
    for seed in range(1000):
        qrels, run = random_case(seed)
        ours = score_run(qrels, run, list(THEIRS))
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "map", "recip_rank", "ndcg"}).evaluate(run)
        assert set(ours) == set(qrels)
        for query in qrels:
            if query not in run:
                missing += 1
                assert set(ours[query].values()) == {0.0}
                continue
            compared += 1
            tied += len(set(run[query].values())) < len(run[query])
            for name, their_name in THEIRS.items():
                assert ours[query][name] == pytest.approx(theirs[query][their_name], abs=1e-6), (seed, query, name)
    assert compared > 3000
    assert missing > 100
    assert tied > 500


def test_mrr_at_k_equals_trec_evals_reciprocal_rank_of_the_cut_run():
    for seed in range(50):
        qrels, run = random_case(seed)
        cut = {query: {p: run[query][p] for p in rank(run[query])[:3]} for query in run}
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
        ours = score_run(qrels, run, ["mrr@3"])
        for query in run:
            assert ours[query]["mrr@3"] == pytest.approx(theirs[query]["recip_rank"], abs=1e-6)


def test_ties_go_to_the_largest_id():
    assert rank({"a": 1.0, "c": 1.0, "b": 2.0}) == ["b", "c", "a"]
    qrels = {"q": {"a": 1}}
    assert score_run(qrels, {"q": {"a": 1.0, "c": 1.0}}, ["mrr@10"])["q"]["mrr@10"] == 0.5
    assert score_run(qrels, {"q": {"a": 1.0, "A": 1.0}}, ["mrr@10"])["q"]["mrr@10"] == 1.0


def test_a_case_computed_by_hand():
    scores = score_run(
        {"q": {"x": 1, "y": 1, "gone": 1}}, {"q": {"x": 0.9, "n": 0.8, "y": 0.7}}, ["ndcg@2", "recall@3", "mrr@2", "map"]
    )
    assert scores["q"]["recall@3"] == pytest.approx(2 / 3)
    assert scores["q"]["map"] == pytest.approx((1 / 1 + 2 / 3) / 3)
    assert scores["q"]["mrr@2"] == 1.0
    assert scores["q"]["ndcg@2"] == pytest.approx(1 / (1 + 0.6309297535714574))


def test_mean_counts_a_query_without_a_run_as_zero():
    per_query = score_run({"q1": {"x": 1}, "q2": {"x": 1}}, {"q1": {"x": 1.0}}, ["recall@10"])
    assert mean_scores(per_query) == {"recall@10": 0.5}


@pytest.mark.parametrize("name", ["ndgc@10", "ndcg@", "ndcg@0", "recall@-1", "mrr@x"])
def test_an_unknown_measure_is_refused(name):
    with pytest.raises(ValueError, match="is not a measure"):
        score_run({"q": {"x": 1}}, {}, [name])
