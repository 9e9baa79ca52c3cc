"""What an evaluation found, as files in the run's folder and as tables of plain text.

`evaluation/report.json`, written once all is measured (`ullme-ray evaluate` writes it anew, from kept results where it can):

    job, k, depth
    sets          a list, one entry per `evaluate.local`:
      path, version (sha256 of the content), name (its folder below runs/), num_queries, num_passages
      models      a list, in the order base, trained, others, bm25 (of a set over the table: the job's newest model alone):
        model, fingerprint
        measures  ndcg@k, recall@k, recall@depth, mrr@k, map@depth -> mean over the queries
        intervals the same names -> [low, high], the mean's 95 % bootstrap interval over queries
        run       file of the ranking, relative to evaluation/, in TREC's format
        results   file of the values per query, relative to evaluation/: {..., "per_query": {query id: {measure: value}}}
      comparisons a list, one entry per pair of models, the better first:
        better, worse, measure (ndcg@k), difference (of the means), interval [low, high],
        p_value (paired sign-flip test), p_adjusted (Holm's, over the pairs of this set)
    generation    null, or what generation_scores.py says at its top
    mteb          null, or what mteb_scores.py says at its top
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ullme_ray.evaluate.generation_scores import Bounds, GenerationReport
from ullme_ray.evaluate.mteb_scores import MtebScores


@dataclass(frozen=True)
class ModelScores:
    """Means over the queries of one set."""

    model: str  # base | trained | bm25 | the name of another
    fingerprint: str
    measures: dict[str, float]
    intervals: dict[str, Bounds]
    run: str
    results: str


@dataclass(frozen=True)
class Comparison:
    """Two models on the same queries."""

    better: str
    worse: str
    measure: str
    difference: float
    interval: Bounds
    p_value: float
    p_adjusted: float


@dataclass(frozen=True)
class SetScores:
    path: str
    version: str
    name: str
    num_queries: int
    num_passages: int
    models: tuple[ModelScores, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class EvaluationReport:
    job: str
    k: int
    depth: int
    sets: tuple[SetScores, ...]
    generation: GenerationReport | None = None
    mteb: MtebScores | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """One table a set, a line per model; then one of the generation checks and one of MTEB."""
        tables = [_set_table(scores) for scores in self.sets]
        if self.generation is not None:
            tables.append(_generation_table(self.generation))
        if self.mteb is not None:
            tables.append(_mteb_table(self.mteb))
        return "\n\n".join(tables)


def _set_table(scores: SetScores) -> str:
    names = list(scores.models[0].measures) if scores.models else []
    rows = [["model", *names, f"{names[0]}, 95 % interval" if names else ""]]
    for found in scores.models:
        low, high = found.intervals[names[0]]
        rows.append([found.model, *(f"{found.measures[name]:.4f}" for name in names), f"{low:.4f} to {high:.4f}"])
    head = f"{scores.path}: {scores.num_queries:,} queries, {scores.num_passages:,} passages"
    return "\n".join([head, *aligned(rows), *map(_sentence, scores.comparisons)])


def _generation_table(report: GenerationReport) -> str:
    rows = [["model", "perplexity", "95 % interval", "preference", "95 % interval", "Kendall tau", "95 % interval"]]
    notes = []
    for found in report.models:
        if found.note:
            notes.append(f"  {found.model}: not measured, for {found.note}")
            continue
        rows.append([found.model, *_figure(found.perplexity, found.perplexity_interval, ".2f")])
        rows[-1] += _figure(found.preference_accuracy, found.preference_interval, ".3f")
        rows[-1] += _figure(found.kendall_tau, found.tau_interval, ".3f")
    head = f"generation checks on {report.path}: {report.num_rows:,} rows, {report.num_passages:,} passages"
    return "\n".join([head, *(aligned(rows) if len(rows) > 1 else []), *notes])


def _figure(value: float | None, bounds: Bounds | None, form: str) -> list[str]:
    if value is None or bounds is None:
        return ["-", "-"]
    return [format(value, form), f"{bounds[0]:{form}} to {bounds[1]:{form}}"]


def _mteb_table(scores: MtebScores) -> str:
    rows = [["task", "type", "measure", "score"]]
    rows += [[found.task, found.type, found.measure, f"{found.score:.4f}"] for found in scores.tasks]
    return "\n".join([f"MTEB: {scores.model}, revision {scores.revision[:12]}", *aligned(rows)])


def _sentence(found: Comparison) -> str:
    verdict = f"p = {found.p_adjusted:.4f}" if found.p_adjusted < 0.05 else f"no clear difference, p = {found.p_adjusted:.2f}"
    low, high = found.interval
    gain = f"{found.measure} +{found.difference:.4f} ({low:+.4f} to {high:+.4f})"
    return f"  {found.better} over {found.worse}: {gain}, {verdict}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
