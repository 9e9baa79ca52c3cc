"""The corpus as units: divides each of its files into row ranges.

Planning a Parquet file costs its footer, a JSONL or CSV file one read (its rows must be counted). Files whose rows are in the
table already are not planned at all (see `parts.py`), so a rerun without changes costs a listing. No torch, no ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ullme_ray.embed.formats import FORMATS
from ullme_ray.embed.listing import list_input
from ullme_ray.embed.reading import readable
from ullme_ray.embed.units import InputFile, Unit, embed_section
from ullme_ray.spec.job import JobSpec

_PLANNING_THREADS = 8


def split_file(file: InputFile, rows_per_unit: int) -> list[Unit]:
    """The units of one file; an empty file makes one unit without rows, so that every file has a part.

    Raises:
        EmbedError: the file cannot be read to its end.
    """
    with readable(file):
        return FORMATS[file.format].units(file, rows_per_unit)


def plan_units(job: JobSpec) -> list[Unit]:
    """All units of the job's corpus, done or not. Reads JSONL and CSV files through once, to count their rows."""
    return split_files(list_input(job), embed_section(job).rows_per_unit)


def split_files(files: Iterable[InputFile], rows_per_unit: int) -> list[Unit]:
    """The units of several files, in their order; files are read by several threads."""
    with ThreadPoolExecutor(_PLANNING_THREADS) as pool:
        return [unit for units in pool.map(lambda file: split_file(file, rows_per_unit), files) for unit in units]
