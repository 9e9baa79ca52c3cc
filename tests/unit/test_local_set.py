"""Reading a set in BEIR layout: what is accepted, and that every broken row is named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ullme_ray.errors import DataError
from ullme_ray.retrieval.local_set import read_local_set

CORPUS = '{"_id": "a", "title": "T", "text": "alpha"}\n\n{"_id": "b", "text": "beta"}\n{"_id": 3, "title": "", "text": " "}\n'
QUERIES = '{"_id": "q1", "text": "one"}\n{"_id": "q2", "text": "two"}\n{"_id": "q3", "text": "three"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq2\t3\t1\nq3\tb\t0\n"


def write_set(folder: Path, corpus: str = CORPUS, queries: str = QUERIES, qrels: str = QRELS) -> str:
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return str(folder)


def test_a_good_set(tmp_path):
    local_set = read_local_set(write_set(tmp_path))
    assert local_set.passages == {"a": "T\nalpha", "b": "beta"}  # 3 has no text
    assert local_set.queries == {"q1": "one", "q2": "two"}  # q3 has no relevant passage
    assert local_set.qrels == {"q1": {"a": 2, "b": 0}, "q2": {"3": 1}}


def test_the_version_follows_the_content_and_nothing_else(tmp_path):
    version = read_local_set(write_set(tmp_path)).version
    assert read_local_set(write_set(tmp_path)).version == version
    assert read_local_set(write_set(tmp_path, qrels=QRELS.replace("\t2", "\t1"))).version != version
    assert read_local_set(write_set(tmp_path, corpus=CORPUS.replace("alpha", "Alpha"))).version != version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": CORPUS + "{"}, r"corpus\.jsonl line 5 is not JSON"),
        ({"corpus": CORPUS + '["x"]'}, r"corpus\.jsonl line 5 must be an object"),
        ({"corpus": CORPUS + '{"_id": "z"}'}, r"corpus\.jsonl line 5 must be an object like .*text"),
        ({"corpus": CORPUS + '{"id": "z", "text": "x"}'}, r"corpus\.jsonl line 5 must be an object like .*_id"),
        ({"corpus": CORPUS + '{"_id": "z", "text": 7}'}, r"corpus\.jsonl line 5 must be an object"),
        ({"corpus": CORPUS + '{"_id": "z", "title": 7, "text": "x"}'}, r"corpus\.jsonl line 5: _id and title must be text"),
        ({"corpus": CORPUS + '{"_id": "a", "text": "x"}'}, r"corpus\.jsonl line 5 has the _id a of line 1"),
        ({"corpus": "\n"}, r"corpus\.jsonl is empty"),
        ({"queries": QUERIES + "nonsense"}, r"queries\.jsonl line 4 is not JSON"),
        ({"queries": QUERIES.replace("one", " ")}, r"queries\.jsonl: query q1 has no text"),
        ({"qrels": ""}, r"test\.tsv line 1 must be the header query-id corpus-id score"),
        ({"qrels": "q1\ta\t1\n"}, r"test\.tsv line 1 must be the header"),
        ({"qrels": QRELS + "q1 a 1\n"}, r"test\.tsv line 6 has 1 columns; it must have 3"),
        ({"qrels": QRELS + "q1\t0\ta\t1\n"}, r"test\.tsv line 6 has 4 columns"),
        ({"qrels": QRELS + "q9\ta\t1\n"}, r"test\.tsv line 6: query q9 is not in queries\.jsonl"),
        ({"qrels": QRELS + "q2\tzz\t1\n"}, r"test\.tsv line 6: passage zz is not in corpus\.jsonl"),
        ({"qrels": QRELS + "q2\ta\t0.5\n"}, r"test\.tsv line 6: score 0\.5 is not a whole number"),
        ({"qrels": QRELS + "q1\ta\t1\n"}, r"test\.tsv line 6 judges passage a for query q1 a second time"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq3\tb\t0\n"}, r"test\.tsv names no relevant passage"),
    ],
)
def test_broken_rows_are_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_local_set(write_set(tmp_path, **change))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_set(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        read_local_set(folder)


def test_text_that_is_not_utf8_is_named(tmp_path):
    folder = write_set(tmp_path)
    (tmp_path / "queries.jsonl").write_bytes(QUERIES.encode() + b'{"_id": "q4", "text": "\xff"}')
    with pytest.raises(DataError, match=r"queries\.jsonl line 4 is not UTF-8"):
        read_local_set(folder)
