"""`ullme-ray export`: picks the store, streams the table into it, and says what became of it."""

from __future__ import annotations

import contextlib
import importlib
import time
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ullme_ray.errors import ExportError
from ullme_ray.progress import Progress
from ullme_ray.spec import JobSpec
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.vector_stores.snapshot import Stored, open_snapshot

# store -> its module and what its --target names
STORES = {
    "lance": ("lance_store", "a folder or s3:// prefix for the dataset, such as vectors/docs.lance"),
    "faiss": ("faiss_store", "a folder or s3:// prefix for vectors.npy, ids.parquet and index.faiss"),
    "qdrant": ("qdrant_store", "http(s)://HOST:6333/COLLECTION, with --secret for an API key; or FOLDER/COLLECTION"),
    "pgvector": ("pgvector_store", "TABLE or SCHEMA.TABLE, with --secret for the connection string"),
}


@dataclass(frozen=True)
class ExportReport:
    """What a store holds after an export; `rows_in_store` is less than `rows` where the table has an id and chunk twice."""

    store: str
    target: str
    table: str
    version: int
    fingerprint: str
    rows: int
    rows_in_store: int
    written: bool  # False where the store held this version already
    seconds: float
    note: str

    def to_text(self) -> str:
        done = f"{self.rows_in_store:,} rows" if self.written else f"{self.rows_in_store:,} rows were there already"
        twice = self.rows - self.rows_in_store
        lines = [f"{self.store} {self.target}: {done}, version {self.version} of the table, {self.seconds:.1f} s"]
        lines += [f"{twice:,} rows have an id and chunk that another row has; the store holds one of them"] * bool(twice)
        return "\n".join([*lines, *([self.note] if self.note else [])])


def run_export(job: JobSpec, store: str, target: str, secret: str | None = None, *, progress: bool = True) -> ExportReport:
    """Copies the newest version of the job's table into a vector store.

    Args:
        secret: a reference, env:NAME or file:PATH.

    Raises:
        UllmeError: no table, no client, or a target that cannot be reached or holds something else.
    """
    if store not in STORES:
        raise ExportError(f"--to {store} is not known; use {', '.join(STORES)}")
    adapter: Any = importlib.import_module(f"ullme_ray.vector_stores.{STORES[store][0]}")
    reference = None if secret is None else _reference(secret)
    started = time.monotonic()
    snapshot = open_snapshot(job)
    with Progress("export", snapshot.num_rows) if progress else contextlib.nullcontext() as bar:
        if bar is not None:
            snapshot = snapshot.watched(bar.update)
        stored: Stored = adapter.export(snapshot, target.rstrip("/"), reference)
    return ExportReport(
        store=store,
        target=target,
        table=snapshot.path,
        version=snapshot.mark.version,
        fingerprint=snapshot.fingerprint,
        rows=snapshot.num_rows,
        rows_in_store=stored.rows,
        written=stored.written,
        seconds=time.monotonic() - started,
        note=stored.note,
    )


def _reference(secret: str) -> SecretRef:
    try:
        return TypeAdapter(SecretRef).validate_python(secret)
    except ValidationError:  # its text would show the value
        raise ExportError("--secret is a reference to a secret, never the secret itself: use env:NAME or file:PATH") from None
