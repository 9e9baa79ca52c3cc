"""The kinds of input files, one module each: what columns a file has, where its units lie, and the rows of a unit.

A new kind is a module with these three functions and a line in `FORMATS` and in `units.SUFFIXES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

from ullme_ray.embed.formats import csv_lines, json_lines, parquet, text
from ullme_ray.embed.units import Format, InputFile, Unit
from ullme_ray.row_files import BadRow
from ullme_ray.spec.job import EmbedInputSpec


class FileFormat(Protocol):
    """What a module here offers. Each may raise one of `row_files.READ_ERRORS` or a UllmeError for a file that is not whole."""

    def schema(self, file: InputFile) -> pa.Schema | None:
        """The columns of the file; None where rows may have any."""

    def units(self, file: InputFile, rows_per_unit: int) -> list[Unit]:
        """The file's rows in units, in order."""

    def rows(self, unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | BadRow]:
        """The unit's rows in order, each with the columns that the job names, or a BadRow where it cannot be parsed."""


FORMATS: dict[Format, FileFormat] = {"parquet": parquet, "jsonl": json_lines, "csv": csv_lines, "text": text}
