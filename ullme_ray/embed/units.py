"""What is embedded at a time: a unit is a range of rows of one version of one input file. No torch, no ray."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ullme_ray import storage
from ullme_ray.errors import EmbedError
from ullme_ray.row_files import CODECS, plain_name
from ullme_ray.spec.job import EmbedSpec, JobSpec

Format = Literal["parquet", "jsonl", "csv", "text"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSIBLE = ("jsonl", "csv")
KINDS = f"Parquet, .jsonl or .csv (each of these two plain or with {', '.join(CODECS)}), .txt or .md"
LOOKUP_THREADS = 16  # for requests that wait for a store


def format_of(path: str) -> Format | None:
    """By the file's ending; None for one that cannot be read."""
    plain = plain_name(path)
    kind = next((kind for suffix, kind in SUFFIXES.items() if plain.endswith(suffix)), None)
    return kind if plain == path.lower() or kind in _COMPRESSIBLE else None


@dataclass(frozen=True)
class TextFile:
    """A plain text, one of those that make an input file of format text."""

    name: str  # path below the folder that the job names
    version: str


@dataclass(frozen=True)
class InputFile:
    """One version of one file of the corpus, or of a group of plain texts, which goes by the path of its first."""

    path: str
    name: str  # path below the folder that the job names: part of generated ids, so that a moved corpus keeps them
    version: str  # etag, or size and modification time
    format: Format
    members: tuple[TextFile, ...] = ()
    immutable: bool = False  # a file of a Delta table, whose content never changes

    @cached_property
    def key(self) -> str:
        """The same for all versions of the file."""
        return hashlib.sha256(self.path.encode()).hexdigest()[:16]

    @property
    def num_files(self) -> int:
        return len(self.members) or 1

    def path_of(self, row: int) -> str:
        """The file that a row lies in."""
        return self.path.removesuffix(self.name) + self.members[row].name if self.members else self.path

    def generated_id(self, row: int) -> str:
        """The id of a row where the job names no column with one."""
        return self.members[row].name if self.members else f"{self.name}#{row}"

    @property
    def unchanged(self) -> bool:
        """Whether the file is still the version that was listed; costs one look-up for each file."""
        if self.immutable:
            return True
        versions = [member.version for member in self.members] or [self.version]
        paths = [self.path_of(row) for row in range(len(versions))]
        with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
            return all(pool.map(_is_version, paths, versions))


def _is_version(path: str, version: str) -> bool:
    return [info.version for info in storage.list_files(glob.escape(path))] == [version]


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a file: what one task reads, one actor embeds, and one part holds."""

    file: InputFile
    start: int
    stop: int
    offset: int  # byte position of row `start` in the decompressed file; 0 where rows are not found by bytes

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def units_at(file: InputFile, offsets: Iterable[int], rows_per_unit: int) -> list[Unit]:
    """Units of `rows_per_unit` rows of a file whose rows begin at these bytes; of an empty file one unit without rows."""
    starts, num_rows = [], 0
    for offset in offsets:
        if num_rows % rows_per_unit == 0:
            starts.append(offset)
        num_rows += 1
    return [
        Unit(file, number * rows_per_unit, min((number + 1) * rows_per_unit, num_rows), offset)
        for number, offset in enumerate(starts or [0])
    ]


def num_files(files: Iterable[InputFile]) -> int:
    """Files of the corpus, where each plain text of a group counts."""
    return sum(file.num_files for file in files)


def embed_section(job: JobSpec) -> EmbedSpec:
    if job.embed is None:
        raise EmbedError("this job has no embed section; add embed: {input: {path: ...}}")
    return job.embed
