"""The corpus as units: lists the files of `embed.input.path` and divides each into row ranges.

Planning a Parquet file costs its footer, a JSONL or CSV file one read (its rows must be counted). Files whose rows are in the
table already are not planned at all (see `parts.py`), so a rerun without changes costs a listing. No torch, no ray.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ullme_ray import storage
from ullme_ray.embed import reading
from ullme_ray.embed.units import SUFFIXES, InputFile, Unit, embed_section
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

_PLANNING_THREADS = 8


def list_input(job: JobSpec) -> list[InputFile]:
    """The files of `embed.input.path`, sorted by path. A table that lies inside the input folder is left out.

    Raises:
        EmbedError: there are none, or one is of a kind that cannot be read.
    """
    embed, folder = embed_section(job), RunFolder.of(job)
    pattern, table = folder.resolve(embed.input.path), folder.resolve(embed.output.path)
    found = [info for info in storage.list_files(pattern) if not info.path.startswith(table.rstrip("/") + "/")]
    if not found:
        raise EmbedError(f"embed.input.path = {embed.input.path} matches no file ({pattern}); name a file, a folder or a glob")
    root = _root(pattern, [info.path for info in found])
    files, strangers = [], []
    for info in found:
        kind = SUFFIXES.get(os.path.splitext(info.path.removesuffix(".gz"))[1])
        if kind is None or (kind == "parquet" and info.path.endswith(".gz")):
            strangers.append(info.path)
        else:
            files.append(InputFile(info.path, info.path.removeprefix(root), info.version, kind))
    if strangers:
        raise EmbedError(
            f"embed.input.path = {embed.input.path} matches {len(strangers)} files that are not .parquet, .jsonl(.gz) or "
            f".csv(.gz), such as {strangers[0]}; narrow it with a glob, such as {embed.input.path}/**/*.jsonl"
        )
    return files


def _root(pattern: str, paths: list[str]) -> str:
    """The folder, with its closing slash, that the job's pattern names before its first wildcard."""
    if paths == [pattern]:
        return pattern[: pattern.rindex("/") + 1]
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = fixed[: fixed.rindex("/")]
    return fixed.rstrip("/") + "/"


def split_file(file: InputFile, rows_per_unit: int) -> list[Unit]:
    """The units of one file; an empty file makes one unit without rows, so that every file has a part.

    Raises:
        EmbedError: the file cannot be read to its end.
    """
    offsets, num_rows = reading.find_rows(file, every=rows_per_unit)
    starts = range(0, max(num_rows, 1), rows_per_unit)
    return [Unit(file, start, min(start + rows_per_unit, num_rows), offset) for start, offset in zip(starts, offsets)]


def plan_units(job: JobSpec) -> list[Unit]:
    """All units of the job's corpus, done or not. Reads JSONL and CSV files through once, to count their rows."""
    return split_files(list_input(job), embed_section(job).rows_per_unit)


def split_files(files: Iterable[InputFile], rows_per_unit: int) -> list[Unit]:
    """The units of several files, in their order; files are read by several threads."""
    with ThreadPoolExecutor(_PLANNING_THREADS) as pool:
        return [unit for units in pool.map(lambda file: split_file(file, rows_per_unit), files) for unit in units]
