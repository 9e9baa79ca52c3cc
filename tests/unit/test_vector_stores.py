"""Exports read back by each store's own client: all rows, nothing twice, nothing old, and nobody else's data touched."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from qdrant_client import QdrantClient, models
from stored_table import FINGERPRINT, make_vectors, write_table
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.errors import ExportError, StorageError, UllmeError
from ullme_ray.spec import JobSpec
from ullme_ray.vector_stores import export, faiss_store, lance_store, qdrant_store, run_export, snapshot
from ullme_ray.vectors import VectorFormat

DTYPES = ("float32", "int8", "uint8", "binary", "ubinary")
WIDTH = 64
Rows = dict[Any, tuple[np.ndarray, str]]  # id -> vector, language


def make_job(folder: Path, name: str = "docs", **sections: Any) -> JobSpec:
    sections = sections or {"embed": {"input": {"path": "in", "id": "key", "columns": ["lang", "tags"]}}}
    return JobSpec.model_validate({"name": name, "storage": str(folder), "model": {"base": "unused"}, **sections})


def fill(folder: Path, form: VectorFormat, rows: range, *, name: str = "docs", lang: str = "en") -> tuple[JobSpec, Rows]:
    """The next version of the job's table, with row n of the same vectors for n in `rows`; what the stores must then hold."""
    vectors = make_vectors(1000, WIDTH)[rows.start : rows.stop]
    form = form.calibrated(make_vectors(1000, WIDTH)) if form.is_scaled else form
    ids = [f"k{row}" for row in rows]
    tags = pa.array([[{"name": "a", "weight": row}] for row in rows])
    write_table(folder / name / "embeddings", form, vectors, {"key": ids, "lang": [lang] * len(ids), "tags": tags}, job=name)
    decoded = form.decode(form.encode(vectors))
    return make_job(folder, name), {i: (vector, lang) for i, vector in zip(ids, decoded)}


def read_lance(target: str, form: VectorFormat) -> Rows:
    rows = lance.dataset(target).to_table()
    noted = json.loads(rows.schema.metadata[b"ullme_ray"])
    assert noted["fingerprint"] == FINGERPRINT
    stored = rows["embedding"].combine_chunks()
    assert pa.types.is_fixed_size_list(stored.type)
    found = snapshot.format_of({b"ullme_ray": json.dumps(noted).encode()})
    assert found.dtype == form.dtype
    assert len(rows) == len(set(rows["key"].to_pylist()))
    assert rows["tags"].to_pylist()[0][0]["name"] == "a"
    vectors = found.decode(found.from_arrow(stored))
    return dict(zip(rows["key"].to_pylist(), zip(vectors, rows["lang"].to_pylist())))


def read_faiss(target: str, form: VectorFormat) -> Rows:
    rows = pq.read_table(f"{target}/ids.parquet")
    vectors = np.load(f"{target}/vectors.npy", mmap_mode="r")
    facts = json.loads(Path(target, "export.json").read_text())
    assert (facts["fingerprint"], facts["rows"], facts["dims"], facts["dtype"]) == (FINGERPRINT, len(rows), WIDTH, form.dtype)
    if form.is_packed:
        index = faiss.read_index_binary(f"{target}/index.faiss")
        signs = np.unpackbits(vectors, axis=1).astype(np.float32) * 2 - 1
        whole = signs / np.float32(np.sqrt(WIDTH))
        distances, found = index.search(np.asarray(vectors[:5]), 2)
        assert (distances == (signs[:5, None] != signs[found]).sum(axis=2)).all()
    else:
        whole = np.asarray(vectors)
        index = faiss.read_index(f"{target}/index.faiss")
        _, found = index.search(whole[:5], 2)
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert index.ntotal == len(rows)
    return dict(zip(rows["key"].to_pylist(), zip(whole, rows["lang"].to_pylist())))


def read_qdrant(target: str, form: VectorFormat) -> Rows:
    folder, _, collection = target.rpartition("/")
    client = QdrantClient(path=folder)
    points, _ = client.scroll(collection, limit=10_000, with_vectors=True)
    query = points[3].vector
    best = client.query_points(collection, query=query, limit=1).points[0]
    assert best.payload["key"] == points[3].payload["key"] or best.score == pytest.approx(1, abs=1e-5)
    client.close()
    assert points[0].payload["tags"][0]["name"] == "a"
    found = {point.payload["key"]: (np.asarray(point.vector, np.float32), point.payload["lang"]) for point in points}
    assert len(found) == len(points)
    return found


READERS: dict[str, Callable[[str, VectorFormat], Rows]] = {"lance": read_lance, "faiss": read_faiss, "qdrant": read_qdrant}


def assert_same(found: Rows, expected: Rows) -> None:
    assert found.keys() == expected.keys()
    for key, (vector, lang) in expected.items():
        np.testing.assert_allclose(found[key][0], vector, atol=2e-6)
        assert found[key][1] == lang


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", READERS)
def test_a_store_holds_every_row_of_the_table_and_follows_its_changes(store: str, dtype: str, tmp_path: Path) -> None:
    form, target = VectorFormat(dtype), str(tmp_path / "out" / "target")
    job, expected = fill(tmp_path, form, range(0, 60))
    report = run_export(job, store, target, progress=False)
    assert (report.rows, report.rows_in_store, report.written, report.version) == (60, 60, True, 0)
    assert_same(READERS[store](target, form), expected)

    again = run_export(job, store, target, progress=False)
    assert (again.rows_in_store, again.written) == (60, False)

    job, changed = fill(tmp_path, form, range(20, 70), lang="de")  # 20 rows went, 10 are new, 40 have another language
    with pytest.raises(AssertionError):
        assert_same(READERS[store](target, form), changed)  # control: the old version is seen as such
    report = run_export(job, store, target, progress=False)
    assert (report.rows, report.rows_in_store, report.written, report.version) == (50, 50, True, 1)
    assert_same(READERS[store](target, form), changed)


@pytest.mark.parametrize("store", READERS)
def test_what_another_job_wrote_is_left_alone(store: str, tmp_path: Path) -> None:
    target = str(tmp_path / "out" / "target")
    job, expected = fill(tmp_path, VectorFormat(), range(0, 20))
    run_export(job, store, target, progress=False)
    other, _ = fill(tmp_path, VectorFormat(), range(20, 30), name="other")
    with pytest.raises(ExportError, match=r"this job did not write; choose another"):
        run_export(other, store, target, progress=False)
    assert_same(READERS[store](target, VectorFormat()), expected)


@pytest.mark.parametrize("store", ["lance", "faiss"])
def test_a_folder_of_something_else_is_left_alone(store: str, tmp_path: Path) -> None:
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    target = tmp_path / "holiday"
    target.mkdir()
    (target / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"choose another --target"):
        run_export(job, store, str(target), progress=False)
    assert [path.name for path in target.iterdir()] == ["photo.jpg"]


def test_a_lance_dataset_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "theirs"))
    with pytest.raises(ExportError, match="holds a dataset that this job did not write"):
        run_export(job, "lance", str(tmp_path / "theirs"), progress=False)
    assert lance.dataset(str(tmp_path / "theirs")).to_table().to_pydict() == {"x": [1]}


def test_lance_finds_what_numpy_finds(tmp_path: Path) -> None:
    job, expected = fill(tmp_path, VectorFormat(), range(0, 300))
    run_export(job, "lance", str(tmp_path / "docs.lance"), progress=False)
    ids, vectors = list(expected), np.stack([vector for vector, _ in expected.values()])
    nearest = {"column": "embedding", "q": vectors[7], "k": 3, "metric": "cosine"}
    found = lance.dataset(str(tmp_path / "docs.lance")).to_table(nearest=nearest)["key"].to_pylist()
    assert found == [ids[row] for row in np.argsort(-(vectors @ vectors[7]))[:3]]


def test_a_lance_dataset_keeps_the_versions_that_it_had(tmp_path: Path) -> None:
    target = str(tmp_path / "docs.lance")
    for rows in (range(0, 20), range(5, 30)):
        job, _ = fill(tmp_path, VectorFormat(), rows)
        run_export(job, "lance", target, progress=False)
    assert [lance.dataset(target, version=version).count_rows() for version in (1, 2)] == [20, 25]


def test_lance_versions_go_once_the_next_one_has_stood_for_the_retention_time(tmp_path: Path) -> None:
    target = str(tmp_path / "docs.lance")
    for rows in (range(0, 20), range(5, 30), range(5, 40)):
        job, _ = fill(tmp_path, VectorFormat(), rows)
        run_export(job, "lance", target, progress=False)
    dataset = lance.dataset(target)
    dataset.tags.create("kept", 1)
    replaced = dataset.versions()[2]["timestamp"]

    def left(after: timedelta, hours: int | None = 168) -> list[int]:
        lance_store._remove_old_versions(dataset, hours, replaced + after)
        return [one["version"] for one in lance.dataset(target).versions()]

    assert left(timedelta(hours=167)) == [1, 2, 3]
    assert left(timedelta(hours=169), hours=None) == [1, 2, 3]
    assert left(timedelta(hours=169)) == [1, 3]
    assert lance.dataset(target).count_rows() == 35
    assert len(list(Path(target, "data").iterdir())) == 2


def test_a_first_lance_export_that_broke_off_is_made_whole(tmp_path: Path) -> None:
    job, expected = fill(tmp_path, VectorFormat(), range(0, 20))
    target = tmp_path / "docs.lance"
    (target / "data").mkdir(parents=True)
    (target / "data" / "0101.lance").write_bytes(b"half of it")
    assert run_export(job, "lance", str(target), progress=False).rows_in_store == 20
    assert_same(read_lance(str(target), VectorFormat()), expected)
    assert not run_export(job, "lance", str(target), progress=False).written


def test_a_qdrant_export_that_broke_off_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant_store, "POINTS_PER_REQUEST", 4)
    target = str(tmp_path / "vectors" / "docs")
    job, _ = fill(tmp_path, VectorFormat(), range(0, 40))
    run_export(job, "qdrant", target, progress=False)
    job, expected = fill(tmp_path, VectorFormat(), range(20, 60), lang="de")
    calls = []

    def dies(self: QdrantClient, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise ConnectionError("the server went away")
        return upsert(self, *args, **kwargs)

    upsert = QdrantClient.upsert
    monkeypatch.setattr(QdrantClient, "upsert", dies)
    with pytest.raises(ExportError, match=r"did not take the rows \(ConnectionError: the server went away\)"):
        run_export(job, "qdrant", target, progress=False)
    monkeypatch.setattr(QdrantClient, "upsert", upsert)
    halfway = read_qdrant(target, VectorFormat())
    assert halfway.keys() == {f"k{row}" for row in range(40)}, "readers find all old rows meanwhile"
    assert {lang for _, lang in halfway.values()} == {"en", "de"}
    assert run_export(job, "qdrant", target, progress=False).written
    assert_same(read_qdrant(target, VectorFormat()), expected)


def test_a_qdrant_collection_of_another_width_is_refused(tmp_path: Path) -> None:
    client = QdrantClient(path=str(tmp_path / "vectors"))
    client.create_collection("docs", models.VectorParams(size=8, distance=models.Distance.COSINE))
    client.close()
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    with pytest.raises(ExportError, match="is made for vectors of 8 numbers, and the table's have 64"):
        run_export(job, "qdrant", str(tmp_path / "vectors" / "docs"), progress=False)


def test_a_point_is_known_by_type_id_and_chunk() -> None:
    points = [qdrant_store.point_id(row_id, chunk) for row_id in ("1", 1, "2") for chunk in (0, 1)]
    assert len(set(points)) == len(points)
    assert qdrant_store.point_id("1", 0) == points[0]


def test_rows_that_share_id_and_chunk_are_counted(tmp_path: Path) -> None:
    vectors = make_vectors(4, WIDTH)
    columns = {"key": ["a", "b", "a", "c"], "lang": ["en"] * 4, "tags": pa.array([[{"name": "a"}]] * 4)}
    write_table(tmp_path / "docs" / "embeddings", VectorFormat(), vectors, columns)
    report = run_export(make_job(tmp_path), "qdrant", str(tmp_path / "vectors" / "docs"), progress=False)
    assert (report.rows, report.rows_in_store) == (4, 3)
    assert "1 rows have an id and chunk that another row has" in report.to_text()


def test_faiss_is_optional_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_store, "_MOST_INDEX_BYTES", 1000)
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    report = run_export(job, "faiss", str(tmp_path / "out"), progress=False)
    assert "index.faiss was left out" in report.note
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "ids.parquet", "vectors.npy"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("store", "module", "package"), [("lance", "lance", "pylance"), ("qdrant", "qdrant_client", "qdrant-client")]
)
def test_a_client_that_is_not_installed_is_named(
    store: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    with pytest.raises(ExportError, match=f"pip install {package}$"):
        run_export(job, store, str(tmp_path / "out" / "x"), progress=False)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="run `ullme-ray embed` on this job first"):
        run_export(make_job(tmp_path), "lance", str(tmp_path / "out"), progress=False)
    with pytest.raises(UllmeError, match="no embed section"):
        run_export(make_job(tmp_path, serve={}), "lance", str(tmp_path / "out"), progress=False)
    with pytest.raises(ExportError, match="--to pinecone is not known; use lance, faiss, qdrant, pgvector"):
        run_export(make_job(tmp_path), "pinecone", "x", progress=False)
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    with pytest.raises(ExportError, match="names no collection"):
        run_export(job, "qdrant", "http://localhost:6333", progress=False)
    with pytest.raises(ExportError, match=r"did not take the rows \("):
        run_export(job, "qdrant", "http://127.0.0.1:9/docs", progress=False)
    with pytest.raises(ExportError, match="pgvector needs --secret"):
        run_export(job, "pgvector", "docs", progress=False)


def test_a_secret_given_as_itself_is_refused_and_not_shown(tmp_path: Path) -> None:
    job, _ = fill(tmp_path, VectorFormat(), range(0, 20))
    with pytest.raises(ExportError, match="never the secret itself") as caught:
        run_export(job, "qdrant", "http://127.0.0.1:9/docs", "hunter2", progress=False)
    assert "hunter2" not in str(caught.value) + repr(caught.value.__context__ and caught.value.__suppress_context__)


def test_the_command(tmp_path: Path) -> None:
    fill(tmp_path, VectorFormat(), range(0, 20))
    job = tmp_path / "job.yaml"
    job.write_text(f"name: docs\nstorage: {tmp_path}\nmodel: {{base: m}}\nembed: {{input: {{path: in, id: key}}}}\n")
    command = ["export", str(job), "--to", "faiss", "--target", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "20 rows, version 0 of the table" in done.output
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["written"] is False
    assert CliRunner().invoke(app, [*command[:3], "nowhere", *command[4:]]).exit_code == 1
    assert set(export.STORES) == {"lance", "faiss", "qdrant", "pgvector"}
