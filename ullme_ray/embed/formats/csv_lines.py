"""CSV with a header, plain or compressed: quoted fields may hold line breaks, blank lines are no rows, all values are text.

Costs as those of JSONL.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ullme_ray import storage
from ullme_ray.embed.formats.columns import check_columns
from ullme_ray.embed.units import InputFile, Unit, units_at
from ullme_ray.errors import EmbedError
from ullme_ray.row_files import BadRow, Record, csv_records, open_unpacked, skip
from ullme_ray.spec.job import EmbedInputSpec


def schema(file: InputFile) -> pa.Schema | None:
    with storage.open_read(file.path) as stream:
        names, _ = _header(open_unpacked(stream, file.path), file)
    return pa.schema([(name, pa.string()) for name in names])


def units(file: InputFile, rows_per_unit: int) -> list[Unit]:
    with storage.open_read(file.path) as stream:
        records = csv_records(open_unpacked(stream, file.path), file.path)
        next(records, None)  # the header
        return units_at(file, (record.offset for record in records), rows_per_unit)


def rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | BadRow]:
    with storage.open_read(unit.file.path) as stream:
        unpacked = open_unpacked(stream, unit.file.path)
        header, position = _header(unpacked, unit.file)
        check_columns(unit.file, spec, header)
        skip(unpacked, max(unit.offset - position, 0))
        for record in itertools.islice(_records(unpacked, unit, position), unit.num_rows):
            if isinstance(record.cells, BadRow):
                yield record.cells
            elif len(record.cells) == len(header):
                yield dict(zip(header, record.cells))
            else:
                yield BadRow(f"has {len(record.cells)} fields, the header {len(header)}", ",".join(record.cells)[:2000])


def _records(stream: io.BufferedReader, unit: Unit, header_stop: int) -> Iterator[Record]:
    return csv_records(stream, unit.file.path, max(unit.offset, header_stop))


def _header(stream: io.BufferedReader, file: InputFile) -> tuple[list[str], int]:
    """The names of the columns, none in an empty file, and the byte where the rows begin."""
    record = next(csv_records(stream, file.path), None)
    if record is None:
        return [], 0
    if isinstance(record.cells, BadRow):
        raise EmbedError(f"{file.path} begins with no CSV header ({record.cells.start}); repair it")
    return record.cells, record.stop
