"""Search over the embeddings table: the question is embedded, vectors are compared, the best rows are fetched.

Exact by default: it streams the table part by part, so it may be larger than memory, and costs one read of the `embedding`
column. With an index (search_index.py) a cheap first pass finds candidates, which are then scored in float as exactly.
Quantised vectors count as what they stand for, and the question's vector is not quantised: that ranks better than bits against
bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ullme_ray.errors import DataError, EmbedError, UllmeError
from ullme_ray.evaluate.filters import matching_rows, parse_filter
from ullme_ray.evaluate.question import Question, embed_question
from ullme_ray.evaluate.search_index import open_index
from ullme_ray.evaluate.table_parts import TableRows
from ullme_ray.retrieval import topk
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import EmbedSpec
from ullme_ray.table import id_column


@dataclass(frozen=True)
class Hit:
    """A row of the table: its id, its cosine with the question, and the user's columns that embed copied into the table."""

    id: Any
    score: float
    columns: dict[str, Any]
    chunk: int = 0  # of the document, from 0; a document that was not split has this one


def search(
    job: JobSpec,
    question: str,
    *,
    top_k: int,
    url: str | None = None,
    key: str | None = None,
    where: Sequence[str] = (),
    index: str | None = None,
) -> list[Hit]:
    """The rows of the job's embeddings table nearest to a question, best first.

    Args:
        url: a running server that embeds the question; absent loads the model in this process.
        key: of that server, as env:NAME or file:PATH; absent takes the first of `serve.api_keys`.
        where: filters, see filters.py; all must hold.
        index: `exact`, `bits` or `faiss`; absent means `search.index`.

    Raises:
        StorageError: there is no table yet.
        EmbedError: another model made the table.
        DataError: the question is empty, or a filter is none of the table.
        ServeError: the server does not answer, or refuses.
    """
    if job.embed is None:
        raise UllmeError("the job has no embed section, so there is no table to search; add one")
    filters = [parse_filter(text) for text in where]
    kind = index or job.search.index
    if kind not in ("exact", "bits", "faiss"):
        raise DataError(f"--index {kind} is none of exact, bits, faiss")
    table = TableRows.open(RunFolder.of(job).resolve(job.embed.output.path))
    keep = matching_rows(table, filters)
    asked = embed_question(job, question, url=url, key=key)
    table.check_model(asked.fingerprint)
    best = _exact(table, asked, top_k, keep) if kind == "exact" else _by_index(job, table, asked, top_k, keep, kind)
    return _read_hits(table, best, job.embed)


def _exact(table: TableRows, asked: Question, k: int, keep: list[np.ndarray | None]) -> list[tuple[int, float]]:
    """(row, score) of the best rows; of rows with equal scores the first."""

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, vectors in table.vectors(keep):
            yield -rows, vectors  # top-k prefers the largest id where scores are equal

    (best,) = topk.top_k(table.form.cut(asked.vector[None]), blocks(), k)
    return [(-row, score) for row, score in best]


def _by_index(
    job: JobSpec, table: TableRows, asked: Question, k: int, keep: list[np.ndarray | None], kind: str
) -> list[tuple[int, float]]:
    if not table.num_rows:
        return []
    masks = [mask for mask in keep if mask is not None]
    allowed = np.concatenate(masks) if masks else None
    question = table.form.cut(asked.vector[None])[0]
    return open_index(job, table, kind).find(question, k, allowed, job.search.oversample)


def _read_hits(table: TableRows, best: list[tuple[int, float]], embed: EmbedSpec) -> list[Hit]:
    id_name = id_column(embed.input)
    names = [name for name in (id_name, "chunk", *embed.input.columns) if name in table.columns.names]
    if table.parts and id_name not in names:
        raise EmbedError(f"the table has no column {id_name} (embed.input.id); run `ullme-ray embed` on this job again")
    values = table.read([row for row, _ in best], names) if best else []
    return [Hit(row.pop(id_name), score, chunk=row.pop("chunk", 0), columns=row) for row, (_, score) in zip(values, best)]
