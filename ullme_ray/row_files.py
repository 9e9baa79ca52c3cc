"""What all readers of row files share: opening plain and compressed ones, telling lines and CSV records apart, damaged batches.

Every row comes out, a bad one as a `BadRow` in its place. What cannot be told apart into rows (a truncated or damaged file, a
quote that is never closed) raises. Memory: a line, a record or a batch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from ullme_ray.errors import DataError

MAX_ROW_BYTES = 64 * 2**20  # of one line of JSON, or one record of CSV
TOO_LONG = f"is a line of {MAX_ROW_BYTES // 2**20} MiB or more"
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
READ_ERRORS = (OSError, EOFError, ValueError, MemoryError, pa.ArrowException)  # what a file that is not whole may raise

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
}
_MAGIC |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**16
_SHOWN_BYTES = 1000


@dataclass(frozen=True, slots=True)
class BadRow:
    """In place of a row that a reader could not make out."""

    reason: str
    start: str = ""


def plain_name(name: str) -> str:
    """In lower case and without the endings of compression."""
    name = name.lower()
    for suffix in CODECS:
        name = name.removesuffix(suffix)
    return name


def open_unpacked(stream: IO[bytes], name: str) -> io.BufferedReader:
    """The decompressed bytes of a text file, as its name says; seekable only where it is not compressed.

    Raises:
        DataError: the content is of another kind than the name says.
    """
    codec = next((codec for suffix, codec in CODECS.items() if name.lower().endswith(suffix)), None)
    unpacked = _buffered(stream)
    if codec is not None:
        if not unpacked.peek(1):
            raise DataError(f"{name} is empty, which no {codec} file is; was it written to its end?")
        unpacked = _buffered(pa.CompressedInputStream(unpacked, codec))
    start = unpacked.peek(8)
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{name} holds {kind} data, which its name does not say; rename or convert it (text must be UTF-8)")
    return unpacked


def _buffered(stream: Any) -> io.BufferedReader:
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, _BUFFER_BYTES)


def skip(stream: io.BufferedReader, num_bytes: int) -> None:
    """Goes forward. In a compressed file it costs decompressing what is passed over."""
    if stream.seekable():
        stream.seek(num_bytes, io.SEEK_CUR)
        return
    while num_bytes > 0 and (passed := stream.read(min(num_bytes, 2**20))):
        num_bytes -= len(passed)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a text file; one that is too long to hold has no content."""

    number: int  # from 1, where reading began
    offset: int
    stop: int  # offset of the next line
    content: bytes | None
    start: bytes


def lines(stream: io.BufferedReader, offset: int = 0) -> Iterator[Line]:
    """The lines of a stream that stands at byte `offset` of its file. A byte order mark at the file's start is left out."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        begin, offset = offset, offset + len(line)
        rest, too_long = line, False
        while len(rest) == MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest, too_long = stream.readline(MAX_ROW_BYTES), True
            offset += len(rest)
        if begin == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield Line(number, begin, offset, None if too_long else line, line[:_SHOWN_BYTES])


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a CSV file."""

    line: int  # where it begins, from 1, where reading began
    offset: int
    stop: int  # offset of the next record
    cells: list[str] | BadRow


def csv_records(stream: io.BufferedReader, name: str, offset: int = 0) -> Iterator[Record]:
    """The records of a stream that stands at byte `offset`, blank lines left out.

    Quotes are checked strictly; bytes that are not UTF-8 become half surrogates, which name the row to blame.

    Raises:
        DataError: a quote is never closed, or not for a long time.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    last_line, row_bytes, stop = 0, 0, offset

    def text() -> Iterator[str]:
        nonlocal last_line, row_bytes, stop
        for line in lines(stream, offset):
            row_bytes += line.stop - line.offset
            if line.content is None or row_bytes > MAX_ROW_BYTES:
                raise DataError(
                    f"{name}: the row that ends in line {line.number} has more than {MAX_ROW_BYTES // 2**20} MiB; "
                    "is a quote open?"
                )
            last_line, stop = line.number, line.stop
            yield line.content.decode(errors="surrogateescape")

    records = csv.reader(text(), strict=True)
    while True:
        row_bytes, first_line, begin = 0, last_line + 1, stop
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(f"{name}: line {first_line} opens a quote that is never closed; repair it") from error
            yield Record(first_line, begin, stop, BadRow("is not CSV", str(error)))
            continue
        if cells:
            yield Record(first_line, begin, stop, cells)


def table_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """Checked first: Arrow believes a damaged file's offsets, and reads outside its memory."""
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        part = batch.slice(start, _BATCH_ROWS)
        try:
            part.validate(full=True)
            rows = part.to_pylist()
        except (pa.ArrowInvalid, ValueError, OverflowError):  # somewhere in these rows
            rows = [_table_row(part.slice(i, 1)) for i in range(part.num_rows)]
        yield from rows


def _table_row(row: pa.RecordBatch) -> Any:
    try:
        row.validate(full=True)
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("is not UTF-8", _shown(row))
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            return BadRow("is not UTF-8", _shown(row))
        raise
    except (ValueError, OverflowError) as error:  # such as a date after the year 9999
        return BadRow("has a value that Python cannot hold", str(error))


def _shown(row: pa.RecordBatch) -> str:
    """The columns of text, with a mark for what is not UTF-8."""
    texts = {name: row[name].cast(pa.binary())[0].as_py() for name in row.schema.names if pa.types.is_string(row[name].type)}
    return str({name: text and text[:_SHOWN_BYTES].decode(errors="replace") for name, text in texts.items()})
