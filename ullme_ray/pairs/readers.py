"""The rows of one local file as a stream: JSON lines, JSON array, CSV, Parquet or Arrow, plain or compressed.

Every row comes out, a bad one as a `BadRow` in its place. What cannot be told apart into rows (a truncated or damaged file, a
quote that is never closed) is an error that says how far the file was read. Memory: a line or a batch; a JSON array whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray.errors import DataError
from ullme_ray.pairs.rows import LIST_COLUMNS, is_used, lacks
from ullme_ray.row_files import (
    CODECS,
    READ_ERRORS,
    TOO_LONG,
    BadRow,
    csv_records,
    lines,
    open_unpacked,
    plain_name,
    table_rows,
)

MAX_ARRAY_BYTES = 512 * 2**20  # of a JSON array, which is parsed whole

_LINES = (".jsonl", ".ndjson", ".json", ".csv")
_TABLES = (".parquet", ".arrow")
KINDS = f"{', '.join(_LINES)} (each plain or with {', '.join(CODECS)}), {', '.join(_TABLES)}"

_BATCH_ROWS = 256
_BLANK = b" \t\r\n\xef\xbb\xbf"  # with the byte order mark of UTF-8


def is_known(path: str) -> bool:
    """Whether the file's name tells a kind that can be read."""
    return plain_name(path).endswith(_LINES) or path.lower().endswith(_TABLES)


def read_rows(local: str, name: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of every row; blank lines are none. Lines of text are numbered as an editor does.

    Args:
        local: where the file lies.
        name: what the user calls it; decides how it is read.

    Raises:
        DataError: the file cannot be read to its end.
    """
    number = 0
    try:
        with io.FileIO(local) as file:
            is_table = name.lower().endswith(_TABLES)
            stream: io.BufferedReader[Any] = io.BufferedReader(file) if is_table else open_unpacked(file, name)
            for number, row in _reader(name, stream):
                yield number, row
    except READ_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        unit = "row" if name.lower().endswith(_TABLES) else "line"
        raise DataError(f"{name} cannot be read past {unit} {number} ({reason}); repair or remove it") from error


def _reader(name: str, stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    kind = "." + plain_name(name).rpartition(".")[2]
    if kind == ".parquet":
        return _parquet(stream, name)
    if kind == ".arrow":
        return _arrow(stream, name)
    if kind == ".csv":
        return _csv(stream, name)
    if kind == ".json" and _first_byte(stream) == b"[":
        return _json_array(stream, name)
    return _json_lines(stream)


def _first_byte(stream: io.BufferedReader) -> bytes:
    return stream.peek(64).lstrip(_BLANK)[:1]


def _json_lines(stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    for line in lines(stream):
        if line.content is None:
            yield line.number, BadRow(TOO_LONG, _shown(line.start))
        elif line.content.strip():
            yield line.number, _json(line.content)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return BadRow("is not UTF-8", _shown(line))
    except (ValueError, RecursionError):
        return BadRow("is not JSON", _shown(line))


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object; the json module itself would keep only the last of repeated keys."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else BadRow("has a key twice", str(pairs)[:1000])


def _shown(line: bytes) -> str:
    return line[:1000].decode(errors="replace")


def _json_array(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, Any]]:
    data = stream.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise DataError(
            f"{name} is a JSON array of more than {MAX_ARRAY_BYTES // 2**20} MiB; write one object per line (.jsonl)"
        )
    try:
        rows = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{name} is no whole JSON array ({reason}); repair it, or write one object per line (.jsonl)"
        ) from error
    yield from enumerate(rows, start=1)


def _csv(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, Any]]:
    header: list[str] | None = None
    for record in csv_records(stream, name):
        if header is None:
            if isinstance(record.cells, BadRow):
                raise DataError(f"{name}: line {record.line} is no CSV header ({record.cells.start}); repair it")
            header = record.cells
            _check_columns(header, name)
        else:
            yield record.line, record.cells if isinstance(record.cells, BadRow) else _csv_row(header, record.cells)


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadRow("has another number of cells than the header", ",".join(cells)[:1000])
    row: dict[str, Any] = {}
    for column, cell in zip(header, cells):
        if not cell or not is_used(column):
            continue
        if any("\udc80" <= character <= "\udcff" for character in cell):
            return BadRow("is not UTF-8", ascii(",".join(cells)[:1000]))
        row[column] = cell
        if column in LIST_COLUMNS:
            row[column] = _json(cell.encode())
            if not isinstance(row[column], list):
                return BadRow("has a column of plural name that is no JSON list", cell[:1000])
        elif column in ("score", "label"):
            row[column] = _number(cell)
    return row


def _number(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def _parquet(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, Any]]:
    file = pq.ParquetFile(stream)
    columns = _check_columns(file.schema_arrow.names, name)
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        for row in table_rows(batch):
            number += 1
            yield number, row
    if number != file.metadata.num_rows:
        raise DataError(f"{name} promises {file.metadata.num_rows} rows and holds {number}; write it again")


def _arrow(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, Any]]:
    """The file format, or the stream format, in which the datasets library saves."""
    magic = stream.read(6)
    stream.seek(0)
    number = 0
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream)
        schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        stream.seek(0, io.SEEK_END)
        stream.seek(max(0, stream.tell() - 8))
        if stream.read() != b"\xff\xff\xff\xff\x00\x00\x00\x00":  # Arrow itself takes a cut between two batches for the end
            raise DataError(f"{name} does not end as an Arrow stream must; it is cut off or of another kind")
        stream.seek(0)
        reader = pa.ipc.open_stream(stream)
        schema, batches = reader.schema, iter(reader)
    columns = _check_columns(schema.names, name)
    for batch in batches:
        for row in table_rows(batch.select(columns)):
            number += 1
            yield number, row


def _check_columns(columns: list[str], name: str) -> list[str]:
    """The columns that matter.

    Raises:
        DataError: one is there twice, or one is missing without which no row can be used.
    """
    used = [column for column in columns if is_used(column)]
    twice = sorted({column for column in used if used.count(column) > 1})
    if twice:
        raise DataError(f"{name} has the column {twice[0]} twice; rename one")
    missing = lacks(used)
    if missing is not None:
        raise DataError(f"{name} has no column {missing}; its columns are {', '.join(columns)[:300]}")
    return used
