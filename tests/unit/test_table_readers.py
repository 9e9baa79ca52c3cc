"""Every reader that table.py names gets every row of every dtype as it was stored, under its id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from stored_table import make_vectors, write_table

from ullme_ray.table import open_table
from ullme_ray.vectors import VectorFormat, format_of

DTYPES = ("float32", "int8", "uint8", "binary", "ubinary")
VECTORS = make_vectors(70)
IDS = [f"doc-{row:02d}" for row in range(70)]
Rows = dict[str, np.ndarray]


def paths(table: DeltaTable) -> list[str]:
    return [uri.removeprefix("file://") for uri in table.file_uris()]


def by_id(ids: Any, vectors: Any) -> Rows:
    return {i: np.asarray(vector) for i, vector in zip(ids, vectors)}


def deltalake_table(table: DeltaTable) -> Rows:
    rows = table.to_pyarrow_table()
    return by_id(rows["id"].to_pylist(), rows["embedding"].to_numpy())


def deltalake_dataset(table: DeltaTable) -> Rows:
    rows = table.to_pyarrow_dataset().to_table(columns=["id", "embedding"])
    return by_id(rows["id"].to_pylist(), rows["embedding"].to_numpy())


def deltalake_pandas(table: DeltaTable) -> Rows:
    rows = table.to_pandas()
    return by_id(rows["id"], rows["embedding"])


def pandas_parquet(table: DeltaTable) -> Rows:
    rows = pd.read_parquet(paths(table))
    return by_id(rows["id"], rows["embedding"])


def polars_parquet(table: DeltaTable) -> Rows:
    rows = pl.scan_parquet(table.file_uris()).collect()
    assert isinstance(rows["embedding"].dtype, pl.Array)
    return by_id(rows["id"].to_list(), rows["embedding"].to_numpy())


def polars_delta(table: DeltaTable) -> Rows:
    rows = pl.read_delta(table.table_uri, use_pyarrow=True)
    return by_id(rows["id"].to_list(), (vector.to_numpy() for vector in rows["embedding"]))


def duckdb_parquet(table: DeltaTable) -> Rows:
    rows = duckdb.sql(f"SELECT id, embedding FROM read_parquet({paths(table)})").fetchall()
    return by_id([i for i, _ in rows], [vector for _, vector in rows])


def pyarrow_parquet(table: DeltaTable) -> Rows:
    rows = pa.concat_tables(pq.ParquetFile(path).read() for path in paths(table))
    assert pa.types.is_fixed_size_list(rows.schema.field("embedding").type)
    return by_id(rows["id"].to_pylist(), rows["embedding"].to_pylist())


BY_SCHEMA = (deltalake_table, deltalake_dataset, deltalake_pandas, polars_delta)
BY_PARTS = (pandas_parquet, polars_parquet, duckdb_parquet, pyarrow_parquet)


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeltaTable, VectorFormat]:
    form = VectorFormat(request.param)
    form = form.calibrated(VECTORS) if form.is_scaled else form
    folder = tmp_path_factory.mktemp(request.param) / "table"
    write_table(folder, form, VECTORS, {"id": IDS})
    return open_table(str(folder)), form


@pytest.mark.parametrize("read", BY_SCHEMA + BY_PARTS, ids=lambda read: read.__name__)
def test_a_reader_gets_what_was_stored(stored: tuple[DeltaTable, VectorFormat], read: Callable[[DeltaTable], Rows]) -> None:
    table, form = stored
    found, expected = read(table), form.encode(VECTORS)
    assert sorted(found) == IDS
    if read in (deltalake_table, deltalake_dataset, deltalake_pandas, pandas_parquet, polars_parquet, polars_delta):
        unsigned_by_schema = read in BY_SCHEMA and form.stored_type == np.uint8
        assert {vector.dtype for vector in found.values()} == {np.dtype(np.int16) if unsigned_by_schema else form.stored_type}
    read_back = np.stack([found[i] for i in IDS])
    np.testing.assert_array_equal(read_back, expected)
    assert not np.array_equal(read_back, expected[::-1]), "control: another order of rows"


def test_the_parts_alone_say_what_the_numbers_mean(stored: tuple[DeltaTable, VectorFormat]) -> None:
    table, form = stored
    schema = pq.read_schema(paths(table)[0])
    assert format_of(schema.metadata).ranges_data == form.ranges_data
    found = pyarrow_parquet(table)
    vectors = format_of(schema.metadata).decode(np.stack([found[i] for i in IDS]).astype(form.stored_type))
    assert (vectors * VECTORS).sum(axis=1).mean() > (0.7 if form.is_packed else 0.9999)


def test_duckdb_ranks_as_numpy_does(tmp_path: Path) -> None:
    """The query that README shows, on plain Parquet."""
    write_table(tmp_path / "table", VectorFormat(), VECTORS, {"id": IDS})
    files, question = paths(open_table(str(tmp_path / "table"))), VECTORS[11].tolist()
    rows = duckdb.sql(
        f"SELECT id FROM read_parquet({files}) "
        f"ORDER BY array_cosine_similarity(embedding::FLOAT[64], {question}::FLOAT[64]) DESC LIMIT 3"
    ).fetchall()
    assert [i for (i,) in rows] == [IDS[row] for row in np.argsort(-(VECTORS @ VECTORS[11]))[:3]]


def test_polars_own_delta_reader_still_refuses(tmp_path: Path) -> None:
    """Once this fails, table.py can name one reader more."""
    write_table(tmp_path / "table", VectorFormat(), VECTORS, {"id": IDS})
    with pytest.raises(pl.exceptions.SchemaError, match="data type mismatch"):
        pl.scan_delta(str(tmp_path / "table")).collect()
