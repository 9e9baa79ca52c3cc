"""Exact top-k of many queries over the embeddings table: Ray tasks stream its parts, each holding one batch at a time.

Costs one read of the columns `embedding` and id, divided over the cluster, whatever the number of queries; memory is that of
one batch and of the queries' hits, so a table of any size passes through. A document in chunks counts by its best chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ullme_ray.errors import DataError
from ullme_ray.evaluate.encoding import get_or_raise
from ullme_ray.evaluate.table_parts import BATCH_ROWS, EMBEDDING_COLUMN, check_model, sorted_parts
from ullme_ray.retrieval.metrics import Run
from ullme_ray.retrieval.topk import merge_hits, top_k
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.table import id_column, open_table
from ullme_ray.vectors import format_of

_PARTS_PER_TASK = 4

Hits = list[list[tuple[Any, float]]]


@dataclass(frozen=True)
class TableSize:
    version: str  # of the table, and its own id: one made anew is another
    num_rows: int


def count_rows(job: JobSpec) -> TableSize:
    """Raises StorageError where there is no table."""
    table = open_table(_path(job))
    return TableSize(f"{table.metadata().id}-{table.version()}", table.to_pyarrow_dataset().count_rows())


def table_run(job: JobSpec, query_ids: list[str], queries: np.ndarray, k: int, fingerprint: str) -> Run:
    """The k best documents of every query.

    Args:
        queries: (Q, D), the vectors of `query_ids`.
        fingerprint: of the model that made them.

    Raises:
        EmbedError: the table is of another model.
        DataError: it has no id column.
    """
    assert job.embed is not None
    table = open_table(_path(job))
    version, num_parts = table.version(), len(table.file_uris())
    task = ray.remote(num_cpus=1, max_retries=3)(_search_parts)
    held = ray.put(queries)
    id_name = id_column(job.embed.input)
    groups = [range(first, min(first + _PARTS_PER_TASK, num_parts)) for first in range(0, num_parts, _PARTS_PER_TASK)]
    waiting = [task.remote(_path(job), version, group, held, k, fingerprint, id_name) for group in groups]
    best: Hits = [[] for _ in query_ids]
    while waiting:  # merged as they come: the hits of a thousand tasks at once would be what memory has to hold
        (done,), waiting = ray.wait(waiting, num_returns=1)
        best = merge_hits([best, get_or_raise(done)], k)
    return {query: {str(id_): score for id_, score in hits} for query, hits in zip(query_ids, best)}


def _search_parts(path: str, version: int, numbers: range, queries: np.ndarray, k: int, fingerprint: str, id_name: str) -> Hits:
    table = open_table(path)
    if table.version() != version:
        table.load_as_version(version)
    parts = sorted_parts(table)[numbers.start : numbers.stop]
    if not parts:
        return [[] for _ in queries]
    for part in parts:
        check_model(part, fingerprint, path)
        if id_name not in part.physical_schema.names:
            raise DataError(f"{path} has no column {id_name} (embed.input.id), by which judged passages are named; embed again")
    question = format_of(parts[0].physical_schema.metadata).cut(queries)  # (Q, D)
    return top_k(question, _blocks(parts, id_name), k, repeated_ids=True)


def _blocks(parts: list[Any], id_name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in parts:
        form = format_of(part.physical_schema.metadata)
        names = [id_name, EMBEDDING_COLUMN]
        for batch in part.to_batches(columns=names, batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1):
            if batch.num_rows:
                ids = np.array([str(value) for value in batch.column(id_name).to_pylist()])
                yield ids, form.decode(form.from_arrow(batch.column(EMBEDDING_COLUMN)))


def _path(job: JobSpec) -> str:
    assert job.embed is not None
    return RunFolder.of(job).resolve(job.embed.output.path)
