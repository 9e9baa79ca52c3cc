"""An index finds what an exact search finds, under any filter, and is made anew when the table changes. Filters alone, too."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import stored_table

from ullme_ray.errors import DataError
from ullme_ray.evaluate import search_index, table_parts
from ullme_ray.evaluate.filters import matching_rows, parse_filter
from ullme_ray.evaluate.search import search
from ullme_ray.evaluate.search_index import open_index
from ullme_ray.evaluate.table_parts import TableRows
from ullme_ray.model import Encoder, open_encoder
from ullme_ray.spec import JobSpec
from ullme_ray.vectors import VectorFormat

NUM_ROWS, WIDTH = 3000, 64


def make_job(base: str, folder: Path, **search_spec: object) -> JobSpec:
    columns = ["text", "service", "year"]
    return JobSpec.model_validate(
        {
            "name": "docs",
            "storage": str(folder),
            "model": {"base": base, "max_tokens": 64},
            "embed": {"input": {"path": "corpus.jsonl", "id": "key", "columns": columns}},
            "search": search_spec,
        }
    )


def clustered(num_rows: int) -> np.ndarray:
    """Unit vectors around 50 centres, as those of texts of 50 subjects are."""
    draw = np.random.default_rng(5)
    vectors = draw.normal(size=(50, WIDTH))[draw.integers(50, size=num_rows)] + 0.6 * draw.normal(size=(num_rows, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TableRows:
    monkeypatch.setattr(table_parts, "BATCH_ROWS", 700)
    monkeypatch.setattr(search_index, "_BLOCK_ROWS", 1100)
    monkeypatch.setattr(search_index, "_LEAST_TRAINED", 1000)
    monkeypatch.setattr(search_index, "_FEW_ROWS", 0)
    columns = {
        "key": [f"k{row}" for row in range(NUM_ROWS)],
        "service": [("s3", "ec2", None)[row % 3] for row in range(NUM_ROWS)],
        "year": [2000 + row % 25 for row in range(NUM_ROWS)],
    }
    folder = tmp_path / "docs" / "embeddings"
    stored_table.write_table(folder, VectorFormat(), clustered(NUM_ROWS), columns, fingerprint="f" * 64)
    return TableRows.open(str(folder))


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("kind", ["bits", "faiss"])
def test_an_index_finds_nearly_all_that_an_exact_search_finds(tiny_base, tmp_path, table, kind, filtered):
    keep = np.arange(NUM_ROWS) % 3 == 0 if filtered else None
    index = open_index(make_job(tiny_base, tmp_path), table, kind)
    vectors, found, total = clustered(NUM_ROWS), 0, 0
    for question in clustered(40):
        cosines = vectors @ question
        allowed = np.flatnonzero(keep) if keep is not None else np.arange(NUM_ROWS)
        expected = allowed[np.argsort(-cosines[allowed], kind="stable")[:10]]
        hits = index.find(question, 10, keep, oversample=20)
        assert len(hits) == 10
        assert [score for _, score in hits] == pytest.approx(sorted((float(cosines[row]) for row, _ in hits), reverse=True))
        assert set(allowed) >= {row for row, _ in hits}
        found += len(set(expected) & {row for row, _ in hits})
        total += len(expected)
    assert found / total > 0.97
    few = sum(
        len({r for r, _ in index.find(q, 10, keep, oversample=1)} & set(np.argsort(-(vectors @ q))[:10])) for q in clustered(40)
    )
    assert few < found, "control: without candidates to spare the first pass alone decides, and misses more"


@pytest.mark.parametrize("kind", ["bits", "faiss"])
def test_an_index_is_kept_and_made_anew_for_another_version(tiny_base, tmp_path, table, kind):
    job = make_job(tiny_base, tmp_path)
    first = open_index(job, table, kind)
    mark = first.folder / "index.json"
    before = mark.stat().st_mtime_ns
    time.sleep(0.01)
    open_index(job, table, kind)
    assert mark.stat().st_mtime_ns == before
    newer = TableRows(table.path, "another", table.parts)
    assert open_index(job, newer, kind).num_rows == NUM_ROWS
    assert mark.stat().st_mtime_ns > before
    few = np.zeros(NUM_ROWS, bool)
    few[[7, 2999]] = True
    assert {row for row, _ in first.find(clustered(1)[0], 10, few, oversample=5)} == {7, 2999}


@pytest.fixture(scope="module")
def encoder(tiny_base: str) -> Encoder:
    return open_encoder(make_job(tiny_base, Path("unused")))


@pytest.mark.parametrize("index", ["exact", "bits", "faiss"])
def test_a_filtered_search_names_rows_and_chunks(tiny_base, tmp_path, encoder, index):
    texts = [f"the {verb} {noun}" for verb in ("deletes", "creates", "lists") for noun in ("bucket", "key", "table", "query")]
    columns = {
        "key": [f"k{row // 2}" for row in range(12)],
        "text": texts,
        "service": ["s3" if row < 6 else "ec2" for row in range(12)],
        "year": [2000 + row for row in range(12)],
        "chunk": [row % 2 for row in range(12)],
    }
    folder = tmp_path / "docs" / "embeddings"
    stored_table.write_table(folder, VectorFormat(), encoder.encode(texts), columns, fingerprint=encoder.fingerprint)
    job = make_job(tiny_base, tmp_path)
    hits = search(job, "bucket", top_k=20, where=["service = ec2", "year<2009"], index=index)
    cosines = encoder.encode(texts) @ encoder.encode(["bucket"], "query")[0]
    expected = sorted((6, 7, 8), key=lambda row: -cosines[row])
    assert [hit.columns["text"] for hit in hits] == [texts[row] for row in expected]
    assert [(hit.id, hit.chunk) for hit in hits] == [(f"k{row // 2}", row % 2) for row in expected]
    assert [hit.score for hit in hits] == pytest.approx([cosines[row] for row in expected], abs=1e-6)
    assert search(job, "bucket", top_k=3, where=["service = rds"], index=index) == []
    with pytest.raises(DataError, match=r"no column place; it has .*service, year.*embed\.input\.columns"):
        search(job, "bucket", top_k=3, where=["place=1"], index=index)
    with pytest.raises(DataError, match="--index hnsw is none of exact, bits, faiss"):
        search(job, "bucket", top_k=3, index="hnsw")
    with pytest.raises(DataError, match="--key must be a reference"):
        search(job, "bucket", top_k=3, index=index, url="http://127.0.0.1:9", key="sk-secret")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("service = s3", lambda service, year: service == "s3"),
        ("service='s3'", lambda service, year: service == "s3"),
        ("service != s3", lambda service, year: service != "s3"),
        ("service in s3, ec2", lambda service, year: service in ("s3", "ec2")),
        ("year>=2020", lambda service, year: year >= 2020),
        ("year < 2003", lambda service, year: year < 2003),
        ("year in 2001,2024", lambda service, year: year in (2001, 2024)),
        ("year != 2001", lambda service, year: year != 2001),
    ],
)
def test_filters_mean_what_they_say(table, text, expected):
    masks = [mask for mask in matching_rows(table, [parse_filter(text)]) if mask is not None]
    rows = [expected(("s3", "ec2", None)[row % 3], 2000 + row % 25) for row in range(NUM_ROWS)]
    assert np.concatenate(masks).tolist() == rows
    assert 0 < sum(rows) < NUM_ROWS


@pytest.mark.parametrize("text", ["service", "= s3", "service =", "", "year ~ 3"])
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(DataError, match="is no filter; write COLUMN=VALUE"):
        parse_filter(text)


def test_a_value_of_another_type_is_refused(table):
    with pytest.raises(DataError, match="'many' is no value of the column year, which holds int64"):
        matching_rows(table, [parse_filter("year > many")])
    day = pa.chunked_array([pa.array(["2024-01-01", "2025-06-01"]).cast(pa.date32())])
    assert parse_filter("day >= 2025-01-01").mask(day).tolist() == [False, True]
