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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import mteb
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata, TaskType
from mteb.get_tasks import TASK_LIST
from mteb.types import PromptType

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
    splits: tuple[str, ...]
    subsets: tuple[str, ...]

    def with_all_of(self, other: TaskRef) -> TaskRef:
        """The same task with the splits and subsets of both."""
        splits, subsets = (*self.splits, *other.splits), (*self.subsets, *other.subsets)
        return replace(self, splits=tuple(dict.fromkeys(splits)), subsets=tuple(dict.fromkeys(subsets)))


def find_tasks(job: JobSpec) -> list[TaskRef]:
    """All tasks that the job names, each once: with what all entries that name it want of its splits and subsets.

    Raises:
        DataError: a name is neither a task nor a benchmark, a filter leaves none, or a folder is missing.
    """
    found: dict[str, TaskRef] = {}
    for i in range(len(settings_of(job).mteb)):
        for place, task in enumerate(tasks_of(job, i)):
            ref = _ref(i, place, task)
            known = found.setdefault(ref.name, ref)
            if known.spec != i and (known.dataset_version or ref.dataset_version):
                raise DataError(f"evaluate.mteb.{i} and .{known.spec} are two tasks named {ref.name}; rename a folder")
            found[ref.name] = known.with_all_of(ref)
    return list(found.values())


def _ref(spec: int, place: int, task: AbsTask) -> TaskRef:
    # An aggregate is scored as one, whatever subsets its parts have.
    subsets = ("default",) if task.is_aggregate else tuple(task.hf_subsets)
    version = str(getattr(task, "folder_version", ""))
    return TaskRef(spec, place, task.metadata.name, version, tuple(task.eval_splits), subsets)


def make_task(job: JobSpec, ref: TaskRef) -> AbsTask:
    task = tasks_of(job, ref.spec)[ref.place]
    if not task.is_aggregate:
        task.filter_eval_splits(list(ref.splits))
        task.filter_languages(None, hf_subsets=list(ref.subsets))
    return task


def check_prompts(job: JobSpec, tasks: Sequence[TaskRef]) -> None:
    """Every name in `evaluate.mteb_prompts` is one that mteb, or this job, knows.

    Raises:
        DataError: one is not, and its prompt would never be used.
    """
    prompts = settings_of(job).mteb_prompts
    kinds = [kind.value for kind in PromptType]
    known = {*kinds, *get_args(TaskType), *_known_names(), *(task.name for task in tasks)} if prompts else set()
    for name in prompts:
        stem = next((name.removesuffix(f"-{kind}") for kind in kinds if name.endswith(f"-{kind}")), name)
        if not {name, stem} & known:
            raise DataError(
                f"evaluate.mteb_prompts: {name} is no task or type of mteb, alone or with -query or -document"
                + _near(stem, known)
            )


def _known_names() -> set[str]:
    return {task.metadata.name for task in TASK_LIST}  # classes: to make each of them would take a minute


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; near it are {', '.join(near)}" if near else "; see `mteb available-tasks`"


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
        if spec.name in _known_names():
            return [mteb.get_task(spec.name, languages=languages)]
        benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
        if spec.name not in benchmarks:
            near = _near(spec.name, [*_known_names(), *benchmarks])
            raise DataError(f"{at} = {spec.name} is neither a task nor a benchmark of mteb{near}")
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
