"""The generation pass beside the embedding: GRL trains the two to agree, and this tells whether they do, before and after.

Every query of the held-out rows is scored with its own passages and with some of other rows, log p(passage | query) per token,
which is what the alignment loss compares with the cosine. Costs one generation pass over rows x max_passages texts per model.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from scipy.stats import kendalltau

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.evaluate.contenders import Contender, settings_of
from ullme_ray.evaluate.encoding import EncoderPool, actor_options, get_or_raise
from ullme_ray.evaluate.generation_model import GenerationModel, why_not
from ullme_ray.evaluate.generation_scores import GenerationReport, GenerationScores
from ullme_ray.model.encoder import Which
from ullme_ray.pairs.rows import Pair
from ullme_ray.pairs.strict import strict_rows
from ullme_ray.progress import Progress
from ullme_ray.retrieval.statistics import interval, ratio_interval
from ullme_ray.spec import JobSpec, RunFolder, absolute_paths

ROWS_PER_CALL = 8
_SAMPLE = 7  # an independent random stream of the job's seed; see retrieval/held_out.py


@dataclass(frozen=True)
class Candidates:
    """A query and the passages it is scored with: positives, own negatives, those of other rows."""

    query: str
    passages: tuple[str, ...]
    num_positives: int
    num_negatives: int


def measure_generation(job: JobSpec, models: Sequence[Contender]) -> GenerationReport:
    """The job's own models on the rows of `evaluate.generation`.

    Raises:
        DataError: the rows cannot be read, or are too few to rank.
        ModelError: a model cannot be loaded.
    """
    rows = read_candidates(job)
    digest = hashlib.sha256(json.dumps([[r.query, r.passages, r.num_positives, r.num_negatives] for r in rows]).encode())
    version = digest.hexdigest()
    own = [_Checked(job, model, version) for model in models if model.model in ("base", "trained")]
    missing = [checked for checked in own if not checked.note and checked.read() is None]
    spec = settings_of(job).generation
    assert spec is not None
    with EncoderPool(job, num_texts=sum(len(row.passages) for row in rows)) as pool:
        cosines = [_cosines(checked.model, rows, pool) for checked in missing]
    for checked, found in zip(missing, cosines):  # once those that encode have let go of the GPUs
        checked.write(_values(rows, found, _logps(job, checked.which, rows)))
    path = RunFolder.of(job).resolve(spec.path)
    scores = tuple(checked.scores() for checked in own)
    return GenerationReport(path, version, len(rows), sum(len(row.passages) for row in rows), scores)


def read_candidates(job: JobSpec) -> list[Candidates]:
    """The rows to score, a seeded choice, with passages of other rows added up to `max_passages`.

    Raises:
        DataError: the file is missing or broken, or a query would have one passage alone.
    """
    spec = settings_of(job).generation
    assert spec is not None
    pairs = list(strict_rows(RunFolder.of(job).resolve(spec.path), "evaluate.generation.path"))
    generator = np.random.default_rng([job.seed, _SAMPLE])
    pool = list(dict.fromkeys(text for pair in pairs for text in pair.positives))
    chosen = sorted(generator.permutation(len(pairs))[: spec.max_rows].tolist())
    rows = [_candidates(pairs[row], pool, spec.max_passages, generator) for row in chosen]
    if not rows or min(len(row.passages) for row in rows) < 2:
        raise DataError(f"evaluate.generation.path = {spec.path} gives a query a single passage, which is no ranking; add rows")
    return rows


def _candidates(pair: Pair, pool: Sequence[str], most: int, generator: np.random.Generator) -> Candidates:
    positives = pair.positives[: most - 1]
    negatives = pair.negatives[: most - len(positives)]
    own = {*pair.positives, *pair.negatives}
    wanted = most - len(positives) - len(negatives)
    others: list[str] = []
    for row in generator.choice(len(pool), size=min(len(pool), wanted + len(own)), replace=False) if wanted else ():
        if pool[row] not in own and len(others) < wanted:
            others.append(pool[row])
    return Candidates(pair.query, (*positives, *negatives, *others), len(positives), len(negatives))


class _Checked:
    """A model's values per query, in a file whose name says with what they were made."""

    def __init__(self, job: JobSpec, model: Contender, version: str) -> None:
        self.model = model
        self.which: Which = "trained" if model.model == "trained" else "base"
        self.note = why_not(job, self.which)
        self._made_with = {"fingerprint": model.fingerprint, "rows": version, "max_tokens": _max_tokens(job)}
        key = hashlib.sha256(json.dumps(self._made_with, sort_keys=True).encode()).hexdigest()[:24]
        self._name = f"generation/{key}.json"
        self._path = storage.join(RunFolder.of(job).evaluation, self._name)

    def read(self) -> list[dict[str, Any]] | None:
        try:
            per_query: list[dict[str, Any]] = json.loads(storage.read_text(self._path))["per_query"]
        except (FileNotFoundError, ValueError):
            return None
        return per_query

    def write(self, per_query: Sequence[dict[str, Any]]) -> None:
        storage.write_text(self._path, json.dumps({**self._made_with, "per_query": per_query}))

    def scores(self) -> GenerationScores:
        if self.note:
            return GenerationScores(self.model.name, self.model.fingerprint, self.note)
        per_query = self.read()
        assert per_query is not None
        return GenerationScores(self.model.name, self.model.fingerprint, results=self._name, **summarise(per_query))


def _values(
    rows: Sequence[Candidates], cosines: Sequence[list[float]], logps: Sequence[list[tuple[float, int]]]
) -> list[dict[str, Any]]:
    return [
        {
            "query": row.query,
            "num_positives": row.num_positives,
            "num_negatives": row.num_negatives,
            "cosines": cosine,
            "logps": [total for total, _ in scored],
            "lengths": [length for _, length in scored],
        }
        for row, cosine, scored in zip(rows, cosines, logps)
    ]


def summarise(per_query: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of values per query, named as in GenerationScores."""
    losses, tokens, by_mean, by_sum, taus = [], [], [], [], []
    for row in per_query:
        totals, lengths = np.array(row["logps"]), np.array(row["lengths"])
        means = totals / lengths
        first, last = row["num_positives"], row["num_positives"] + row["num_negatives"]
        losses.append(-totals[:first].sum())
        tokens.append(lengths[:first].sum())
        if last > first:
            by_mean.append(_wins(means[:first], means[first:last]))
            by_sum.append(_wins(totals[:first], totals[first:last]))
        tau = kendalltau(row["cosines"], means).statistic
        taus.append(0.0 if np.isnan(tau) else float(tau))  # all tied: the order says nothing
    bounds = ratio_interval(np.array(losses), np.array(tokens))
    return {
        "perplexity": float(np.exp(np.sum(losses) / np.sum(tokens))),
        "perplexity_interval": (float(np.exp(bounds[0])), float(np.exp(bounds[1]))),
        "preference_accuracy": float(np.mean(by_mean)) if by_mean else None,
        "preference_interval": interval(np.array(by_mean)) if by_mean else None,
        "preference_accuracy_summed": float(np.mean(by_sum)) if by_sum else None,
        "kendall_tau": float(np.mean(taus)),
        "tau_interval": interval(np.array(taus)),
    }


def _wins(positives: np.ndarray, negatives: np.ndarray) -> float:
    differences = positives[:, None] - negatives[None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def _cosines(model: Contender, rows: Sequence[Candidates], pool: EncoderPool) -> list[list[float]]:
    assert model.model is not None
    pool.load(model.model, model.fingerprint)
    passages = list(dict.fromkeys(text for row in rows for text in row.passages))
    with Progress(f"generation checks, vectors of {model.name}", len(rows) + len(passages), unit="texts") as progress:
        queries = _vectors(pool, [row.query for row in rows], "query", progress)
        vectors = _vectors(pool, passages, "passage", progress)
    place = {text: number for number, text in enumerate(passages)}
    return [(vectors[[place[text] for text in row.passages]] @ query).tolist() for row, query in zip(rows, queries)]


def _vectors(pool: EncoderPool, texts: list[str], prompt: Any, progress: Progress) -> np.ndarray:
    found: np.ndarray | None = None
    for numbers, vectors in pool.encode(texts, prompt, progress):
        if found is None:
            found = np.empty((len(texts), vectors.shape[1]), np.float32)
        found[numbers] = vectors
    assert found is not None
    return found


def _logps(job: JobSpec, which: Which, rows: Sequence[Candidates]) -> list[list[tuple[float, int]]]:
    """(summed log-probability, scored tokens) of every passage of every row, in Ray actors of their own."""
    starts = range(0, len(rows), ROWS_PER_CALL)
    actor = ray.remote(max_restarts=2, max_task_retries=2)(GenerationModel)
    located = absolute_paths(job)
    actors: list[Any] = [
        actor.options(**reserved).remote(located, which, _max_tokens(job), None if "num_gpus" in reserved else "cpu")
        for reserved in actor_options(num_chunks=len(starts))
    ]
    try:
        idle, waiting = deque(actors), deque(starts)
        running: dict[Any, tuple[Any, int]] = {}
        found: list[list[tuple[float, int]]] = [[] for _ in rows]
        done = 0
        with Progress(f"generation checks, {which}", len(rows), unit="rows") as progress:
            progress.update(0)
            while waiting or running:
                while idle and waiting:
                    start, free = waiting.popleft(), idle.popleft()
                    batch = [(row.query, row.passages) for row in rows[start : start + ROWS_PER_CALL]]
                    running[free.score.remote(batch)] = free, start
                (finished,), _ = ray.wait(list(running), num_returns=1)
                free, start = running.pop(finished)
                for place, scored in enumerate(get_or_raise(finished), start=start):
                    found[place] = scored
                    done += 1
                idle.append(free)
                progress.update(done)
        return found
    finally:
        for free in actors:
            ray.kill(free)


def _max_tokens(job: JobSpec) -> int:
    return (job.train.max_generation_tokens if job.train else None) or job.model.max_tokens
