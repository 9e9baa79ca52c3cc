"""Parquet: planning reads the footer. Units follow row groups, several small ones or a share of a large one.

Only the columns that the job names are read. A row group of more rows than a unit is divided, and each of its units decodes it
from its start: write row groups of at most `embed.rows_per_unit` rows where that matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.embed.formats.columns import check_columns, wanted_columns
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.row_files import BadRow, table_rows
from ullme_ray.spec.job import EmbedInputSpec

_BATCH_ROWS = 4096


def schema(file: InputFile) -> pa.Schema | None:
    with storage.open_read(file.path) as stream:
        return pq.read_schema(stream)


def units(file: InputFile, rows_per_unit: int) -> list[Unit]:
    with storage.open_read(file.path) as stream:
        metadata = pq.read_metadata(stream)
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    cuts, start, stop = [], 0, 0
    for num_rows in groups:
        if stop > start and stop - start + num_rows > rows_per_unit:
            cuts.append(stop)
            start = stop
        if num_rows > rows_per_unit:
            cuts.extend(range(start + rows_per_unit, start + num_rows, rows_per_unit))
            cuts.append(start + num_rows)
            start += num_rows
        stop += num_rows
    if stop > start or not cuts:
        cuts.append(stop)
    return [Unit(file, begin, end, 0) for begin, end in zip([0, *cuts], cuts)]


def rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | BadRow]:
    with storage.open_read(unit.file.path) as stream:
        file = pq.ParquetFile(stream)
        check_columns(unit.file, spec, file.schema_arrow.names)
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
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted_columns(spec)):
            begin, end = max(unit.start - position, 0), min(unit.stop - position, batch.num_rows)
            if begin < end:
                yield from table_rows(batch.slice(begin, end - begin))
            position += batch.num_rows
            if position >= unit.stop:
                return
