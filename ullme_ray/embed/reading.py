"""Rows of Parquet, JSONL(.gz) and CSV(.gz) files: finding where units start, and reading one unit.

JSONL and CSV units start at a byte offset noted by planning, so plain files are read once over all units. In a gzip file, and
in a Parquet row group of more rows than a unit, the rows before the unit are decoded again: take larger units for such files.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import EmbedError, StorageError
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.table import id_column

_RAW_CHARACTERS = 2000  # of a bad row kept in the dead letters
_PARQUET_BATCH_ROWS = 4096
csv.field_size_limit(2**31 - 1)

DEAD_LETTER_SCHEMA = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("raw", pa.string())]
)


@dataclass(frozen=True)
class UnitRows:
    """The rows of a unit, good and bad apart: `good` has the columns id, pass-through columns, `text` and `content_hash`."""

    texts: list[str]
    good: pa.Table
    dead: pa.Table  # DEAD_LETTER_SCHEMA


class _BadRowError(Exception):
    """A row that goes to the dead letters; its message is the reason."""


def kept_columns(spec: EmbedInputSpec) -> list[str]:
    """The user's columns that the table has: the id first."""
    return [id_column(spec), *spec.columns]


def find_rows(file: InputFile, *, every: int) -> tuple[list[int], int]:
    """Byte offsets of rows 0, every, 2 * every, ... (all 0 for Parquet), and the number of rows.

    Raises:
        EmbedError: the file cannot be read to its end.
    """
    with _readable(file):
        if file.format == "parquet":
            with storage.open_read(file.path) as stream:
                num_rows = int(pq.read_metadata(stream).num_rows)
            return [0] * max(1, -(-num_rows // every)), num_rows
        offsets, num_rows = [], 0
        with _open_text(file) as stream:
            rows = _json_lines(stream, 0) if file.format == "jsonl" else _csv_rows(stream, 0)
            for offset, _ in rows:
                if num_rows % every == 0:
                    offsets.append(offset)
                num_rows += 1
        return offsets or [0], num_rows


def column_types(file: InputFile, spec: EmbedInputSpec) -> pa.Schema:
    """The types that the id and the pass-through columns have in the table, as far as this file decides.

    Parquet columns keep theirs, brought to what Delta tables can hold. Text formats have no types: all columns are strings, and
    JSON values that are not strings are kept as JSON.

    Raises:
        EmbedError: a column of the job is missing or not of a usable type.
    """
    names = kept_columns(spec)
    if file.format != "parquet":
        return pa.schema([(name, pa.string()) for name in names])
    with _readable(file), storage.open_read(file.path) as stream:
        schema = pq.read_schema(stream)
    _check_columns(file, spec, schema.names)
    for name in spec.text:
        kind = _storable(schema.field(name).type)
        if not (pa.types.is_string(kind) or pa.types.is_null(schema.field(name).type)):
            raise EmbedError(
                f"embed.input.text names column {name}, which is {kind} and not text in {file.path}; choose a text column"
            )
    return pa.schema(
        [
            (name, pa.string() if spec.id is None and name == id_column(spec) else _storable(schema.field(name).type))
            for name in names
        ]
    )


def _storable(kind: pa.DataType) -> pa.DataType:
    """The nearest type that a Delta table holds without loss."""
    types = pa.types
    if types.is_dictionary(kind):
        return _storable(kind.value_type)
    if types.is_null(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    widened = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64()}
    return {**widened, pa.float16(): pa.float32(), pa.large_binary(): pa.binary()}.get(kind, kind)


def read_unit(unit: Unit, spec: EmbedInputSpec, types: pa.Schema) -> UnitRows:
    """Reads a unit and sorts out its bad rows.

    Args:
        types: of the columns kept, from `column_types`.

    Raises:
        EmbedError: the file cannot be read, or is no longer the version that was planned.
    """
    texts: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in types.names}
    dead: list[dict[str, Any]] = []
    with _readable(unit.file):
        rows = list(_rows(unit, spec))
    if len(rows) != unit.num_rows or not unit.file.unchanged:
        raise EmbedError(f"{unit.file.path} changed while it was read; run again")
    for position, row in enumerate(rows, start=unit.start):
        row_id: Any = None
        try:
            if isinstance(row, _BadRowError):
                raise row
            row_id = _row_id(row, position, unit, spec)
            text = _text(row, spec)
            kept = [row_id, *(_pass_through(row.get(name), unit.file) for name in spec.columns)]
        except _BadRowError as reason:
            raw = _shown(reason.args[1] if len(reason.args) > 1 else row)
            known_id = None if row_id is None else _shown(row_id)
            dead.append({"file": unit.file.path, "row": position, "id": known_id, "reason": str(reason.args[0]), "raw": raw})
            continue
        texts.append(text)
        for name, value in zip(types.names, kept):
            columns[name].append(value)
    good = pa.table([_array(columns[field.name], field, unit.file) for field in types], schema=types)
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    good = good.append_column("content_hash", pa.array(hashes, pa.string()))
    return UnitRows(texts, good, pa.Table.from_pylist(dead, schema=DEAD_LETTER_SCHEMA))


def _array(values: list[Any], field: pa.Field, file: InputFile) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise EmbedError(f"column {field.name} of {file.path} does not fit the table's {field.type} ({error})") from error


def _text(row: dict[str, Any], spec: EmbedInputSpec) -> str:
    """The text columns joined with a newline, null and blank ones left out."""
    values = [row.get(name) for name in spec.text]
    for name, value in zip(spec.text, values):
        if value is not None and not isinstance(value, str):
            raise _BadRowError(f"{name} is {_kind(value)}, not text")
    parts = [value for value in values if value is not None and value.strip()]
    named = " and ".join(spec.text)
    if not parts:
        raise _BadRowError(f"{named} is null" if all(value is None for value in values) else f"{named} is empty")
    text = "\n".join(parts)
    if not _is_unicode(text):
        raise _BadRowError(f"{named} is not valid UTF-8")
    return text


def _row_id(row: dict[str, Any], position: int, unit: Unit, spec: EmbedInputSpec) -> Any:
    if spec.id is None:
        return f"{unit.file.name}#{position}"
    value = row.get(spec.id)
    if value is None or value == "":
        raise _BadRowError(f"{spec.id} is {'null' if value is None else 'empty'}")
    if unit.file.format == "parquet":
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRowError(f"{spec.id} is {_kind(value)}; an id is text or a whole number")
    if not _is_unicode(str(value)):
        raise _BadRowError(f"{spec.id} is not valid UTF-8")
    return str(value)


def _pass_through(value: Any, file: InputFile) -> Any:
    """A copied value: typed in Parquet, else text, with JSON values that are not strings as JSON."""
    if file.format == "parquet" or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if _is_unicode(text) else text.encode("utf-8", "replace").decode()


def _is_unicode(text: str) -> bool:
    """False for lone surrogates: broken UTF-8, or JSON escapes such as \\ud800."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}.get(
        type(value), type(value).__name__
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:_RAW_CHARACTERS].encode("utf-8", "replace").decode()


def _rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | _BadRowError]:
    """The unit's rows in order; a row that cannot even be parsed comes as the reason."""
    if unit.file.format == "parquet":
        yield from _parquet_rows(unit, spec)
        return
    with _open_text(unit.file) as stream:
        if unit.file.format == "jsonl":
            stream.seek(unit.offset)
            for _, line in itertools.islice(_json_lines(stream, unit.offset), unit.num_rows):
                yield _parse_json(line)
            return
        header = next(csv.reader(_decoded(stream)), [])
        _check_columns(unit.file, spec, header)
        if unit.offset:
            stream.seek(unit.offset)
        for _, values in itertools.islice(_csv_rows(stream, unit.offset), unit.num_rows):
            if len(values) == len(header):
                yield dict(zip(header, values))
            else:
                yield _BadRowError(f"has {len(values)} fields, the header {len(header)}", values)


def _parquet_rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any]]:
    wanted = list(dict.fromkeys([*([spec.id] if spec.id else []), *spec.text, *spec.columns]))
    with storage.open_read(unit.file.path) as stream:
        file = pq.ParquetFile(stream)
        _check_columns(unit.file, spec, file.schema_arrow.names)
        groups: list[int] = []
        first_row = end = 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if begin < unit.stop and end > unit.start:
                first_row = begin if not groups else first_row
                groups.append(group)
        if not groups:
            return
        position = first_row
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=wanted):
            begin, end = max(unit.start - position, 0), min(unit.stop - position, batch.num_rows)
            if begin < end:
                yield from batch.slice(begin, end - begin).to_pylist()
            position += batch.num_rows
            if position >= unit.stop:
                return


def _parse_json(line: bytes) -> dict[str, Any] | _BadRowError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _BadRowError("is not valid UTF-8", line.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        return _BadRowError(f"is not valid JSON ({error})", line.decode("utf-8", "replace"))
    return row if isinstance(row, dict) else _BadRowError(f"is {_kind(row)}, not a JSON object", row)


def _json_lines(stream: IO[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their byte offsets; `stream` stands at `offset`."""
    for line in stream:
        start, offset = offset, offset + len(line)
        if start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.strip():
            yield start, line


def _csv_rows(stream: IO[bytes], offset: int) -> Iterator[tuple[int, list[str]]]:
    """Records below the header with their byte offsets; `stream` stands at `offset`, where 0 is the header."""
    position = offset

    def counted() -> Iterator[str]:
        nonlocal position
        for line in stream:
            position += len(line)
            yield line.decode("utf-8", "surrogateescape")

    if offset == 0:
        stream.seek(0)
    records = csv.reader(counted())
    if offset == 0:
        next(records, None)
    while True:
        start = position
        values = next(records, None)
        if values is None:
            return
        if values:
            yield start, values


def _decoded(stream: IO[bytes]) -> Iterator[str]:
    for line in stream:
        yield line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _open_text(file: InputFile) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file, seekable."""
    with storage.open_read(file.path) as stream:
        if not file.compressed:
            yield stream
            return
        with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
            yield unpacked  # type: ignore[misc]  # all of IO[bytes] that is used here


def _check_columns(file: InputFile, spec: EmbedInputSpec, present: list[str]) -> None:
    wanted = {
        "embed.input.id": [spec.id] if spec.id else [],
        "embed.input.text": spec.text,
        "embed.input.columns": spec.columns,
    }
    for where, names in wanted.items():
        for name in names:
            if name not in present:
                raise EmbedError(
                    f"{where} names column {name}, which {file.path} does not have; it has {', '.join(present) or 'none'}"
                )


@contextlib.contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Turns what a broken file raises (truncated gzip, damaged Parquet, unbalanced CSV quotes) into one error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise EmbedError(f"{file.path} was there when the corpus was listed and is gone now; run again") from None
    except (EOFError, OSError, zlib.error, csv.Error, pa.ArrowException, StorageError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EmbedError(
            f"{file.path} cannot be read to its end ({reason}); repair or remove the file, then run again"
        ) from error
