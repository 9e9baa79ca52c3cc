"""Plain text (.txt, .md): a file is one document, in the one column `text`, and its path below the corpus is its id.

Files come in groups that fill a unit each (see `listing.py`). They are fetched several at a time, since each is a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from ullme_ray import storage
from ullme_ray.embed.formats.columns import check_columns
from ullme_ray.embed.units import LOOKUP_THREADS, InputFile, Unit
from ullme_ray.row_files import MAX_ROW_BYTES, BadRow
from ullme_ray.spec.job import EmbedInputSpec

_COLUMN = "text"


def schema(file: InputFile) -> pa.Schema | None:
    return pa.schema([(_COLUMN, pa.string())])


def units(file: InputFile, rows_per_unit: int) -> list[Unit]:
    return [Unit(file, 0, len(file.members), 0)]


def rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | BadRow]:
    check_columns(unit.file, spec, [_COLUMN])
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        yield from pool.map(_read, [unit.file.path_of(row) for row in range(unit.start, unit.stop)])


def _read(path: str) -> dict[str, Any] | BadRow:
    with storage.open_read(path) as stream:
        data = stream.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        return BadRow(f"is a file of more than {MAX_ROW_BYTES // 2**20} MiB", data[:1000].decode("utf-8", "replace"))
    try:
        return {_COLUMN: data.decode("utf-8-sig")}
    except UnicodeDecodeError:
        return BadRow("is not valid UTF-8", data[:2000].decode("utf-8", "replace"))
