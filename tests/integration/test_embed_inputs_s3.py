"""Corpora in a real S3 store: every kind of input gives the rows it gives on disk, and costs the bytes it needs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from s3fs.core import S3File

from ullme_ray import storage
from ullme_ray.embed import reading
from ullme_ray.embed.planning import plan_units
from ullme_ray.embed.units import Unit
from ullme_ray.errors import EmbedError
from ullme_ray.spec import JobSpec
from ullme_ray.table import delta_options

ROWS = [{"id": f"r{n}", "text": f"row {n}, with a comma\nand 漢字"} for n in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def job_for(path: str, folder: Path, **given: Any) -> JobSpec:
    settings = {"name": "c", "storage": str(folder / "runs"), "model": {"base": "x"}}
    return JobSpec.model_validate({**settings, "embed": {"input": {"path": path, **given}, "rows_per_unit": 7}})


def ids_and_texts(job: JobSpec, units: list[Unit] | None = None) -> list[tuple[str, str]]:
    assert job.embed is not None
    found = []
    for unit in units or plan_units(job):
        rows = reading.read_unit(unit, job.embed.input, reading.column_types(unit.file, job.embed.input))
        assert rows.dead.num_rows == 0
        found += list(zip(rows.good["id"].to_pylist(), rows.texts))
    return found


@pytest.fixture
def bucket(s3: Any) -> str:
    return str(s3.bucket("inputs"))


def put(local: Path, bucket: str) -> None:
    storage.put_folder(local, bucket)
    assert storage.list_files(bucket)


def test_every_kind_of_file_gives_the_rows_it_gives_on_disk(bucket: str, tmp_path: Path) -> None:
    corpus = tmp_path / "rows and more"  # a name that addresses must quote
    (corpus / "deep").mkdir(parents=True)
    (corpus / "a.jsonl").write_bytes(LINES)
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (corpus / "c.jsonl.zst").write_bytes(pa.compress(LINES, codec="zstd", asbytes=True))
    (corpus / "deep" / "d.csv").write_bytes(b"text,id\n" + b"".join(b'"a\n%d",%d\n' % (n, n) for n in range(20)))
    pq.write_table(pa.Table.from_pylist(ROWS), corpus / "deep" / "e.parquet", row_group_size=11)
    put(corpus, f"{bucket}/rows and more")
    on_disk = ids_and_texts(job_for(str(corpus), tmp_path, id="id"))
    assert len(on_disk) == 4 * 30 + 20
    assert ids_and_texts(job_for(f"{bucket}/rows and more", tmp_path, id="id")) == on_disk
    assert ids_and_texts(job_for(f"{bucket}/rows and more", tmp_path)) == ids_and_texts(job_for(str(corpus), tmp_path))
    deep = ids_and_texts(job_for(f"{bucket}/rows and more/**/*.parquet", tmp_path))
    assert deep == [(f"deep/e.parquet#{n}", row["text"]) for n, row in enumerate(ROWS)]


def test_plain_texts(bucket: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "deep").mkdir(parents=True)
    for n in range(40):
        (texts / ("deep" if n % 2 else "") / f"{n}.md").write_text(f"document {n}")
    put(texts, f"{bucket}/texts")
    job = job_for(f"{bucket}/texts", tmp_path)
    on_disk = ids_and_texts(job_for(str(texts), tmp_path))
    assert len(on_disk) == 40
    assert ids_and_texts(job) == on_disk
    units = plan_units(job)
    storage.write_bytes(f"{bucket}/texts/deep/1.md", b"changed")
    with pytest.raises(EmbedError, match="changed while it was read"):
        ids_and_texts(job, units)


def test_a_delta_table(bucket: str, tmp_path: Path) -> None:
    path = f"{bucket}/my table"
    rows = pa.table({**pa.Table.from_pylist(ROWS).to_pydict(), "lang": ["d/e", "e n"] * 15})
    write_deltalake(path, rows, partition_by=["lang"], storage_options=delta_options(path))
    DeltaTable(path, storage_options=delta_options(path)).delete("id = 'r3'")
    found = ids_and_texts(job_for(path, tmp_path, id="id"))
    assert sorted(found) == sorted((row["id"], row["text"]) for row in ROWS if row["id"] != "r3")
    with pytest.raises(EmbedError, match="lies in a Delta table"):
        plan_units(job_for(f"{path}/**/*.parquet", tmp_path))


def test_a_unit_fetches_little_more_than_its_own_rows(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store's client may read far ahead, so that each unit of a large file would cost the rest of it."""
    line = json.dumps({"id": "x", "text": "y" * 2**20}).encode() + b"\n"
    storage.write_bytes(f"{bucket}/large.jsonl", line * 64)
    job = job_for(f"{bucket}/large.jsonl", tmp_path)
    assert job.embed is not None
    (first, *_) = units = plan_units(job)
    assert len(units) == 10
    fetched = []
    fetch = S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        data: bytes = fetch(self, start, end)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    rows = reading.read_unit(first, job.embed.input, reading.column_types(first.file, job.embed.input))
    assert len(rows.texts) == 7
    assert 7 * 2**20 < sum(fetched) <= 24 * 2**20
