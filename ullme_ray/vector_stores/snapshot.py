"""One version of the embeddings table as a stream of batches, and the mark by which a store knows what was copied into it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ullme_ray.errors import ExportError, UllmeError
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.table import PROVENANCE_KEY, id_column, open_table
from ullme_ray.vectors import VectorFormat, format_of

_BATCH_ROWS = 4096


@dataclass(frozen=True)
class Batch:
    """Some rows of the table: what is stored of their vectors, and all other columns."""

    stored: np.ndarray  # (n, D) or, for bits, (n, D / 8)
    columns: pa.RecordBatch  # id first, then chunk


@dataclass(frozen=True)
class Mark:
    """What a store holds: equal marks mean equal rows."""

    job: str
    table: str  # the table's own id, so that one made anew is another
    version: int

    def dump(self) -> str:
        return json.dumps({"job": self.job, "table": self.table, "version": self.version})

    @classmethod
    def parse(cls, text: str | bytes | None) -> Mark | None:
        """None for anything that is no mark."""
        try:
            noted = json.loads(text or "null")
            return cls(noted["job"], noted["table"], noted["version"])
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Stored:
    """What became of a store."""

    rows: int  # that it holds
    written: bool = True  # False where it held them already
    note: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The newest version of a table at the time it was opened; a commit that comes later changes nothing in it."""

    path: str
    mark: Mark
    id_name: str
    parts: tuple[Any, ...]  # pyarrow's fragments
    num_rows: int
    retention_hours: int | None  # of embed.output: how long readers may go on with what they opened
    on_rows: Callable[[int], None] = lambda done: None  # told how many rows are out

    def watched(self, on_rows: Callable[[int], None]) -> Snapshot:
        return replace(self, on_rows=on_rows)

    @cached_property
    def _metadata(self) -> dict[bytes, bytes]:
        return dict(self.parts[0].physical_schema.metadata or {})

    @cached_property
    def form(self) -> VectorFormat:
        return format_of(self._metadata)

    @property
    def fingerprint(self) -> str:
        return str(json.loads(self._metadata[PROVENANCE_KEY])["fingerprint"])

    @cached_property
    def dims(self) -> int:
        """Numbers of a vector, once decoded."""
        width = int(self.parts[0].physical_schema.field("embedding").type.list_size)
        return width * 8 if self.form.is_packed else width

    @cached_property
    def columns(self) -> pa.Schema:
        """All but the vectors: id and chunk first."""
        schema = self.parts[0].physical_schema
        others = [name for name in schema.names if name not in (self.id_name, "chunk", "embedding")]
        return pa.schema([schema.field(name) for name in (self.id_name, "chunk", *others)])

    def batches(self) -> Iterator[Batch]:
        """All rows, in the same order every time. Holds a few batches at a time.

        Raises:
            ExportError: the parts are not all of one model and format.
        """
        done = 0
        for part in self.parts:
            metadata = part.physical_schema.metadata or {}
            if format_of(metadata) != self.form:
                raise ExportError(f"{self.path}: {part.path} stores vectors in another way; run `ullme-ray embed` again")
            names = [*self.columns.names, "embedding"]
            for batch in part.to_batches(columns=names, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1):
                if batch.num_rows:
                    stored = self.form.from_arrow(batch.column("embedding"))
                    yield Batch(stored, batch.select(self.columns.names).cast(self.columns))
                    done += batch.num_rows
                    self.on_rows(done)


def open_snapshot(job: JobSpec) -> Snapshot:
    """The job's table as it is now.

    Raises:
        UllmeError: the job has no table, or none that it made, or it has no rows.
    """
    if job.embed is None:
        raise UllmeError("the job has no embed section, so there is no table to export; add one")
    path = RunFolder.of(job).resolve(job.embed.output.path)
    table = open_table(path)
    parts = sorted(table.to_pyarrow_dataset().get_fragments(), key=lambda part: part.path)
    counted = [(part, part.count_rows()) for part in parts]
    filled = tuple(part for part, num_rows in counted if num_rows)
    if not filled:
        raise ExportError(f"the table {path} has no rows to export; run `ullme-ray embed` on this job first")
    strangers = [part.path for part in filled if PROVENANCE_KEY not in (part.physical_schema.metadata or {})]
    if strangers:
        raise ExportError(f"{path} holds {strangers[0]}, which `ullme-ray embed` did not write; it cannot be exported")
    id_name = id_column(job.embed.input)
    if id_name not in filled[0].physical_schema.names:
        raise ExportError(f"the table has no column {id_name} (embed.input.id); run `ullme-ray embed` on this job again")
    mark = Mark(job.name, str(table.metadata().id), int(table.version()))
    num_rows = sum(num_rows for _, num_rows in counted)
    return Snapshot(path, mark, id_name, filled, num_rows, job.embed.output.retention_hours)


def plain_values(value: Any) -> Any:
    """A value of a column as JSON can say it."""
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def load_client(module: str, package: str) -> Any:
    """A store's own Python client.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"this export needs {package}, which cannot be imported ({error}); pip install {package}") from None
