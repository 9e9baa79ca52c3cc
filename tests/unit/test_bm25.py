"""BM25 on a set that a person can rank."""

from __future__ import annotations

from ullme_ray.evaluate.bm25 import bm25_run

PASSAGES = {
    "s3": "Deletes the bucket and every object in the bucket.",
    "ec2": "Starts an instance in the subnet.",
    "ec2-copy": "Starts an instance in the subnet.",
    "iam": "Attaches a policy to the role; the policy allows the instance to read.",
}


def test_passages_are_ranked_by_shared_words():
    run = bm25_run({"q": "delete a BUCKET", "r": "instance policy"}, PASSAGES, k=3)
    assert list(run["q"]) == ["s3"]
    assert next(iter(run["r"])) == "iam"
    assert list(run["r"]) == ["iam", "ec2-copy", "ec2"]  # equal scores: the largest id first
    assert run["r"]["ec2"] == run["r"]["ec2-copy"] > 0
    assert len(bm25_run({"r": "instance policy"}, PASSAGES, k=1)["r"]) == 1


def test_queries_without_any_known_word_find_nothing():
    assert bm25_run({"a": "the of", "b": "zebra", "c": ""}, PASSAGES, k=3) == {"a": {}, "b": {}, "c": {}}
    assert bm25_run({"a": "zebra"}, {"x": "the", "y": "?"}, k=3) == {"a": {}}
