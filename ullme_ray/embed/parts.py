"""Parts: immutable Parquet objects, one per unit, named by what went into them and by what came out.

`part-<file>-<start>-<stop>-<recipe>-<version>-<content>.parquet`: recipe = hash of all that makes a text's vector (model
fingerprint, chunks, vector format); version = hash of the file's version, recipe and columns; content = hash of the bytes. The
first five are the part's key: a part of the wanted key is done, whoever wrote it. Vectors computed twice may differ in their
last bits, so the name ends with the content: no object is ever written over, not even by a retry or by a second run, and a
size in the table's log stays true.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.metadata import version as installed_version
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.embed.parquet import parquet_bytes
from ullme_ray.embed.reading import kept_columns
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.table import PROVENANCE_KEY
from ullme_ray.vectors import VectorFormat

DEAD_LETTERS = "_dead_letters"  # readers of Delta tables and its vacuum leave folders with an underscore alone
_LAYOUT = 2  # raised when the columns or the meaning of a part change
_HEX = "([0-9a-f]{16})"
_PART = re.compile(rf"part-{_HEX}-(\d+)-(\d+)-{_HEX}-{_HEX}-{_HEX}\.parquet")
_DEAD = re.compile(rf"dead-{_HEX}-(\d+)-(\d+)-{_HEX}-{_HEX}-(\d+)\.parquet")
_OWN_COLUMNS = ("chunk", "embedding", "content_hash", "num_tokens", "truncated")


class PartKey(NamedTuple):
    """What a part is for: rows [start, stop) of a version of a file, and how they are embedded."""

    file: str
    start: int
    stop: int
    recipe: str
    version: str

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def num_rows(self) -> int:
        """Rows of the input: those in the part and those in the dead letters."""
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """A part that lies in the table's folder."""

    key: PartKey
    content: str
    num_rows: int  # of the table: a document in several chunks has several
    num_bytes: int

    @property
    def name(self) -> str:
        return f"part-{self.key}-{self.content}.parquet"


def parse_part_name(path: str) -> tuple[PartKey, str] | None:
    """Key and content of a part by its path; None for anything else."""
    match = _PART.fullmatch(path.rpartition("/")[2])
    return (PartKey(match[1], int(match[2]), int(match[3]), match[4], match[5]), match[6]) if match else None


@dataclass(frozen=True)
class PartSettings:
    """All that decides the content of a part beside its rows."""

    input: EmbedInputSpec
    types: pa.Schema  # of the id and pass-through columns
    fingerprint: str
    vectors: VectorFormat

    @cached_property
    def recipe(self) -> str:
        """The same recipe gives the same text the same vector, in whatever file and row it stands."""
        chunks = self.input.chunks
        return _short_hash(
            {
                "layout": _LAYOUT,
                "fingerprint": self.fingerprint,
                "chunks": (chunks.tokens, chunks.overlap) if chunks else None,
                "vectors": self.vectors.token(),
            }
        )

    def version_of(self, file: InputFile) -> str:
        """A changed file, recipe or choice of columns gives another version, hence another part."""
        return _short_hash(
            {
                "recipe": self.recipe,
                "file": file.version,
                "id": self.input.id or f"generated from {file.name}",
                "text": self.input.text,
                "columns": [(field.name, str(field.type)) for field in self.types],
            }
        )

    def key_of(self, unit: Unit, version: str | None = None) -> PartKey:
        """The key of a unit's part; `version` is `version_of` its file, where the caller has it already."""
        return PartKey(unit.file.key, unit.start, unit.stop, self.recipe, version or self.version_of(unit.file))

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table, in order; `embedding` as Delta sees it (parts also say its length)."""
        return table_schema(self.types, self.vectors.delta_type)


def _short_hash(given: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


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


@dataclass(frozen=True)
class ChunkRows:
    """Vectors and their facts, one row per chunk, in the order of the documents that `document` numbers."""

    document: np.ndarray  # (M,) int64, ascending
    chunk: np.ndarray  # (M,) int32, from 0 within a document
    embedding: np.ndarray  # (M, D), as the table stores it
    num_tokens: np.ndarray  # (M,) int32
    truncated: np.ndarray  # (M,) bool

    def __len__(self) -> int:
        return len(self.document)

    def take(self, rows: np.ndarray) -> ChunkRows:
        return ChunkRows(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def join(pieces: Sequence[ChunkRows]) -> ChunkRows:
        """All rows, piece after piece."""
        return ChunkRows(*(np.concatenate([getattr(p, field.name) for p in pieces]) for field in fields(ChunkRows)))


def build_part(good: pa.Table, chunks: ChunkRows, vectors: VectorFormat) -> pa.Table:
    """The part's rows: each document of `UnitRows.good` once per chunk, beside the chunk's vector."""
    rows = good.take(pa.array(chunks.document))
    embedding = vectors.to_arrow(chunks.embedding)
    types = pa.schema([field for field in good.schema if field.name != "content_hash"])
    own = {
        "chunk": pa.array(chunks.chunk),
        "embedding": embedding,
        "content_hash": rows["content_hash"],
        "num_tokens": pa.array(chunks.num_tokens),
        "truncated": pa.array(chunks.truncated),
    }
    schema = table_schema(types, embedding.type)
    return pa.table([own[name] if name in own else rows[name] for name in schema.names], schema=schema)


def write_part(folder: str, job_name: str, unit: Unit, settings: PartSettings, rows: pa.Table) -> Part:
    """Encodes a part in memory and publishes it in one operation."""
    key = settings.key_of(unit)
    provenance = {
        "job": job_name,
        "fingerprint": settings.fingerprint,
        "file": unit.file.path,
        "file_version": unit.file.version,
        "rows": [unit.start, unit.stop],
        "offset": unit.offset,
        "vectors": settings.vectors.provenance(rows.schema.field("embedding").type.list_size),
        "software": {package: installed_version(package) for package in ("ullme_ray", "torch", "transformers", "pyarrow")},
    }
    rows = rows.replace_schema_metadata({PROVENANCE_KEY: json.dumps(provenance)})
    data = parquet_bytes(rows)
    part = Part(key, hashlib.sha256(data).hexdigest()[:16], rows.num_rows, len(data))
    storage.write_bytes(storage.join(folder, part.name), data)
    return part


def list_parts(folder: str) -> dict[PartKey, list[storage.FileInfo]]:
    """The parts that lie in a table's folder, committed or not. Costs one listing."""
    prefix = folder.rstrip("/") + "/part-"
    found: dict[PartKey, list[storage.FileInfo]] = {}
    for info in storage.list_files(folder):
        if info.path.startswith(prefix) and (parsed := parse_part_name(info.path)) is not None:
            found.setdefault(parsed[0], []).append(info)
    return found


def missing_parts(folder: str, parts: Iterable[Part]) -> list[str]:
    """Names of those that do not lie in the folder: a commit of one would leave a table that nobody can read."""
    there = {info.path.rpartition("/")[2] for found in list_parts(folder).values() for info in found}
    return [part.name for part in parts if part.name not in there]


@contextlib.contextmanager
def reading_part(path: str) -> Iterator[IO[bytes]]:
    """A part, or a file of dead letters, to be read in the `with` block.

    Raises:
        EmbedError: it is damaged.
        FileNotFoundError: it is gone.
    """
    try:
        with storage.open_read(path) as stream:
            yield stream
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; pyarrow's, of bytes that it cannot decode, have no number
        raise EmbedError(
            f"{path} is damaged ({str(error).splitlines()[0]}); put it back from a copy, or remove the table's folder and run "
            f"`ullme-ray embed` to make the table anew"
        ) from error


def open_part(info: storage.FileInfo) -> Part | None:
    """A part that an earlier run left, or None if it is damaged. Costs reading its footer."""
    parsed = parse_part_name(info.path)
    assert parsed is not None
    try:
        with reading_part(info.path) as stream:
            return Part(*parsed, int(pq.read_metadata(stream).num_rows), info.num_bytes)
    except (EmbedError, FileNotFoundError):
        return None


def write_dead_letters(folder: str, key: PartKey, dead: pa.Table) -> None:
    """Publishes a unit's bad rows. Comes before its part, so that a unit that is done has its dead letters too."""
    if dead.num_rows:
        storage.write_bytes(storage.join(folder, dead_letters_path(key, dead.num_rows)), parquet_bytes(dead))


def dead_letters_path(key: PartKey, count: int) -> str:
    """Path, below the table, of a unit's bad rows."""
    return f"{DEAD_LETTERS}/dead-{key}-{count}.parquet"


def count_dead_letters(folder: str) -> dict[PartKey, int]:
    """How many bad rows each unit had; one that is not there had none. Costs one listing."""
    return {key: count for _, key, count in _list_dead_letters(folder)}


def remove_dead_letters(folder: str, keys: Iterable[PartKey]) -> None:
    """Removes the dead letters of units that a commit took out of the table; those of other runs at work stay."""
    gone = set(keys)
    if not gone:
        return
    for info, key, _ in _list_dead_letters(folder):
        if key in gone:
            storage.remove(info.path)


def remove_old_dead_letters(folder: str, active: Container[PartKey], before_s: float) -> list[str]:
    """Removes the dead letters of units without a part in the table, as broken runs leave them, and gives their names.

    Args:
        before_s: since 1970; later ones may be of a run at work.
    """
    old = [info.path for info, key, _ in _list_dead_letters(folder) if key not in active and info.modified_s < before_s]
    for path in old:
        storage.remove(path)
    return [path.removeprefix(folder.rstrip("/") + "/") for path in old]


def _list_dead_letters(folder: str) -> Iterator[tuple[storage.FileInfo, PartKey, int]]:
    """Files, the units that they are of, and how many rows they hold."""
    for info in storage.list_files(storage.join(folder, DEAD_LETTERS)):
        if match := _DEAD.fullmatch(info.path.rpartition("/")[2]):
            yield info, PartKey(match[1], int(match[2]), int(match[3]), match[4], match[5]), int(match[6])
