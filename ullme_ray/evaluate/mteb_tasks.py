"""Which mteb tasks a job names: by task, benchmark, type and language, or a local folder in mteb's dataset layout.

A folder is what a dataset repository of mteb is: files, with a README.md whose YAML head names configs and splits. What it must
hold for each type (split `test`, unless said otherwise):

    retrieval            configs corpus (_id, title, text), queries (_id, text), default or qrels (query-id, corpus-id, score)
    sts                  sentence1, sentence2, score
    pair_classification  sentence1, sentence2, labels (0 or 1)
    classification       text, label (a number); a split `train` too
    clustering           sentences, labels
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mteb
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from ullme_ray import storage
from ullme_ray.errors import DataError, StorageError
from ullme_ray.evaluate.contenders import settings_of
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.evaluation import MtebSpec

_KINDS: dict[str, tuple[type[AbsTask], str, str, str]] = {  # class, mteb's type, category, main score
    "retrieval": (AbsTaskRetrieval, "Retrieval", "t2t", "ndcg_at_10"),
    "sts": (AbsTaskSTS, "STS", "t2t", "cosine_spearman"),
    "pair_classification": (AbsTaskPairClassification, "PairClassification", "t2t", "max_ap"),
    "classification": (AbsTaskClassification, "Classification", "t2c", "accuracy"),
    "clustering": (AbsTaskClustering, "Clustering", "t2c", "v_measure"),
}


@dataclass(frozen=True)
class TaskRef:
    """A task as it travels to an actor, which makes it anew."""

    spec: int  # `evaluate.mteb.<spec>`
    place: int  # among the tasks of that entry
    name: str
    dataset_version: str  # of a folder; empty for mteb's own, whose revision mteb writes


def find_tasks(job: JobSpec) -> list[TaskRef]:
    """All tasks that the job names, each once.

    Raises:
        DataError: a name is neither a task nor a benchmark, a filter leaves none, or a folder is missing.
    """
    found: dict[str, TaskRef] = {}
    for i in range(len(settings_of(job).mteb)):
        for place, task in enumerate(tasks_of(job, i)):
            name = task.metadata.name
            known = found.setdefault(name, TaskRef(i, place, name, str(getattr(task, "folder_version", ""))))
            if known.spec != i and (known.dataset_version or getattr(task, "folder_version", "")):
                raise DataError(f"evaluate.mteb.{i} and .{known.spec} are two tasks named {name}; rename a folder")
    return list(found.values())


def make_task(job: JobSpec, ref: TaskRef) -> AbsTask:
    return tasks_of(job, ref.spec)[ref.place]


def tasks_of(job: JobSpec, position: int) -> list[AbsTask]:
    """The tasks of `evaluate.mteb.<position>`.

    Raises:
        DataError: there is none.
    """
    spec, at = settings_of(job).mteb[position], f"evaluate.mteb.{position}"
    if spec.folder is not None:
        return [_folder_task(RunFolder.of(job).resolve(spec.folder), spec, at)]
    tasks = _named(spec, at)
    if spec.types:
        tasks = [task for task in tasks if task.metadata.type in spec.types]
    tasks = [task for task in tasks if task.metadata.modalities == ["text"]]
    if not tasks:
        raise DataError(f"{at}: mteb has no text task with these values; see `mteb available-tasks`")
    return tasks


def _named(spec: MtebSpec, at: str) -> list[AbsTask]:
    languages = list(spec.languages) or None
    try:
        if spec.name is None:
            types: Any = list(spec.types) or None
            return list(mteb.get_tasks(languages=languages, task_types=types, modalities=["text"]))
        known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False, exclude_private=False)}
        if spec.name in known:
            return [mteb.get_task(spec.name, languages=languages)]
        benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
        if spec.name not in benchmarks:
            near = difflib.get_close_matches(spec.name, [*known, *benchmarks], n=3)
            raise DataError(
                f"{at} = {spec.name} is neither a task nor a benchmark of mteb"
                + (f"; near it are {', '.join(near)}" if near else "; see `mteb available-tasks`")
            )
        tasks: Sequence[AbsTask] = mteb.get_benchmark(spec.name).tasks
    except ValueError as error:  # mteb's word for a language or type that it does not know
        raise DataError(f"{at}: {error}") from error
    if languages is None:
        return list(tasks)
    kept = [task for task in tasks if set(task.metadata.languages) & {language[:3] for language in languages}]
    return [task.filter_languages(languages) for task in kept]


def _folder_task(path: str, spec: MtebSpec, at: str) -> AbsTask:
    assert spec.type is not None
    try:
        folder = os.path.abspath(storage.fetch_folder(path))
    except StorageError as error:
        raise DataError(f"{at}.folder = {path}: {error}") from error
    if not os.path.isfile(os.path.join(folder, "README.md")):
        raise DataError(
            f"{at}.folder = {path} has no README.md whose YAML head names its configs, as a dataset repository of mteb has"
        )
    base, kind, category, main_score = _KINDS[spec.type]
    version = _folder_version(folder)
    metadata = TaskMetadata(
        name=os.path.basename(path.rstrip("/")),
        description=f"A local {kind} set.",
        type=kind,
        category=category,
        dataset={"path": folder, "revision": version},
        eval_splits=["test"],
        eval_langs=list(spec.languages) or ["eng-Latn"],
        main_score=main_score,
        prompt=None,
    )
    members = {"metadata": metadata, "folder_version": version, "__module__": __name__}
    if spec.type == "clustering":
        members |= {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": 100_000}
    cls: type[AbsTask] = type("LocalTask", (base,), members)
    return cls()


def _folder_version(folder: str) -> str:
    digest = hashlib.sha256()
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(at, name)
            digest.update(os.path.relpath(path, folder).encode())
            with open(path, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:40]
