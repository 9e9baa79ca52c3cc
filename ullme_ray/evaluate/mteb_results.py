"""mteb's own files in the run's folder, and what of them goes into the report.

`evaluation/mteb/results/ullme_ray__JOB/REVISION/` is what mteb's ResultCache writes: TASK.json, model_meta.json and
run_settings.jsonl. So `mteb.ResultCache("RUN/evaluation/mteb").load_results()` reads it, and it can be submitted as it is.
A task is done when its file holds all splits and subsets that the job wants: the revision names the model, and the file the
version of data and of mteb. What a file holds beside them, for another job or an earlier one, is kept and not counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult

from ullme_ray import storage
from ullme_ray.evaluate.mteb_scores import TaskScore
from ullme_ray.evaluate.mteb_tasks import TaskRef
from ullme_ray.spec import JobSpec, RunFolder

FOLDER = "mteb"  # below evaluation/
_SETTINGS, _META = "run_settings.jsonl", "model_meta.json"


class ResultFolder:
    """The files of one model."""

    def __init__(self, job: JobSpec, meta: ModelMeta) -> None:
        self._root = RunFolder.of(job).evaluation
        self._folder = f"{FOLDER}/results/{meta.model_name_as_path()}/{meta.revision}"
        self.meta = meta

    def read(self, task: TaskRef) -> TaskResult | None:
        """A task's result, with the wanted splits and subsets alone; None unless all are there, of this data and this mteb."""
        result = self._held(f"{task.name}.json")
        if result is None or (task.dataset_version and result.dataset_revision != task.dataset_version):
            return None
        wanted = {
            split: [scores for scores in result.scores.get(split, []) if scores["hf_subset"] in task.subsets]
            for split in task.splits
        }
        if any({scores["hf_subset"] for scores in found} != set(task.subsets) for found in wanted.values()):
            return None
        return result.model_copy(update={"scores": wanted})

    def write(self, files: Mapping[str, str]) -> None:
        """Files of one task, by name; the result itself last, for where it is the task is done."""
        for name in sorted(files, key=lambda name: name not in (_META, _SETTINGS)):
            text = files[name]
            if name == _SETTINGS:
                text = self._with_held_settings(text)
            elif name != _META:
                text = self._with_held_scores(name, text)
            storage.write_text(self._path(name), text)

    def file_of(self, task: TaskRef) -> str:
        return f"{self._folder}/{task.name}.json"

    def _held(self, name: str) -> TaskResult | None:
        """A result file as mteb's own loader gives it; None unless it is whole and of this mteb."""
        try:
            text = storage.read_text(self._path(name))
        except FileNotFoundError:
            return None
        try:
            result = _from_text(text)
        except Exception:  # noqa: BLE001 - a torn or foreign file is measured again
            return None
        return result if result.mteb_version == _mteb_version() else None

    def _with_held_scores(self, name: str, added: str) -> str:
        """A new result with the splits and subsets that only the file of before has, where it is of the same data."""
        held, new = self._held(name), _from_text(added)
        return _to_text(held.merge(new)) if held is not None and held.is_mergeable(new) else added

    def _with_held_settings(self, added: str) -> str:
        """One line a task, its splits and its subsets, as mteb keeps them."""
        try:
            held = storage.read_text(self._path(_SETTINGS))
        except FileNotFoundError:
            held = ""
        lines: dict[Any, str] = {}
        for line in (held + added).splitlines():
            if line.strip():
                settings = json.loads(line)
                lines[settings["task"], *settings["splits"], *settings.get("subsets", ())] = line
        return "\n".join(lines.values()) + "\n"

    def _path(self, name: str) -> str:
        return storage.join(self._root, self._folder, name)


def task_score(result: TaskResult, ref: TaskRef, file: str, main_score: str, kind: str) -> TaskScore:
    return TaskScore(ref.name, kind, float(result.get_score()), main_score, float(result.evaluation_time or 0.0), file)


def _from_text(text: str) -> TaskResult:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        path.write_text(text, encoding="utf-8")
        return TaskResult.from_disk(path)


def _to_text(result: TaskResult) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        result.to_disk(path)
        return path.read_text(encoding="utf-8")


def _mteb_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("mteb")
