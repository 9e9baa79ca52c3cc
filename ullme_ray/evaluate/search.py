"""Exact search over the embeddings table: the question is embedded, every vector is compared, the best rows are fetched.

Streams the table part by part, so it may be larger than memory; a search costs one read of the `embedding` column. Quantised
vectors count as what they stand for, and the question's vector is not quantised: that ranks better than bits against bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from ullme_ray.errors import DataError, EmbedError, ServeError, UllmeError
from ullme_ray.evaluate.table_parts import EMBEDDING_COLUMN, check_model, sorted_parts
from ullme_ray.model import open_encoder
from ullme_ray.retrieval import topk
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import EmbedSpec
from ullme_ray.table import id_column, open_table
from ullme_ray.vectors import format_of

BATCH_ROWS = 16_384
REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Hit:
    """A row of the table: its id, its cosine with the question, and the user's columns that embed copied into the table."""

    id: Any
    score: float
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Question:
    vector: np.ndarray  # (D,) float32, unit length
    fingerprint: str  # of the model that made it


def search(job: JobSpec, question: str, *, top_k: int, url: str | None = None) -> list[Hit]:
    """The rows of the job's embeddings table nearest to a question, best first.

    Args:
        url: a running server that embeds the question; absent loads the model in this process.

    Raises:
        StorageError: there is no table yet.
        EmbedError: another model made the table.
        ServeError: the server does not answer, or refuses.
    """
    if job.embed is None:
        raise UllmeError("the job has no embed section, so there is no table to search; add one")
    if not question.strip():
        raise DataError("the question is empty; ask something")
    path = RunFolder.of(job).resolve(job.embed.output.path)
    parts = _open_parts(path)
    asked = _ask_server(job, question, url) if url else _ask_model(job, question)
    return [_read_hit(parts[part], row, score, job.embed) for part, row, score in _nearest(parts, asked, top_k, path)]


def _open_parts(path: str) -> list[Any]:
    """The table's Parquet files, in name order, so that equal tables give equal answers."""
    return sorted_parts(open_table(path))


def _ask_model(job: JobSpec, question: str) -> _Question:
    encoder = open_encoder(job)
    return _Question(encoder.encode([question], "query")[0], encoder.fingerprint)


def _ask_server(job: JobSpec, question: str, url: str) -> _Question:
    keys = job.serve.api_keys.reveal_list() if job.serve and job.serve.api_keys else []
    headers = {"authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}
    body = {"model": job.name, "input": question, "input_type": "query"}
    use_proxies = httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1")
    with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=use_proxies) as client:
        info = _answer(client, "GET", "/info")
        vector = _answer(client, "POST", "/v1/embeddings", json=body)["data"][0]["embedding"]
    return _Question(np.asarray(vector, dtype=np.float32), info["fingerprint"])


def _answer(client: httpx.Client, method: str, route: str, **request: Any) -> dict[str, Any]:
    try:
        response = client.request(method, route, **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServeError(
            f"no answer from {client.base_url} ({error}); start a server with `ullme-ray serve`, or search without --url"
        ) from None
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.status_code != 200 or not isinstance(content, dict):
        told = content.get("error") if isinstance(content, dict) else None  # nested in OpenAI's form, a text in TEI's
        reason = (told.get("message") if isinstance(told, dict) else told) or response.text[:200]
        raise ServeError(f"{client.base_url} answered {route} with {response.status_code}: {reason}")
    return content


def _nearest(parts: list[Any], asked: _Question, k: int, path: str) -> list[tuple[int, int, float]]:
    """(part, row in it, score) of the best rows; of rows with equal scores the first."""
    first_rows = np.cumsum([0, *(part.count_rows() for part in parts)])  # of each part, in the whole table

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part, first_row in zip(parts, first_rows.tolist()):
            check_model(part, asked.fingerprint, path)
            form = format_of(part.physical_schema.metadata)
            for batch in part.to_batches(columns=[EMBEDDING_COLUMN], batch_size=BATCH_ROWS):
                if batch.num_rows:
                    # Top-k prefers the largest id where scores are equal, so the first row gets the largest.
                    vectors = form.decode(form.from_arrow(batch.column(0)))  # (n, D)
                    yield -np.arange(first_row, first_row + batch.num_rows), vectors
                first_row += batch.num_rows

    question = asked.vector[None]
    if parts:
        question = format_of(parts[0].physical_schema.metadata).cut(question)  # (1, D)
    (best,) = topk.top_k(question, blocks(), k)
    found = []
    for negative_row, score in best:
        part = int(np.searchsorted(first_rows, -negative_row, side="right")) - 1
        found.append((part, -negative_row - int(first_rows[part]), score))
    return found


def _read_hit(part: Any, row: int, score: float, embed: EmbedSpec) -> Hit:
    id_name = id_column(embed.input)
    names = [name for name in (id_name, *embed.input.columns) if name in part.physical_schema.names]
    if id_name not in names:
        raise EmbedError(f"the table has no column {id_name} (embed.input.id); run `ullme-ray embed` on this job again")
    (values,) = part.take(pa.array([row]), columns=names).to_pylist()
    return Hit(values.pop(id_name), score, values)
