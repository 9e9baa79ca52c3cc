"""Sets of rows become corpus, queries and judgements; samples are seeded; what is broken is named."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
import pytrec_eval

from ullme_ray.errors import DataError
from ullme_ray.retrieval.held_out import check_held_out, read_held_out
from ullme_ray.retrieval.metrics import rank
from ullme_ray.retrieval.trec import trec_lines
from ullme_ray.spec import JobSpec

ROWS = [
    {"query": "private bucket", "positive": "block public access", "negatives": ["list keys", "delete a bucket"]},
    {"query": "remove it", "positives": ["delete a bucket", "empty it first"]},
    {"query": "private bucket", "positive": "use a policy"},
]


def make_job(folder: Path, **local: object) -> JobSpec:
    return JobSpec.model_validate({"name": "a", "storage": str(folder), "model": {"base": "x"}, "evaluate": {"local": [local]}})


def write_rows(path: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz"])
def test_rows_of_one_query_are_joined_and_a_passage_is_one_text(tmp_path, name):
    found = read_held_out(make_job(tmp_path, path=write_rows(tmp_path / name, ROWS)), 0)
    assert list(found.queries.values()) == ["private bucket", "remove it"]
    text_of = found.passages
    assert sorted(text_of.values()) == sorted(
        ["block public access", "list keys", "delete a bucket", "empty it first", "use a policy"]
    )
    relevant = {found.queries[q]: {text_of[p] for p in judged} for q, judged in found.qrels.items()}
    assert relevant["private bucket"] == {"block public access", "use a policy"}
    assert relevant["remove it"] == {"delete a bucket", "empty it first"}


def test_further_rows_widen_the_corpus_alone(tmp_path):
    path = write_rows(tmp_path / "test.jsonl", ROWS)
    more = write_rows(tmp_path / "train.jsonl", [{"query": "other", "positive": "another passage", "negative": "list keys"}])
    plain = read_held_out(make_job(tmp_path, path=path), 0)
    found = read_held_out(make_job(tmp_path, path=path, corpus=[more]), 0)
    assert found.queries == plain.queries
    assert found.qrels == plain.qrels
    assert set(found.passages.values()) - set(plain.passages.values()) == {"another passage"}
    assert found.version != plain.version


def test_a_sample_of_queries_is_seeded_and_keeps_the_corpus(tmp_path):
    rows = [{"query": f"query {n}", "positive": f"passage {n}"} for n in range(50)]
    job = make_job(tmp_path, path=write_rows(tmp_path / "set.jsonl", rows), max_queries=10)
    found = read_held_out(job, 0)
    assert len(found.queries) == len(found.qrels) == 10
    assert len(found.passages) == 50
    assert read_held_out(job, 0) == found
    other = read_held_out(job.model_copy(update={"seed": 14}), 0)
    assert other.queries != found.queries
    assert other.version != found.version


def test_broken_sets_are_named(tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"query": "x"}])
    with pytest.raises(DataError, match=r"bad\.jsonl row 2 has no positive passage; repair it"):
        read_held_out(make_job(tmp_path, path=path), 0)
    with pytest.raises(DataError, match=r"evaluate\.local\.0\.path = .*none-\*\.jsonl matches no file"):
        check_held_out(make_job(tmp_path, path=str(tmp_path / "none-*.jsonl")), 0)
    with pytest.raises(DataError, match=r"evaluate\.local\.0\.corpus = .*gone\.jsonl matches no file"):
        check_held_out(make_job(tmp_path, path=path, corpus=[str(tmp_path / "gone.jsonl")]), 0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no row"):
        read_held_out(make_job(tmp_path, path=str(tmp_path / "empty.jsonl")), 0)


def test_queries_over_a_table_need_no_corpus(tmp_path):
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "queries.jsonl", [{"_id": "1", "text": "private bucket"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tdoc-7\t2\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl does not exist"):
        read_held_out(make_job(tmp_path, path=str(folder)), 0)
    job = make_job(tmp_path, path=str(folder), table=True)
    found = read_held_out(job.model_copy(update={}), 0)
    assert (found.queries, found.passages, found.qrels) == ({"1": "private bucket"}, {}, {"1": {"doc-7": 2}})
    with pytest.raises(DataError, match="rows, whose passages have no ids"):
        read_held_out(make_job(tmp_path, path=write_rows(tmp_path / "set.jsonl", ROWS), table=True), 0)


def test_a_run_survives_trec_format():
    run = {"q 1": {"b": 0.5, "a": 0.5, "c%20d": 0.1 + 1e-8, "c d": 0.25}, "q2": {"x": -1e-20}, "q3": {}}
    lines = list(trec_lines(run, "a model"))
    assert [line.split()[2] for line in lines[:4]] == ["b", "a", "c%20d", "c%2520d"]
    assert {len(line.split()) for line in lines} == {6}
    back = pytrec_eval.parse_run(io.StringIO("".join(lines)))
    assert {query: rank(scores) for query, scores in back.items()} == {"q%201": ["b", "a", "c%20d", "c%2520d"], "q2": ["x"]}
    assert back["q2"]["x"] == pytest.approx(-1e-20)
