"""Parts: one immutable Parquet object per unit, named by what went into it.

`part-<file key>-<start>-<stop>-<version>.parquet`; version = hash(file version, model fingerprint, output settings). Equal
names have equal content, so a part that exists is done, whoever wrote it, and a retry may overwrite it at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version as installed_version

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.embed.reading import kept_columns
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.table import PROVENANCE_KEY

DEAD_LETTERS = "_dead_letters"  # readers of Delta tables and its vacuum leave folders with an underscore alone
_LAYOUT = 1  # raised when the columns or the meaning of a part change
_NAME = re.compile(r"(part|dead)-([0-9a-f]{16})-(\d+)-(\d+)-([0-9a-f]{16})\.parquet")
_OWN_COLUMNS = ("chunk", "embedding", "content_hash", "num_tokens", "truncated")


@dataclass(frozen=True)
class PartName:
    """A part's file name, taken apart."""

    file_key: str
    start: int
    stop: int
    version: str

    def __str__(self) -> str:
        return f"part-{self._stem}.parquet"

    @property
    def dead_letters(self) -> str:
        """Path, below the table, of the bad rows of the same unit; there is no such file where there are none."""
        return f"{DEAD_LETTERS}/dead-{self._stem}.parquet"

    @property
    def num_rows(self) -> int:
        """Rows that were read for it: those in the part and those in the dead letters."""
        return self.stop - self.start

    @property
    def _stem(self) -> str:
        return f"{self.file_key}-{self.start}-{self.stop}-{self.version}"

    @classmethod
    def parse(cls, path: str) -> PartName | None:
        """None for the path of anything that is neither a part nor its dead letters."""
        match = _NAME.fullmatch(path.rpartition("/")[2])
        return cls(match[2], int(match[3]), int(match[4]), match[5]) if match else None


@dataclass(frozen=True)
class Part:
    """A part that lies in the table's folder."""

    name: PartName
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class PartSettings:
    """All that decides the content of a part beside its rows."""

    input: EmbedInputSpec
    types: pa.Schema  # of the id and pass-through columns
    fingerprint: str

    def version_of(self, file: InputFile) -> str:
        """The same unit of a changed file, model or output gets another version, hence another name."""
        given = {
            "layout": _LAYOUT,
            "file": file.version,
            "fingerprint": self.fingerprint,
            "id": self.input.id or f"generated from {file.name}",
            "text": self.input.text,
            "columns": [(field.name, str(field.type)) for field in self.types],
        }
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    def part_name(self, unit: Unit) -> PartName:
        return PartName(unit.file.key, unit.start, unit.stop, self.version_of(unit.file))

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table, in order; `embedding` as Delta sees it, a list (parts also say its length)."""
        return table_schema(self.types, pa.list_(pa.float32()))


def table_schema(types: pa.Schema, embedding: pa.DataType) -> pa.Schema:
    id_field, *others = types
    own = [
        pa.field("chunk", pa.int32()),
        pa.field("embedding", embedding),
        pa.field("content_hash", pa.string()),
        pa.field("num_tokens", pa.int32()),
        pa.field("truncated", pa.bool_()),
    ]
    return pa.schema([id_field, *own, *others])


def check_column_names(spec: EmbedInputSpec) -> None:
    """Raises EmbedError where two columns of the table would have one name."""
    names = kept_columns(spec)
    for name in names:
        if name in _OWN_COLUMNS:
            raise EmbedError(
                f"embed.input: {name} is a column that the table has for itself ({', '.join(_OWN_COLUMNS)}); rename yours"
            )
        if names.count(name) > 1:
            raise EmbedError(f"embed.input.columns: {name} would be in the table twice; name it once")


def build_part(good: pa.Table, vectors: np.ndarray, num_tokens: list[int], truncated: list[bool]) -> pa.Table:
    """The part's rows from `UnitRows.good` and its vectors (N, D) float32."""
    num_rows, dim = vectors.shape
    # Built by hand: a two-dimensional numpy column would be written as a list of any length.
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1)), dim)
    types = pa.schema([field for field in good.schema if field.name != "content_hash"])
    own = {
        "chunk": pa.array(np.zeros(num_rows, np.int32)),
        "embedding": embedding,
        "content_hash": good["content_hash"],
        "num_tokens": pa.array(num_tokens, pa.int32()),
        "truncated": pa.array(truncated, pa.bool_()),
    }
    schema = table_schema(types, embedding.type)
    return pa.table([own[name] if name in own else good[name] for name in schema.names], schema=schema)


def write_part(folder: str, job_name: str, unit: Unit, settings: PartSettings, rows: pa.Table) -> Part:
    """Encodes a part in memory and publishes it in one operation."""
    name = settings.part_name(unit)
    provenance = {
        "job": job_name,
        "fingerprint": settings.fingerprint,
        "file": unit.file.path,
        "file_version": unit.file.version,
        "rows": [unit.start, unit.stop],
        "software": {package: installed_version(package) for package in ("ullme_ray", "torch", "transformers", "pyarrow")},
    }
    rows = rows.replace_schema_metadata({PROVENANCE_KEY: json.dumps(provenance)})
    data = _parquet_bytes(rows)
    storage.write_bytes(storage.join(folder, str(name)), data)
    return Part(name, rows.num_rows, len(data))


def write_dead_letters(folder: str, name: PartName, dead: pa.Table) -> None:
    """Publishes a unit's bad rows. Comes before its part, so that a unit that is done has its dead letters too."""
    if dead.num_rows:
        storage.write_bytes(storage.join(folder, name.dead_letters), _parquet_bytes(dead))


def _parquet_bytes(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return bytes(sink.getvalue())


def list_parts(folder: str) -> dict[PartName, int]:
    """The parts that lie in a table's folder, committed or not, with their size in bytes. Costs one listing."""
    prefix = folder.rstrip("/") + "/part-"
    names = {info.path: info.num_bytes for info in storage.list_files(folder) if info.path.startswith(prefix)}
    return {name: num_bytes for path, num_bytes in names.items() if (name := PartName.parse(path)) is not None}


def open_part(folder: str, name: PartName, num_bytes: int) -> Part | None:
    """A part that an earlier run left, or None if it is damaged. Costs reading its footer."""
    try:
        with storage.open_read(storage.join(folder, str(name))) as stream:
            return Part(name, int(pq.read_metadata(stream).num_rows), num_bytes)
    except (pa.ArrowException, FileNotFoundError):
        return None


def remove_stale_dead_letters(folder: str, current: Iterable[PartName]) -> None:
    """Removes the dead letters of units that the table no longer has."""
    keep = {name.dead_letters for name in current}
    base = storage.join(folder, DEAD_LETTERS)
    for info in storage.list_files(base):
        if f"{DEAD_LETTERS}/{info.path.rpartition('/')[2]}" not in keep:
            storage.remove(info.path)
