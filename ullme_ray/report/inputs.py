"""What a report is made of: files that the stages left in the run's folder. What is not there is said, never made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ullme_ray import storage
from ullme_ray.errors import UllmeError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

SERVE_BENCH = "serve_bench.json"  # in the run's folder: a list of rows, each {column: value}
EMBED_REPORT = "embed_report.json"


class Missing(Exception):  # noqa: N818 - it is no error: the page says it in the place of a picture
    """Something that this run has not, with the sentence that tells a reader why and what would make it."""


@dataclass(frozen=True)
class Measured:
    """A model on a set: means over the set's queries, and their 95 % intervals where they can be told."""

    model: str
    measures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class MeasuredSet:
    path: str
    num_queries: int
    num_passages: int
    models: tuple[Measured, ...]
    comparisons: tuple[tuple[str, ...], ...]  # better, worse, difference with its interval, p-value adjusted for their number


@dataclass(frozen=True)
class MeasuredGeneration:
    path: str
    num_rows: int
    num_passages: int
    rows: tuple[tuple[str, ...], ...]  # model, perplexity, preference accuracy, Kendall's tau; each with its interval
    notes: tuple[str, ...]  # models that were not measured, and why


@dataclass(frozen=True)
class MeasuredMteb:
    model: str
    revision: str
    rows: tuple[tuple[str, ...], ...]  # task, type, measure, score
    failed: Mapping[str, str]  # task -> why


_Found = TypeVar("_Found")


def read_json(path: str, made_by: str) -> Any:
    """The content of a file.

    Raises:
        Missing: there is no such file, or it is cut off.
    """
    try:
        return json.loads(storage.read_text(path))
    except FileNotFoundError:
        raise Missing(f"{path} is not there yet; {made_by} writes it") from None
    except (ValueError, UnicodeDecodeError):
        raise Missing(f"{path} is damaged: it is not JSON; {made_by} writes it anew") from None


def read_evaluation(job: JobSpec) -> list[MeasuredSet]:
    """Every set of the last evaluation.

    Raises:
        Missing: none was asked for or measured yet, or its file is not what `evaluate` writes.
    """
    asked = job.evaluate is not None and bool(job.evaluate.local)
    found = _of_evaluation(job, "sets", asked, "evaluate.local", lambda sets: [_measured_set(entry) for entry in sets])
    if not any(entry.models for entry in found):
        raise Missing(f"{_evaluation_file(job)} names no model; run `ullme-ray evaluate` again")
    return found


def read_generation(job: JobSpec) -> MeasuredGeneration:
    """The generation checks of the last evaluation.

    Raises:
        Missing: as `read_evaluation`.
    """
    asked = job.evaluate is not None and job.evaluate.generation is not None
    return _of_evaluation(job, "generation", asked, "evaluate.generation", _measured_generation)


def read_mteb(job: JobSpec) -> MeasuredMteb:
    """MTEB scores of the last evaluation.

    Raises:
        Missing: as `read_evaluation`.
    """
    asked = job.evaluate is not None and bool(job.evaluate.mteb)
    return _of_evaluation(job, "mteb", asked, "evaluate.mteb", _measured_mteb)


def _of_evaluation(job: JobSpec, part: str, asked: bool, key: str, read: Callable[[Any], _Found]) -> _Found:
    """A part of the evaluation's report, shown wherever it is there, or the reason why it is not."""
    path = _evaluation_file(job)
    if not asked and not storage.exists(path):
        raise Missing(f"the job does not ask for it ({key})")
    content = read_json(path, "`ullme-ray evaluate`")
    try:
        held = content.get(part)
        found = read(held) if held else None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Missing(f"{path} does not hold what `ullme-ray evaluate` writes; run it again") from None
    if found is None:
        reason = f"{path} does not hold it yet; run `ullme-ray evaluate` again" if asked else "the job does not ask for it"
        raise Missing(f"{reason} ({key})")
    return found


def _evaluation_file(job: JobSpec) -> str:
    return storage.join(RunFolder.of(job).evaluation, "report.json")


def _measured_generation(content: Mapping[str, Any]) -> MeasuredGeneration:
    rows, notes = [], []
    for row in content["models"]:
        if row["note"]:
            notes.append(f"{row['model']}: not measured, for {row['note']}")
            continue
        rows.append(
            (
                str(row["model"]),
                _figure(row["perplexity"], row["perplexity_interval"], ".2f"),
                _figure(row["preference_accuracy"], row["preference_interval"], ".3f"),
                _figure(row["kendall_tau"], row["tau_interval"], ".3f"),
            )
        )
    path, num_rows, num_passages = str(content["path"]), int(content["num_rows"]), int(content["num_passages"])
    return MeasuredGeneration(path, num_rows, num_passages, tuple(rows), tuple(notes))


def _figure(value: float | None, bounds: Sequence[float] | None, form: str) -> str:
    if value is None or bounds is None:
        return ""
    return f"{value:{form}} ({bounds[0]:{form}} to {bounds[1]:{form}})"


def _measured_mteb(content: Mapping[str, Any]) -> MeasuredMteb:
    rows = [(str(row["task"]), str(row["type"]), str(row["measure"]), f"{row['score']:.4f}") for row in content["tasks"]]
    failed = {str(task): str(reason) for task, reason in (content.get("failed") or {}).items()}
    return MeasuredMteb(str(content["model"]), str(content["revision"]), tuple(rows), failed)


def _measured_set(entry: Mapping[str, Any]) -> MeasuredSet:
    models = []
    for row in entry["models"]:
        measures = {str(name): float(value) for name, value in row["measures"].items()}
        intervals = {name: (float(low), float(high)) for name, (low, high) in (row.get("intervals") or {}).items()}
        models.append(Measured(str(row["model"]), measures, intervals))
    comparisons = tuple(
        (
            str(pair["better"]),
            str(pair["worse"]),
            "{:+.4f} ({:+.3f} to {:+.3f})".format(pair["difference"], *pair["interval"]),
            f"{pair['p_adjusted']:.4f}",
        )
        for pair in entry.get("comparisons") or ()
    )
    return MeasuredSet(str(entry["path"]), int(entry["num_queries"]), int(entry["num_passages"]), tuple(models), comparisons)


def read_embed_report(job: JobSpec) -> dict[str, Any]:
    """The last embed run.

    Raises:
        Missing: none yet, or its file is damaged.
    """
    path = storage.join(RunFolder.of(job).root, EMBED_REPORT)
    content = read_json(path, "`ullme-ray embed`")
    if not isinstance(content, dict) or not isinstance(content.get("rows"), int):
        raise Missing(f"{path} does not hold what `ullme-ray embed` writes; run it again")
    return content


def read_serve_bench(job: JobSpec) -> list[dict[str, Any]]:
    """Rows of a serving benchmark.

    Raises:
        Missing: none was kept in the run's folder.
    """
    path = storage.join(RunFolder.of(job).root, SERVE_BENCH)
    content = read_json(path, "a serving benchmark")
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) and row for row in content):
        raise Missing(f"{path} is not a list of rows like [{{column: value}}]")
    return content


def check_run(job: JobSpec) -> None:
    """There is a run to report on.

    Raises:
        UllmeError: there is none.
    """
    run = RunFolder.of(job)
    if not storage.exists(run.job_file):
        raise UllmeError(
            f"{run.root} holds no run of this job yet (no job.yaml); run `ullme-ray run` on it first, or check name and storage"
        )
