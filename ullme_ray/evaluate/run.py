"""The evaluate stage: the model before and after training, and BM25, on every set of the job. Read this file first.

Costs one encode of every set per model; a model's figures are kept by its fingerprint and the set's version, so that a second
run encodes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from ullme_ray import storage
from ullme_ray.errors import UllmeError
from ullme_ray.evaluate import bm25
from ullme_ray.evaluate.encoding import EncoderPool
from ullme_ray.evaluate.report import EvaluationReport, ModelScores, SetScores
from ullme_ray.model import encoder_fingerprint, ensure_base
from ullme_ray.progress import Progress
from ullme_ray.retrieval.local_set import LocalSet, read_local_set
from ullme_ray.retrieval.metrics import Run, mean_scores, score_run
from ullme_ray.retrieval.topk import top_k
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import EvaluateSpec

ModelName = Literal["base", "trained", "bm25"]
PerQuery = dict[str, dict[str, float]]  # query id -> measure -> value


def preflight(job: JobSpec) -> None:
    """Reads every set and checks that results can be written. Sets that `job.dataset` will write are taken on trust.

    Raises:
        DataError: a set is missing or broken.
        StorageError: the run's folder cannot be written.
    """
    folder = RunFolder.of(job)
    for local in _spec(job).local:
        if not (job.dataset and local.path.startswith("run:data")):
            read_local_set(folder.resolve(local.path))
    storage.check_writable(folder.evaluation)


def run_evaluate(job: JobSpec, *, models: Sequence[ModelName] | None = None) -> EvaluationReport:
    """Measures models on the job's sets and writes `evaluation/report.json` in the run's folder.

    Args:
        models: those to measure; absent means all that the job asks for. `("base",)` measures before training.

    Raises:
        DataError: a set is missing or broken.
        ModelError: a model is missing or cannot be loaded.
    """
    folder = RunFolder.of(job)
    local_sets = [read_local_set(folder.resolve(local.path)) for local in _spec(job).local]
    chosen = models if models is not None else models_of(job)
    if "base" in chosen:
        ensure_base(job)
    # Of all models first, so that one that is missing is an error before long work.
    fingerprints = {model: _fingerprint(job, model) for model in chosen}
    num_texts = sum(len(local_set.queries) + len(local_set.passages) for local_set in local_sets)
    with EncoderPool(job, num_texts=num_texts) as pool:
        found = {model: _measure(job, model, fingerprints[model], local_sets, pool) for model in chosen}
    report = EvaluationReport(
        job=job.name,
        sets=tuple(
            SetScores(
                path=local_set.path,
                version=local_set.version,
                num_queries=len(local_set.queries),
                num_passages=len(local_set.passages),
                models=tuple(found[model][position] for model in chosen),
            )
            for position, local_set in enumerate(local_sets)
        ),
    )
    storage.write_text(storage.join(folder.evaluation, "report.json"), json.dumps(report.as_dict(), indent=2) + "\n")
    return report


def models_of(job: JobSpec) -> tuple[ModelName, ...]:
    """The models that the job's evaluate section compares, worst expected first."""
    spec = _spec(job)
    before: tuple[ModelName, ...] = ("base",) if spec.compare_base or job.train is None else ()
    after: tuple[ModelName, ...] = ("trained",) if job.train else ()
    return (*before, *after, *(("bm25",) if spec.bm25 else ()))


def _spec(job: JobSpec) -> EvaluateSpec:
    if job.evaluate is None:
        raise UllmeError("the job has no evaluate section; add evaluate: {local: [{path: FOLDER}]}")
    return job.evaluate


def _fingerprint(job: JobSpec, model: ModelName) -> str:
    return bm25.FINGERPRINT if model == "bm25" else encoder_fingerprint(job, which=model)


def _measure(
    job: JobSpec, model: ModelName, fingerprint: str, local_sets: Sequence[LocalSet], pool: EncoderPool
) -> list[ModelScores]:
    """One model on all sets: kept results where there are any; only what is left is encoded."""
    results = [_ResultFile(job, fingerprint, local_set) for local_set in local_sets]
    per_query = [result.read() for result in results]
    missing = [position for position, known in enumerate(per_query) if known is None]
    runs = _runs(job, model, fingerprint, [local_sets[position] for position in missing], pool)
    for position, run in zip(missing, runs):
        scores = score_run(local_sets[position].qrels, run, _measures(job))
        results[position].write(scores)
        per_query[position] = scores
    return [ModelScores(model, fingerprint, mean_scores(scores)) for scores in per_query if scores is not None]


def _measures(job: JobSpec) -> list[str]:
    k = _spec(job).k
    return [f"ndcg@{k}", f"recall@{k}", f"mrr@{k}"]


def _runs(job: JobSpec, model: ModelName, fingerprint: str, local_sets: Sequence[LocalSet], pool: EncoderPool) -> Iterator[Run]:
    """The model's ranking of every set, one after the other."""
    if not local_sets:
        return
    k = _spec(job).k
    if model == "bm25":
        for local_set in local_sets:
            yield bm25.bm25_run(local_set.queries, local_set.passages, k)
        return
    pool.load(model, fingerprint)
    for local_set in local_sets:
        total = len(local_set.queries) + len(local_set.passages)
        with Progress(f"evaluate {model}", total, unit="texts") as progress:
            yield _dense_run(pool, local_set, k, progress)


def _dense_run(pool: EncoderPool, local_set: LocalSet, k: int, progress: Progress) -> Run:
    """Exact search: passage vectors are searched as they come and then dropped."""
    done = 0
    progress.update(done)
    queries = list(local_set.queries.values())
    query_vectors: list[np.ndarray | None] = [None] * len(queries)
    for rows, vectors in pool.encode(queries, "query", progress):
        for row, vector in zip(rows, vectors):
            query_vectors[row] = vector
        done += len(rows)
        progress.update(done)

    ids_of: dict[str, list[str]] = {}  # a text that several passages share is encoded once
    for id_, text in local_set.passages.items():
        ids_of.setdefault(text, []).append(id_)
    texts = list(ids_of)

    def blocks() -> Iterator[tuple[list[str], np.ndarray]]:
        nonlocal done
        for rows, vectors in pool.encode(texts, "passage", progress):
            groups = [ids_of[texts[row]] for row in rows]
            yield [id_ for group in groups for id_ in group], np.repeat(vectors, [len(group) for group in groups], axis=0)
            done += sum(len(group) for group in groups)
            progress.update(done)

    hits = top_k(np.stack([vector for vector in query_vectors if vector is not None]), blocks(), k)
    return {query: dict(best) for query, best in zip(local_set.queries, hits)}


class _ResultFile:
    """A model's measures on one set, kept under a name that says with what they were made."""

    def __init__(self, job: JobSpec, fingerprint: str, local_set: LocalSet) -> None:
        self._made_with = {"fingerprint": fingerprint, "set_version": local_set.version, "measures": _measures(job)}
        key = hashlib.sha256(json.dumps(self._made_with, sort_keys=True).encode()).hexdigest()[:24]
        self._path = storage.join(RunFolder.of(job).evaluation, "results", f"{key}.json")

    def read(self) -> PerQuery | None:
        try:
            content = json.loads(storage.read_text(self._path))
        except (FileNotFoundError, ValueError):
            return None
        per_query: PerQuery = content["per_query"]
        return per_query

    def write(self, per_query: PerQuery) -> None:
        storage.write_text(self._path, json.dumps({**self._made_with, "per_query": per_query}))
