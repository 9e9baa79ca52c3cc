"""Parquet: planning reads the footer. Units follow row groups, several small ones or a share of a large one.

Only the columns that the job names are read. A row group of more rows than a unit is divided, and each process that reads its
units decodes it once.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.embed.formats.columns import check_columns, wanted_columns
from ullme_ray.embed.formats.kept import kept_open
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
    columns = wanted_columns(spec)

    @contextlib.contextmanager
    def open_groups() -> Iterator[_Groups]:
        with storage.open_read(unit.file.path) as stream:
            file = pq.ParquetFile(stream)
            check_columns(unit.file, spec, file.schema_arrow.names)
            yield _Groups(file, columns)

    with kept_open((unit.file, *columns), open_groups, usable=lambda groups: True) as groups:
        for batch in groups.read(unit.start, unit.stop):
            yield from table_rows(batch)


class _Groups:
    """A file whose row groups are decoded one by one, each once as long as reading goes forward."""

    def __init__(self, file: pq.ParquetFile, columns: list[str]) -> None:
        self._file, self._columns = file, columns
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._begins = list(itertools.accumulate(sizes, initial=0))  # of each group, and the end of the last
        self._group, self._position = 0, 0
        self._batches: Iterator[pa.RecordBatch] | None = None  # of `_group`, from `_position` on

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows [start, stop)."""
        while start < stop and start < self._begins[-1]:
            group = bisect.bisect_right(self._begins, start) - 1
            if self._batches is None or group != self._group or start < self._position:
                self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=self._columns)
                self._group, self._position = group, self._begins[group]
            batch = next(self._batches, None)
            if batch is None:
                return  # fewer rows than the footer says
            begin, end = max(start - self._position, 0), min(stop - self._position, batch.num_rows)
            self._position += batch.num_rows
            if end < batch.num_rows:
                self._batches = itertools.chain([batch.slice(end)], self._batches)
                self._position -= batch.num_rows - end
            if begin < end:
                yield batch.slice(begin, end - begin)
                start = self._position
