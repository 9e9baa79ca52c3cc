"""Retrieval quality of every model on every set of `evaluate.local`.

Costs one encode of a set per model. What a model ranked is kept under its fingerprint and the set's version, so that a second
run, or one that was cut off, encodes only what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from ullme_ray import storage
from ullme_ray.evaluate import bm25
from ullme_ray.evaluate.contenders import Contender, newest, settings_of
from ullme_ray.evaluate.encoding import EncoderPool
from ullme_ray.evaluate.report import Comparison, ModelScores, SetScores
from ullme_ray.evaluate.table_run import count_rows, table_run
from ullme_ray.progress import Progress
from ullme_ray.retrieval.held_out import read_held_out
from ullme_ray.retrieval.local_set import LocalSet
from ullme_ray.retrieval.metrics import Run, mean_scores, score_run
from ullme_ray.retrieval.statistics import holm, interval, paired_p_value
from ullme_ray.retrieval.topk import top_k
from ullme_ray.retrieval.trec import trec_lines
from ullme_ray.spec import JobSpec, RunFolder

PerQuery = dict[str, dict[str, float]]  # query id -> measure -> value


def measure_sets(job: JobSpec, models: Sequence[Contender]) -> tuple[SetScores, ...]:
    """All models on all sets; a set over the embeddings table is measured with the model that the table is of.

    Raises:
        DataError: a set is missing or broken.
        ModelError: a model cannot be loaded.
        EmbedError: the table is of another model.
    """
    sets = [read_held_out(job, position) for position in range(len(settings_of(job).local))]
    kept: dict[tuple[int, str], _Kept] = {}
    with EncoderPool(job, num_texts=sum(len(s.queries) + len(s.passages) for s in sets)) as pool:
        for model in models:
            for position, found in _measure(job, model, sets, pool):
                kept[position, model.name] = found
    return tuple(_set_scores(job, position, local, models, kept) for position, local in enumerate(sets))


def measures(job: JobSpec) -> list[str]:
    """The one that decides first."""
    k, depth = settings_of(job).k, settings_of(job).ranked
    return list(dict.fromkeys([f"ndcg@{k}", f"recall@{k}", f"recall@{depth}", f"mrr@{k}", f"map@{depth}"]))


class _Kept:
    """A model's run and its measures on one set, in files whose names say with what they were made."""

    def __init__(self, job: JobSpec, model: Contender, local: LocalSet, table_version: str | None) -> None:
        self._folder = RunFolder.of(job).evaluation
        self._made_with = {
            "fingerprint": model.fingerprint,
            "set_version": local.version,
            "measures": measures(job),
            **({"table": table_version} if table_version else {}),
        }
        key = hashlib.sha256(json.dumps(self._made_with, sort_keys=True).encode()).hexdigest()[:24]
        self.results = f"results/{key}.json"
        self.run = f"runs/{set_name(local)}/{_slug(model.name)}-{key[:8]}.trec"
        self._tag = model.name

    def read(self) -> PerQuery | None:
        """The measures; None where they, or the run under the name that it has now, are not there."""
        if not storage.exists(storage.join(self._folder, self.run)):
            return None
        try:
            content = json.loads(storage.read_text(storage.join(self._folder, self.results)))
        except (FileNotFoundError, ValueError):
            return None
        per_query: PerQuery = content["per_query"]
        return per_query

    def write(self, run: Run, per_query: PerQuery) -> None:
        """The results last: where they are, the run is too."""
        storage.write_text(storage.join(self._folder, self.run), "".join(trec_lines(run, self._tag)))
        storage.write_text(storage.join(self._folder, self.results), json.dumps({**self._made_with, "per_query": per_query}))


def set_name(local: LocalSet) -> str:
    """A set's folder below evaluation/runs/."""
    return f"{_slug(local.path.rstrip('/').rpartition('/')[2])}-{local.version[:8]}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "set"


def _measure(job: JobSpec, model: Contender, sets: Sequence[LocalSet], pool: EncoderPool) -> Iterator[tuple[int, _Kept]]:
    """One model on all its sets: kept results where there are any; only what is left is encoded."""
    specs = settings_of(job).local
    missing = []
    for position, local in enumerate(sets):
        version = None
        if specs[position].table:
            if model.model != newest(job):
                continue
            version = count_rows(job).version
        kept = _Kept(job, model, local, version)
        if kept.read() is None:
            missing.append((position, kept))
        yield position, kept
    if missing and model.model is not None:
        pool.load(model.model, model.fingerprint)
    for position, kept in missing:
        run = _run(job, model, sets[position], pool, over_table=specs[position].table)
        kept.write(run, score_run(sets[position].qrels, run, measures(job)))


def _run(job: JobSpec, model: Contender, local: LocalSet, pool: EncoderPool, *, over_table: bool) -> Run:
    depth = settings_of(job).ranked
    if model.model is None:
        return bm25.bm25_run(local.queries, local.passages, depth)
    total = len(local.queries) + (0 if over_table else len(local.passages))
    with Progress(f"evaluate {model.name}", total, unit="texts") as progress:
        queries = _encode_queries(pool, local, progress)
        if over_table:
            return table_run(job, list(local.queries), queries, depth, model.fingerprint)
        return _dense_run(pool, local, queries, depth, progress)


def _encode_queries(pool: EncoderPool, local: LocalSet, progress: Progress) -> np.ndarray:
    """(Q, D), in the set's order."""
    done = 0
    progress.update(done)
    queries = list(local.queries.values())
    vectors: list[np.ndarray | None] = [None] * len(queries)
    for rows, found in pool.encode(queries, "query", progress):
        for row, vector in zip(rows, found):
            vectors[row] = vector
        done += len(rows)
        progress.update(done)
    return np.stack([vector for vector in vectors if vector is not None])


def _dense_run(pool: EncoderPool, local: LocalSet, queries: np.ndarray, k: int, progress: Progress) -> Run:
    """Exact search: passage vectors are searched as they come and then dropped."""
    ids_of: dict[str, list[str]] = {}  # a text that several passages share is encoded once
    for id_, text in local.passages.items():
        ids_of.setdefault(text, []).append(id_)
    texts = list(ids_of)

    def blocks() -> Iterator[tuple[list[str], np.ndarray]]:
        done = len(queries)
        for rows, vectors in pool.encode(texts, "passage", progress):
            groups = [ids_of[texts[row]] for row in rows]
            yield [id_ for group in groups for id_ in group], np.repeat(vectors, [len(group) for group in groups], axis=0)
            done += sum(len(group) for group in groups)
            progress.update(done)

    return {query: dict(best) for query, best in zip(local.queries, top_k(queries, blocks(), k))}


def _set_scores(
    job: JobSpec, position: int, local: LocalSet, models: Sequence[Contender], kept: dict[tuple[int, str], _Kept]
) -> SetScores:
    present = [model for model in models if (position, model.name) in kept]
    values: dict[str, dict[str, np.ndarray]] = {}  # model -> measure -> (Q,)
    scores = []
    for model in present:
        files = kept[position, model.name]
        per_query = files.read()
        assert per_query is not None
        names = measures(job)
        values[model.name] = {name: np.array([per_query[query][name] for query in local.queries]) for name in names}
        intervals = {name: interval(values[model.name][name]) for name in names}
        scores.append(ModelScores(model.name, model.fingerprint, mean_scores(per_query), intervals, files.run, files.results))
    over_table = settings_of(job).local[position].table
    return SetScores(
        path=local.path,
        version=local.version,
        name=set_name(local),
        num_queries=len(local.queries),
        num_passages=count_rows(job).num_rows if over_table else len(local.passages),
        models=tuple(scores),
        comparisons=_compare({name: found[measures(job)[0]] for name, found in values.items()}, measures(job)[0]),
    )


def _compare(values: dict[str, np.ndarray], measure: str) -> tuple[Comparison, ...]:
    """Every pair of models by one measure, tested on the same queries."""
    pairs = [
        (first, second) if values[first].mean() >= values[second].mean() else (second, first)
        for first, second in itertools.combinations(values, 2)
    ]
    p_values = [paired_p_value(values[better], values[worse]) for better, worse in pairs]
    found = []
    for (better, worse), p_value, adjusted in zip(pairs, p_values, holm(p_values)):
        gains = values[better] - values[worse]
        found.append(Comparison(better, worse, measure, float(gains.mean()), interval(gains), p_value, adjusted))
    return tuple(found)
