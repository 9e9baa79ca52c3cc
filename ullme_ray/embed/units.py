"""What is embedded at a time: a unit is a range of rows of one version of one input file. No torch, no ray."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass
from typing import Literal

from ullme_ray import storage
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedSpec, JobSpec

Format = Literal["parquet", "jsonl", "csv"]
SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


@dataclass(frozen=True)
class InputFile:
    """One version of one file of the corpus."""

    path: str
    name: str  # path below the folder that the job names: part of generated ids, so that a moved corpus keeps them
    version: str  # etag, or size and modification time
    format: Format

    @property
    def key(self) -> str:
        """The same for all versions of the file."""
        return hashlib.sha256(self.path.encode()).hexdigest()[:16]

    @property
    def compressed(self) -> bool:
        return self.path.endswith(".gz")

    @property
    def unchanged(self) -> bool:
        """Whether the file is still the version that was listed; costs one look-up."""
        return [info.version for info in storage.list_files(glob.escape(self.path))] == [self.version]


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a file: what one task reads, one actor embeds, and one part holds."""

    file: InputFile
    start: int
    stop: int
    offset: int  # byte position of row `start` in the uncompressed file; 0 for Parquet

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def embed_section(job: JobSpec) -> EmbedSpec:
    if job.embed is None:
        raise EmbedError("this job has no embed section; add embed: {input: {path: ...}}")
    return job.embed
