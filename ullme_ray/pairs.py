"""Training rows: {query, positive(s), negative(s)} from JSONL (.gz) or Parquet, checked one by one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Pair:
    """A query with the passages that answer it and, maybe, passages that look as if they did."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """All usable rows of one `train.data` entry, in file order, and the reasons why others were left out."""

    path: str
    weight: float
    pairs: list[Pair]
    rejected: list[str] = field(default_factory=list)


def read_sources(job: JobSpec) -> list[Source]:
    """Reads every source of the job.

    Raises:
        DataError: a source has no file, a file cannot be read, or no row of it is usable.
    """
    assert job.train is not None
    folder = RunFolder.of(job)
    return [_read_source(folder.resolve(source.path), source.weight, i) for i, source in enumerate(job.train.data)]


def check_sources(job: JobSpec) -> None:
    """Before long work: every source names at least one file of a known kind.

    Raises:
        DataError: naming the source.
    """
    assert job.train is not None
    for position, source in enumerate(job.train.data):
        _files(RunFolder.of(job).resolve(source.path), position)


def _files(path: str, position: int) -> list[storage.FileInfo]:
    files = storage.list_files(path)
    if not files:
        raise DataError(f"train.data.{position}.path = {path} matches no file; check the path")
    unknown = [file.path for file in files if not file.path.endswith(_SUFFIXES)]
    if unknown:
        raise DataError(f"train.data.{position}.path: {unknown[0]} is none of {', '.join(_SUFFIXES)}; narrow the glob")
    return files


def _read_source(path: str, weight: float, position: int) -> Source:
    source = Source(path, weight, [])
    for file in _files(path, position):
        for where, row in _rows(file.path):
            pair = _parse(row)
            if isinstance(pair, Pair):
                source.pairs.append(pair)
            else:
                source.rejected.append(f"{where}: {pair}")
    if not source.pairs:
        first = f" (first: {source.rejected[0]})" if source.rejected else ""
        raise DataError(f"train.data.{position}.path = {path} holds no usable row; {len(source.rejected)} were rejected{first}")
    return source


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of one file; a line that is no JSON comes as None."""
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet as pq

            with storage.open_read(path) as stream:
                number = 0
                for batch in pq.ParquetFile(stream).iter_batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path} row {number}", row
            return
        with storage.open_read(path) as raw, gzip.open(raw) if path.endswith(".gz") else raw as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        yield f"{path} line {number}", json.loads(line)
                    except (ValueError, RecursionError):
                        yield f"{path} line {number}", None
    except (OSError, EOFError, ValueError) as error:  # ValueError: pyarrow's ArrowInvalid
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _parse(row: Any) -> Pair | str:
    """The row as a Pair, or the reason why it is none."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        return "has no query text"
    positives, negatives = _texts(row, "positive"), _texts(row, "negative")
    if isinstance(positives, str) or isinstance(negatives, str):
        return positives if isinstance(positives, str) else str(negatives)
    if not positives:
        return "has no positive passage"
    try:
        "".join((query, *positives, *negatives)).encode()
    except UnicodeEncodeError:
        return "has half a surrogate pair, which no tokenizer takes"
    return Pair(query, positives, tuple(text for text in negatives if text not in positives))


def _texts(row: dict[str, Any], name: str) -> tuple[str, ...] | str:
    value = row.get(f"{name}s", row.get(name))
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        return f"has a {name} that is neither text nor a list of texts"
    return tuple(text for text in values if text.strip())
