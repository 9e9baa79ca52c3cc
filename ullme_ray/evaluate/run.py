"""The evaluate stage: the job's model before and after training, and others beside it. Read this file first.

sets.py measures retrieval on held-out sets, generation.py the generation pass, mteb_run.py runs tasks of MTEB. Every part keeps
what it found, so that a run that was cut off goes on. MTEB is last: its tasks come from elsewhere, and some may fail.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.evaluate.contenders import contenders, newest, settings_of
from ullme_ray.evaluate.generation import measure_generation
from ullme_ray.evaluate.others import other_folder
from ullme_ray.evaluate.report import EvaluationReport
from ullme_ray.evaluate.sets import measure_sets
from ullme_ray.pairs.strict import list_rows
from ullme_ray.retrieval.held_out import check_held_out
from ullme_ray.spec import JobSpec, RunFolder


def preflight(job: JobSpec) -> None:
    """Looks at every set and model and checks that results can be written. What the job itself writes is taken on trust.

    Raises:
        DataError: a set is missing or broken, or a prompt is for a task that mteb does not know.
        ModelError: a model is missing.
        StorageError: the run's folder cannot be written.
    """
    spec = settings_of(job)
    for position, local in enumerate(spec.local):
        if not _is_written_by_the_job(job, local.path):
            check_held_out(job, position)
    for other in spec.models:
        other_folder(job, other)
    if spec.generation and not _is_written_by_the_job(job, spec.generation.path):
        list_rows(RunFolder.of(job).resolve(spec.generation.path), "evaluate.generation.path")
    if spec.mteb:
        from ullme_ray.evaluate.mteb_tasks import check_prompts, find_tasks

        check_prompts(job, find_tasks(job))
    storage.check_writable(RunFolder.of(job).evaluation)


def _is_written_by_the_job(job: JobSpec, path: str) -> bool:
    return job.dataset is not None and path.startswith("run:data")


def run_evaluate(job: JobSpec, *, models: Sequence[str] | None = None) -> EvaluationReport:
    """Measures models as the job asks and writes `evaluation/report.json` in the run's folder.

    Args:
        models: those to measure; absent means all that the job asks for. `("base",)` measures before training.

    Raises:
        DataError: a set is missing or broken; or tasks of MTEB failed, once the report of all else is written.
        ModelError: a model is missing or cannot be loaded.
    """
    spec = settings_of(job)
    chosen = contenders(job, models)
    sets = measure_sets(job, chosen)
    generation = measure_generation(job, chosen) if spec.generation else None
    mteb = None
    if spec.mteb and (models is None or newest(job) in models):
        from ullme_ray.evaluate.mteb_run import run_mteb  # loading mteb takes seconds

        mteb = run_mteb(job)
    report = EvaluationReport(job.name, spec.k, spec.ranked, sets, generation, mteb)
    path = storage.join(RunFolder.of(job).evaluation, "report.json")
    storage.write_text(path, json.dumps(report.as_dict(), indent=2) + "\n")
    if mteb is not None and mteb.failed:
        raise DataError("; ".join([*mteb.failed.values(), f"all else is measured and stands in {path}"]))
    return report
