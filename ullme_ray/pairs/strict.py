"""Rows to measure with, all of them: training leaves a bad row out, but a measurement without it would be another one."""

from __future__ import annotations

from collections.abc import Iterator

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.pairs.readers import KINDS, is_known
from ullme_ray.pairs.rows import Pair, parse_row
from ullme_ray.pairs.store import file_rows


def list_rows(path: str, key: str) -> list[storage.FileInfo]:
    """The files that a path or glob names.

    Args:
        key: of the job file, for errors.

    Raises:
        DataError: there is none, or one of an unknown kind.
    """
    files = storage.list_files(path)
    if not files:
        raise DataError(f"{key} = {path} matches no file; check the path")
    unknown = [file.path for file in files if not is_known(file.path)]
    if unknown:
        raise DataError(f"{key} = {path}: {unknown[0]} is none of {KINDS}; narrow the path with a glob")
    return files


def strict_rows(path: str, key: str) -> Iterator[Pair]:
    """Every row of the files, in their order.

    Raises:
        DataError: a row is unusable, or a file cannot be read; names file and row.
    """
    for file in list_rows(path, key):
        for number, row in file_rows(file):
            parsed = parse_row(row)
            if isinstance(parsed, str):
                raise DataError(f"{file.path} row {number} {parsed}; repair it, for a measurement leaves no row out")
            yield parsed
