"""The encoding of parts: what it saves, by count of bytes, and that nothing but the size changes."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme_ray.embed.parquet import parquet_bytes
from ullme_ray.vectors import VectorFormat

WIDTH = 128


def make_rows(num_rows: int, form: VectorFormat, *, lists: bool = False) -> pa.Table:
    drawn = np.random.default_rng(0).normal(size=(num_rows, WIDTH))
    vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    form = form.calibrated(vectors) if form.is_scaled else form
    columns = {
        "id": pa.array([f"row-{row}" for row in range(num_rows)]),
        "embedding": form.to_arrow(form.encode(vectors)),
        "content_hash": pa.array([f"{row:064x}" for row in range(num_rows)]),
        "lang": pa.array(["en", "de"] * (num_rows // 2)),
    }
    if lists:
        columns["tags"] = pa.array([[{"name": "a"}]] * num_rows)
    return pa.table(columns).replace_schema_metadata({b"ullme_ray": b"{}"})


def plain_bytes(rows: pa.Table) -> int:
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    return sink.tell()


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("num_rows", [0, 600])
def test_rows_and_metadata_come_back_as_they_were(dtype: str, num_rows: int) -> None:
    form = VectorFormat(dtype)
    form = form.calibrated(np.eye(WIDTH, dtype=np.float32)) if form.is_scaled else form
    rows = make_rows(600, form, lists=True).slice(0, num_rows)
    back = pq.read_table(io.BytesIO(parquet_bytes(rows)))
    assert back.schema.metadata == rows.schema.metadata
    assert back.schema.field("embedding").type == rows.schema.field("embedding").type
    assert back.to_pylist() == rows.to_pylist()
    assert back.num_rows == num_rows


def test_ten_bits_halve_a_float_vector_and_bytes_and_bits_quarter_it() -> None:
    def per_number(form: VectorFormat) -> float:
        rows = make_rows(2000, form).select(["embedding"])
        return len(parquet_bytes(rows)) / rows.num_rows / WIDTH

    exact = per_number(VectorFormat())
    assert exact < 3.6
    assert per_number(VectorFormat(mantissa_bits=10)) < 0.56 * exact
    assert per_number(VectorFormat(mantissa_bits=22)) > 0.9 * exact, "control: little rounded, little saved"
    assert per_number(VectorFormat("int8")) < 1.1
    assert per_number(VectorFormat("ubinary")) < 0.2


def test_float_vectors_are_split_by_bytes_without_dictionary_and_statistics() -> None:
    rows = make_rows(2000, VectorFormat())
    data = parquet_bytes(rows)
    assert len(data) < 0.9 * plain_bytes(rows)
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(rows.num_columns))}
    vector, content, lang = columns["embedding.list.element"], columns["content_hash"], columns["lang"]
    assert "BYTE_STREAM_SPLIT" in vector.encodings
    assert not vector.has_dictionary_page
    assert not vector.is_stats_set
    assert not content.has_dictionary_page
    assert lang.has_dictionary_page
    assert lang.is_stats_set
    assert {column.compression for column in columns.values()} == {"ZSTD"}


def test_row_groups_hold_about_as_many_bytes_whatever_the_width() -> None:
    def groups(width: int) -> int:
        values = pa.array(np.zeros(2**21, np.float32) + np.arange(2**21, dtype=np.float32))
        rows = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(values, width)})
        return int(pq.read_metadata(io.BytesIO(parquet_bytes(rows.slice(0, len(rows) // 16 * 15)))).num_row_groups)

    assert groups(64) == 1
    assert groups(2048) == 1  # 7.5 MiB
    wide = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**24, np.float32)), 4096)})
    assert pq.read_metadata(io.BytesIO(parquet_bytes(wide))).num_row_groups == 4  # 64 MiB
