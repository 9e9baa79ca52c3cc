"""CSV with a header, plain or compressed: quoted fields may hold line breaks, blank lines are no rows, all values are text.

Costs as those of JSONL.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from ullme_ray import storage
from ullme_ray.embed.formats.columns import check_columns
from ullme_ray.embed.formats.kept import text_at
from ullme_ray.embed.units import InputFile, Unit, units_at
from ullme_ray.errors import EmbedError
from ullme_ray.row_files import BadRow, csv_records, open_unpacked
from ullme_ray.spec.job import EmbedInputSpec


def schema(file: InputFile) -> pa.Schema | None:
    names, _ = _header(file)
    return pa.schema([(name, pa.string()) for name in names])


def units(file: InputFile, rows_per_unit: int) -> list[Unit]:
    with storage.open_read(file.path) as stream:
        records = csv_records(open_unpacked(stream, file.path), file.path)
        next(records, None)  # the header
        return units_at(file, (record.offset for record in records), rows_per_unit)


def rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | BadRow]:
    header, rows_begin = _header(unit.file)
    check_columns(unit.file, spec, header)
    offset = max(unit.offset, rows_begin)
    with text_at(unit.file, offset) as text:
        for record in itertools.islice(csv_records(text.stream, unit.file.path, offset), unit.num_rows):
            text.position = record.stop
            if isinstance(record.cells, BadRow):
                yield record.cells
            elif len(record.cells) == len(header):
                yield dict(zip(header, record.cells))
            else:
                yield BadRow(f"has {len(record.cells)} fields, the header {len(header)}", ",".join(record.cells)[:2000])


@lru_cache(maxsize=8)
def _header(file: InputFile) -> tuple[list[str], int]:
    """The names of the columns, none in an empty file, and the byte where the rows begin."""
    with storage.open_read(file.path) as stream:
        record = next(csv_records(open_unpacked(stream, file.path), file.path), None)
    if record is None:
        return [], 0
    if isinstance(record.cells, BadRow):
        raise EmbedError(f"{file.path} begins with no CSV header ({record.cells.start}); repair it")
    return record.cells, record.stop
