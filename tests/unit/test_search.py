"""Search over a real Delta table with a real encoder in this process: the hits of a full sort, and clear refusals."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stored_table
from deltalake import Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

from ullme_ray.errors import DataError, EmbedError, ServeError, StorageError, UllmeError
from ullme_ray.evaluate import table_parts
from ullme_ray.evaluate.search import search
from ullme_ray.model import Encoder, open_encoder
from ullme_ray.spec import JobSpec
from ullme_ray.vectors import VectorFormat

TEXTS = [
    f"the {verb} {noun}" for verb in ("deletes", "creates", "makes private") for noun in ("bucket", "key", "table", "query")
]


def make_job(base: str, folder: Path, **sections: object) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "docs",
            "storage": str(folder),
            "model": {"base": base, "max_tokens": 64, "prompts": {"query": "question: "}},
            "embed": {"input": {"path": "corpus.jsonl", "id": "key", "columns": ["text", "place"]}},
            **sections,
        }
    )


def write_table(folder: Path, texts: list[str], vectors: np.ndarray, provenance: dict | None, *, num_parts: int = 3) -> None:
    """As `ullme-ray embed` writes it, in parts of uneven size, the last one empty."""
    folder.mkdir(parents=True)
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("chunk", pa.int32()),
            ("embedding", pa.list_(pa.float32())),
            ("text", pa.string()),
            ("place", pa.int64()),
        ]
    )
    cuts = [0, *sorted({len(texts) * part * part // num_parts**2 for part in range(1, num_parts)}), len(texts), len(texts)]
    actions = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        values = pa.array(vectors[start:stop].reshape(-1), pa.float32())
        columns = {
            "key": pa.array([f"k{row}" for row in range(start, stop)], pa.string()),
            "chunk": pa.array([0] * (stop - start), pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
            "text": pa.array(texts[start:stop], pa.string()),
            "place": pa.array(range(start, stop), pa.int64()),
        }
        rows = pa.table(columns)
        if provenance is not None:
            rows = rows.replace_schema_metadata({b"ullme_ray": json.dumps(provenance)})
        name = f"part-{number}.parquet"
        pq.write_table(rows, folder / name)
        statistics = json.dumps({"numRecords": stop - start})
        actions.append(AddAction(name, (folder / name).stat().st_size, {}, int(time.time() * 1000), True, statistics))
    create_table_with_add_actions(str(folder), Schema.from_arrow(schema), actions, name="docs")


@pytest.fixture(scope="module")
def encoder(tiny_base: str) -> Encoder:
    return open_encoder(make_job(tiny_base, Path("unused")))


@pytest.fixture
def table_job(tiny_base: str, tmp_path: Path, encoder: Encoder) -> JobSpec:
    job = make_job(tiny_base, tmp_path)
    write_table(tmp_path / "docs" / "embeddings", TEXTS, encoder.encode(TEXTS), {"fingerprint": encoder.fingerprint})
    return job


def test_hits_are_those_of_a_full_sort(table_job, encoder, monkeypatch):
    monkeypatch.setattr(table_parts, "BATCH_ROWS", 2)
    question = "how do I make a bucket private"
    cosines = encoder.encode(TEXTS) @ encoder.encode([question], "query")[0]
    hits = search(table_job, question, top_k=5)
    expected = np.argsort(-cosines, kind="stable")[:5]
    assert [hit.id for hit in hits] == [f"k{row}" for row in expected]
    assert [hit.columns for hit in hits] == [{"text": TEXTS[row], "place": row} for row in expected]
    assert [hit.score for hit in hits] == pytest.approx(cosines[expected].tolist(), abs=1e-6)
    assert len({hit.columns["place"] // 4 for hit in search(table_job, question, top_k=100)}) == 3, "hits of one part only"


@pytest.mark.parametrize("dims", [None, 16])
@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantised_and_cut_tables_are_ranked_by_what_they_stand_for(tiny_base, tmp_path, encoder, dtype, dims):
    vectors, form = encoder.encode(TEXTS), VectorFormat(dtype, dims)
    form = form.calibrated(vectors) if form.is_scaled else form
    ids = [f"k{row}" for row in range(len(TEXTS))]
    folder = tmp_path / "docs" / "embeddings"
    columns = {"key": ids, "text": TEXTS, "place": list(range(len(TEXTS)))}
    stored_table.write_table(folder, form, vectors, columns, fingerprint=encoder.fingerprint)
    question = "how do I make a bucket private"
    hits = search(make_job(tiny_base, tmp_path), question, top_k=5)
    asked = encoder.encode([question], "query")[:, :dims]
    cosines = form.decode(form.encode(vectors)) @ (asked / np.linalg.norm(asked))[0]
    expected = np.argsort(-cosines, kind="stable")[:5]
    assert [hit.score for hit in hits] == pytest.approx(cosines[expected].tolist(), abs=1e-6)
    assert [hit.columns["place"] for hit in hits] == expected.tolist()
    if form.is_scaled:
        raw = form.encode(vectors).astype(np.float32)
        unscaled = (raw / np.linalg.norm(raw, axis=1, keepdims=True)) @ (asked / np.linalg.norm(asked))[0]
        assert np.abs(unscaled - cosines).min() > 1e-3, "control: the bytes by themselves are other vectors"


def test_more_hits_than_rows_gives_all_rows(table_job):
    assert len(search(table_job, "bucket", top_k=100)) == len(TEXTS)


def test_rows_with_equal_vectors_come_in_table_order(tiny_base, tmp_path, encoder):
    vectors = np.repeat(encoder.encode(TEXTS[:1]), 12, axis=0)
    write_table(tmp_path / "docs" / "embeddings", TEXTS, vectors, {"fingerprint": encoder.fingerprint}, num_parts=1)
    hits = search(make_job(tiny_base, tmp_path), "bucket", top_k=4)
    assert [hit.id for hit in hits] == ["k0", "k1", "k2", "k3"]


def test_a_missing_table_says_what_to_run(tiny_base, tmp_path):
    with pytest.raises(StorageError, match="run `ullme-ray embed` on this job first"):
        search(make_job(tiny_base, tmp_path), "bucket", top_k=1)


def test_a_table_of_another_model_is_refused(tiny_base, tmp_path, encoder):
    write_table(tmp_path / "docs" / "embeddings", TEXTS, encoder.encode(TEXTS), {"fingerprint": "0" * 64})
    with pytest.raises(EmbedError, match=f"made by another model .*0000.*{encoder.fingerprint[:12]}.*run `ullme-ray embed`"):
        search(make_job(tiny_base, tmp_path), "bucket", top_k=1)


def test_a_table_of_another_program_is_refused(tiny_base, tmp_path, encoder):
    write_table(tmp_path / "docs" / "embeddings", TEXTS, encoder.encode(TEXTS), None)
    with pytest.raises(EmbedError, match="did not write"):
        search(make_job(tiny_base, tmp_path), "bucket", top_k=1)


def test_an_id_column_that_the_table_lacks_is_named(table_job):
    renamed = table_job.embed.input.model_copy(update={"id": "doc"})
    job = table_job.model_copy(update={"embed": table_job.embed.model_copy(update={"input": renamed})})
    with pytest.raises(EmbedError, match=r"no column doc \(embed\.input\.id\)"):
        search(job, "bucket", top_k=1)


def test_an_empty_question_and_a_job_without_embed_are_refused(table_job):
    with pytest.raises(DataError, match="question is empty"):
        search(table_job, "  ", top_k=1)
    with pytest.raises(UllmeError, match="no embed section"):
        search(table_job.model_copy(update={"embed": None}), "bucket", top_k=1)


def test_a_server_that_is_not_there_is_named(table_job):
    with pytest.raises(ServeError, match=r"no answer from http://127\.0\.0\.1:9.*ullme-ray serve"):
        search(table_job, "bucket", top_k=1, url="http://127.0.0.1:9")
