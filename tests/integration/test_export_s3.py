"""Exports from a table on a real S3 server into folders on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lance
import numpy as np
import pytest
from s3_server import S3Server
from stored_table import make_vectors, write_table

from ullme_ray import storage
from ullme_ray.errors import ExportError
from ullme_ray.spec import JobSpec
from ullme_ray.table import delta_options
from ullme_ray.vector_stores import run_export
from ullme_ray.vectors import VectorFormat

VECTORS = make_vectors(90)


@pytest.fixture
def job(s3: S3Server, tmp_path: Path) -> JobSpec:
    write_table(tmp_path / "table", VectorFormat(), VECTORS, {"key": [f"k{row}" for row in range(90)]})
    root = s3.bucket(f"export-{os.getpid()}")
    storage.put_folder(tmp_path / "table", f"{root}/docs/embeddings")
    embed = {"input": {"path": "in", "id": "key"}}
    return JobSpec.model_validate({"name": "docs", "storage": root, "model": {"base": "unused"}, "embed": embed})


def test_lance_and_faiss_on_s3(job: JobSpec, tmp_path: Path) -> None:
    target = f"{job.storage}/docs.lance"
    assert run_export(job, "lance", target, progress=False).rows_in_store == 90
    assert not run_export(job, "lance", target, progress=False).written
    options = {name.lower(): value for name, value in delta_options(target).items()}
    rows = lance.dataset(target, storage_options=options).to_table()
    assert sorted(rows["key"].to_pylist()) == sorted(f"k{row}" for row in range(90))

    folder = f"{job.storage}/faiss"
    assert run_export(job, "faiss", folder, progress=False).rows_in_store == 90
    assert not run_export(job, "faiss", folder, progress=False).written
    (tmp_path / "vectors.npy").write_bytes(storage.read_bytes(f"{folder}/vectors.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), VECTORS)
    assert json.loads(storage.read_text(f"{folder}/export.json"))["rows"] == 90

    storage.write_text(f"{job.storage}/theirs/photo.jpg", "x")
    for store in ("lance", "faiss"):
        with pytest.raises(ExportError, match="choose another --target"):
            run_export(job, store, f"{job.storage}/theirs", progress=False)
