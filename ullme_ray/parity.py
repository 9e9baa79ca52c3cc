"""The proof at the end of a run: the same texts have the same vectors in the export, in the table and through HTTP.

Costs three encodings of a few dozen texts, one of them by sentence-transformers itself, as any user of the export would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import numpy as np

from ullme_ray.errors import UllmeError
from ullme_ray.spec import JobSpec, RunFolder

if TYPE_CHECKING:
    from ullme_ray.vectors import VectorFormat

NUM_TEXTS = 32
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Parity:
    """The lowest cosine over the texts, for each pair of places that hold a vector of the same text."""

    num_texts: int
    min_cosines: dict[tuple[str, str], float]

    def to_text(self) -> str:
        if not self.num_texts:
            return "vectors not compared: the table has the first passages of the corpus in chunks only"
        pairs = ", ".join(f"{a} = {b} {cosine:.6f}" for (a, b), cosine in self.min_cosines.items())
        return f"same vectors everywhere, lowest cosine over {self.num_texts} passages: {pairs}"


def check_parity(job: JobSpec, url: str) -> Parity:
    """Compares the vectors of the first passages of the corpus.

    Raises:
        UllmeError: two places differ by more than rounding.
    """
    texts, table, form = _texts_and_table_vectors(job)
    if not texts:
        return Parity(0, {})
    vectors = {"served": _served(job, url, texts)}
    if job.train:
        vectors["export"] = _exported(job, texts)
    cosines = {("export", "served"): min_cosine(vectors["export"], vectors["served"])} if job.train else {}
    for name, whole in vectors.items():  # as the table would store them, for it may hold less than the whole
        cosines[name, "table"] = min_cosine(form.decode(form.encode(whole)), table)
    found = Parity(len(texts), cosines)
    for (a, b), cosine in found.min_cosines.items():
        limit = MIN_COSINE[job.model.dtype]
        if b == "table":
            limit = min(limit, form.least_cosine)
        if not cosine >= limit:  # a NaN must fail too
            raise UllmeError(
                f"{a} and {b} vectors of the same passage differ: cosine {cosine:.6f}, at least {limit} is needed for"
                f" model.dtype = {job.model.dtype}; was one of them made by another model? Remove it and run again"
            )
    return found


def min_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Lowest cosine between rows of two (N, D) arrays."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def _texts_and_table_vectors(job: JobSpec) -> tuple[list[str], np.ndarray, VectorFormat]:
    """The first good texts of the corpus, what the table holds for them, found by content hash, and how it stores vectors."""
    import pyarrow.dataset as ds

    from ullme_ray.table import open_table
    from ullme_ray.vectors import format_of_table

    assert job.embed is not None
    wanted = min(NUM_TEXTS, job.serve.max_inputs) if job.serve else NUM_TEXTS
    text_of = dict(itertools.islice(_corpus(job), wanted))
    path = RunFolder.of(job).resolve(job.embed.output.path)
    table = open_table(path)
    rows = table.to_pyarrow_dataset().to_table(
        columns=["content_hash", "chunk", "embedding"], filter=ds.field("content_hash").isin(list(text_of))
    )
    vector_of = dict(zip(rows["content_hash"].to_pylist(), rows["embedding"].to_pylist()))
    missing = text_of.keys() - vector_of.keys()
    if missing or not text_of:
        raise UllmeError(
            f"the table {path} lacks {len(missing)} of the first {len(text_of)} passages of embed.input.path;"
            " run `ullme-ray embed` on this job again"
        )
    split = {key for key, chunk in zip(rows["content_hash"].to_pylist(), rows["chunk"].to_pylist()) if chunk > 0}
    whole = [key for key in text_of if key not in split]  # of a document in chunks the table has no vector of the whole
    form = format_of_table(table)
    stored = np.asarray([vector_of[key] for key in whole], dtype=form.stored_type)
    return [text_of[key] for key in whole], form.decode(stored), form  # (N, D)


def _corpus(job: JobSpec) -> Iterator[tuple[str, str]]:
    """(content hash, text) of the corpus's good rows, in order."""
    from ullme_ray.embed.planning import list_input, split_file
    from ullme_ray.embed.reading import column_types, read_unit

    assert job.embed is not None
    for file in list_input(job):
        types = column_types(file, job.embed.input)
        for unit in split_file(file, job.embed.rows_per_unit):
            rows = read_unit(unit, job.embed.input, types)
            yield from zip(rows.good["content_hash"].to_pylist(), rows.texts)


def _served(job: JobSpec, url: str, texts: list[str]) -> np.ndarray:
    response = httpx.post(
        f"{url}/v1/embeddings",
        json={"model": job.name, "input": texts, "input_type": "passage"},
        headers=_headers(job),
        timeout=REQUEST_TIMEOUT_S,
        trust_env=False,
    )
    if response.status_code != 200:
        raise UllmeError(f"{url}/v1/embeddings answered {response.status_code}: {response.text[:200]}")
    return np.asarray([row["embedding"] for row in response.json()["data"]], dtype=np.float32)  # (N, D)


def _headers(job: JobSpec) -> dict[str, str]:
    keys = job.serve.api_keys.reveal_list() if job.serve and job.serve.api_keys else []
    return {"authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}


def _exported(job: JobSpec, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    from ullme_ray import storage

    model = SentenceTransformer(storage.fetch_folder(RunFolder.of(job).export), device="cpu")
    vectors = model.encode(texts, prompt_name="passage", show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(vectors, dtype=np.float32)  # (N, D)
