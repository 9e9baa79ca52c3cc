"""A PostgreSQL table with pgvector: one transaction copies all rows in, changes those that differ and removes those that went.

So readers see the old rows or the new, unchanged rows are not touched (nor is an index on them), and an export that breaks off
leaves nothing. Vectors are `vector(D)` (int8 and uint8 are scaled back), bits `bit(D)`; the key is id and chunk; the table's
comment is the mark. Makes no index on vectors: `CREATE INDEX ... USING hnsw (embedding vector_cosine_ops)` is yours to choose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ullme_ray.errors import ExportError
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.vector_stores.snapshot import Batch, Mark, Snapshot, Stored, load_client, plain_values


def export(snapshot: Snapshot, target: str, secret: SecretRef | None) -> Stored:
    psycopg = load_client("psycopg", "psycopg[binary]")
    if secret is None:
        raise ExportError(
            "pgvector needs --secret env:NAME or file:PATH with the connection string, postgresql://USER:PASSWORD@HOST/DB"
        )
    name = tuple(target.split("."))
    if not all(name) or len(name) > 2:
        raise ExportError(f"--target {target} is no table; use TABLE or SCHEMA.TABLE")
    try:
        with psycopg.connect(secret.reveal().get_secret_value(), connect_timeout=30) as connection:
            return _Upload(connection, name, snapshot).run()
    except psycopg.Error as error:  # it names host, database and user, and no password
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"PostgreSQL did not take the rows for table {target} ({reason})") from error


class _Upload:
    """One export in one transaction, which the connection commits when its block ends."""

    def __init__(self, connection: Any, name: tuple[str, ...], snapshot: Snapshot) -> None:
        from psycopg import sql

        self._connection = connection
        self._snapshot = snapshot
        self._shown = ".".join(name)
        self._table = sql.Identifier(*name)
        self._columns = {field.name: _sql_type(field.type) for field in snapshot.columns}
        self._columns["embedding"] = f"{'bit' if snapshot.form.is_packed else 'vector'}({snapshot.dims})"
        self._key = (snapshot.id_name, "chunk")

    def run(self) -> Stored:
        self._do("SELECT pg_advisory_xact_lock(hashtext(%s))", [self._shown])  # exports into one table follow one another
        self._prepare_extension()
        if self._value("SELECT to_regclass(%s)", [self._table.as_string(self._connection)]) is None:
            self._do("CREATE TABLE {table} ({columns}, PRIMARY KEY ({key}))")
        else:
            mark = self._check_owner()
            if mark == self._snapshot.mark:
                return Stored(self._value("SELECT count(*) FROM {table}"), written=False)
        self._copy()
        self._merge()
        self._do("COMMENT ON TABLE {table} IS {mark}")
        return Stored(self._value("SELECT count(*) FROM {table}"))

    def _prepare_extension(self) -> None:
        if self._value("SELECT 1 FROM pg_extension WHERE extname = 'vector'"):
            return
        if not self._value("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
            raise ExportError("this PostgreSQL server has no pgvector; install the extension `vector` on it")
        self._do("CREATE EXTENSION vector")

    def _check_owner(self) -> Mark | None:
        mark = Mark.parse(self._value("SELECT obj_description({quoted}::regclass, 'pg_class')"))
        if mark is None or mark.job != self._snapshot.mark.job:
            raise ExportError(f"table {self._shown} holds what this job did not write; choose another --target")
        found = self._connection.execute(
            self._sql(
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
                "WHERE attrelid = {quoted}::regclass AND attnum > 0 AND NOT attisdropped"
            )
        ).fetchall()
        if dict(found) != self._columns:
            raise ExportError(
                f"table {self._shown} has columns {_named(dict(found))}, and the embeddings have {_named(self._columns)}; "
                "drop it, or choose another --target"
            )
        return mark

    def _copy(self) -> None:
        self._do("CREATE TEMPORARY TABLE incoming (LIKE {table}) ON COMMIT DROP")
        with self._connection.cursor() as cursor, cursor.copy(self._sql("COPY incoming ({names}) FROM STDIN")) as copy:
            for batch in self._snapshot.batches():
                for row in _rows(self._snapshot, batch):
                    copy.write_row(row)

    def _merge(self) -> None:
        self._do(
            "INSERT INTO {table} AS old ({names}) SELECT DISTINCT ON ({key}) {names} FROM incoming "
            "ON CONFLICT ({key}) DO UPDATE SET {changes} WHERE ({old}) IS DISTINCT FROM ({excluded})"
        )
        self._do("CREATE INDEX ON incoming ({key})")
        self._do("ANALYZE incoming")
        self._do("DELETE FROM {table} old WHERE NOT EXISTS (SELECT 1 FROM incoming new WHERE {same_key})")

    def _do(self, statement: str, values: list[Any] | None = None) -> Any:
        return self._connection.execute(self._sql(statement), values)

    def _value(self, statement: str, values: list[Any] | None = None) -> Any:
        row = self._do(statement, values).fetchone()
        return row[0] if row else None

    def _sql(self, statement: str) -> Any:
        from psycopg import sql

        def joined(form: str, names: Any) -> Any:
            return sql.SQL(", ").join(sql.SQL(form).format(sql.Identifier(name)) for name in names)

        return sql.SQL(statement).format(
            table=self._table,
            quoted=sql.Literal(self._table.as_string(self._connection)),
            names=joined("{}", self._columns),
            key=joined("{}", self._key),
            columns=sql.SQL(", ").join(sql.SQL("{} " + kind).format(sql.Identifier(n)) for n, kind in self._columns.items()),
            changes=joined("{0} = excluded.{0}", [name for name in self._columns if name not in self._key]),
            old=joined("old.{}", self._columns),
            excluded=joined("excluded.{}", self._columns),
            same_key=sql.SQL(" AND ").join(sql.SQL("old.{0} = new.{0}").format(sql.Identifier(name)) for name in self._key),
            mark=sql.Literal(self._snapshot.mark.dump()),
        )


def _named(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns.items())


def _sql_type(kind: pa.DataType) -> str:
    """PostgreSQL's type, by the name that it gives it itself."""
    simple: list[tuple[Callable[[pa.DataType], bool], str]] = [
        (lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t), "text"),
        (pa.types.is_uint64, "numeric"),
        (pa.types.is_integer, "bigint"),
        (pa.types.is_floating, "double precision"),
        (pa.types.is_boolean, "boolean"),
        (pa.types.is_date, "date"),
        (pa.types.is_decimal, "numeric"),
        (lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_fixed_size_binary(t), "bytea"),
        (lambda t: pa.types.is_timestamp(t) and t.tz is None, "timestamp without time zone"),
        (pa.types.is_timestamp, "timestamp with time zone"),
    ]
    return next((name for fits, name in simple if fits(kind)), "jsonb")


def _rows(snapshot: Snapshot, batch: Batch) -> Iterator[list[Any]]:
    columns = []
    for column in batch.columns.columns:
        values = column.to_pylist()
        if _sql_type(column.type) == "jsonb":
            values = [None if value is None else json.dumps(plain_values(value)) for value in values]
        columns.append(values)
    if snapshot.form.is_packed:
        bits = (snapshot.form.decode(batch.stored) > 0).view(np.uint8) + ord("0")  # (n, D)
        vectors = (row.tobytes().decode() for row in bits)
    else:
        vectors = ("[" + ",".join(map(repr, row)) + "]" for row in snapshot.form.decode(batch.stored).tolist())
    for *values, vector in zip(*columns, vectors):
        yield [*values, vector]
