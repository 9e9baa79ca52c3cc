"""What a table holds beside what it should: rows lost or twice, other vectors, files that cannot be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from reader import read_table

from ullme_ray import storage

_VECTOR_TOLERANCE = 1e-5

Key = tuple[str, int]


@dataclass(frozen=True)
class Result:
    """What a table holds, and what its dead letters do."""

    vectors: dict[Key, np.ndarray]
    copies: Counter[Key]
    dead: Counter[tuple[Any, ...]]


@dataclass
class Findings:
    """What is wrong with a table beside the one it should be."""

    lost: int = 0
    duplicated: int = 0
    unreadable: int = 0
    notes: list[str] = field(default_factory=list)


def result_of(table: str) -> Result:
    rows = read_table(table)
    keys = list(zip(rows["id"].to_pylist(), rows["chunk"].to_pylist()))
    vectors = {key: np.asarray(vector, np.float32) for key, vector in zip(keys, rows["embedding"].to_pylist())}
    dead: Counter[tuple[Any, ...]] = Counter()
    for info in storage.list_files(f"{table}/_dead_letters"):
        dead.update((row["file"], row["row"], row["id"], row["reason"]) for row in _read_parquet(info.path).to_pylist())
    return Result(vectors, Counter(keys), dead)


def compare(found: Result, wanted: Result) -> Findings:
    """Rows that are not as they should be; a row with another vector counts as lost."""
    findings = Findings()
    wrong = [
        key
        for key, vector in wanted.vectors.items()
        if key in found.vectors and np.abs(found.vectors[key] - vector).max() > _VECTOR_TOLERANCE
    ]
    for name, got, expected in (("rows", found.copies, wanted.copies), ("dead letters", found.dead, wanted.dead)):
        missing, more = expected - got, got - expected
        findings.lost += missing.total()
        findings.duplicated += more.total()
        if missing or more:
            findings.notes.append(f"{name}: missing {list(missing)[:3]}, too many {list(more)[:3]}")
    findings.lost += len(wrong)
    if wrong:
        findings.notes.append(f"{len(wrong)} vectors differ, such as that of {wrong[0]}")
    return findings


def unreadable_files(table: str) -> list[str]:
    """Parquet files of the table's folder, committed or not, that cannot be read to their end."""
    broken = []
    infos = storage.list_files(table) + storage.list_files(f"{table}/_dead_letters")
    names = sorted({info.path for info in infos if info.path.endswith(".parquet")})
    assert names, f"{table} holds no parts"
    for name in names:
        try:
            _read_parquet(name)
        except (pa.ArrowException, OSError, ValueError) as error:
            broken.append(f"{name}: {error}")
    return broken


def _read_parquet(path: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(path)))
