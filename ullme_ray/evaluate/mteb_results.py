"""mteb's own files in the run's folder, and what of them goes into the report.

`evaluation/mteb/results/ullme_ray__JOB/REVISION/` is what mteb's ResultCache writes: TASK.json, model_meta.json and
run_settings.jsonl. So `mteb.ResultCache("RUN/evaluation/mteb").load_results()` reads it, and it can be submitted as it is.
A task is done when its file is there: the revision names the model, and the file the version of data and of mteb.
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
_SETTINGS = "run_settings.jsonl"


class ResultFolder:
    """The files of one model."""

    def __init__(self, job: JobSpec, meta: ModelMeta) -> None:
        self._root = RunFolder.of(job).evaluation
        self._folder = f"{FOLDER}/results/{meta.model_name_as_path()}/{meta.revision}"
        self.meta = meta

    def read(self, task: TaskRef) -> TaskResult | None:
        """A task's result as mteb's own loader gives it; None unless it is whole, and of this data and this mteb."""
        try:
            text = storage.read_text(self._path(f"{task.name}.json"))
        except FileNotFoundError:
            return None
        with TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            path.write_text(text, encoding="utf-8")
            try:
                result = TaskResult.from_disk(path)
            except Exception:  # noqa: BLE001 - a torn or foreign file is measured again
                return None
        same_data = not task.dataset_version or result.dataset_revision == task.dataset_version
        return result if same_data and result.mteb_version == _mteb_version() else None

    def write(self, files: Mapping[str, str]) -> None:
        """Files of one task, by name; the result itself last, for where it is the task is done."""
        for name in sorted(files, key=lambda name: name not in ("model_meta.json", _SETTINGS)):
            text = self._merged(files[name]) if name == _SETTINGS else files[name]
            storage.write_text(self._path(name), text)

    def file_of(self, task: TaskRef) -> str:
        return f"{self._folder}/{task.name}.json"

    def _merged(self, added: str) -> str:
        """One line a task and split, as mteb keeps them."""
        try:
            held = storage.read_text(self._path(_SETTINGS))
        except FileNotFoundError:
            held = ""
        lines: dict[Any, str] = {}
        for line in (held + added).splitlines():
            if line.strip():
                settings = json.loads(line)
                lines[settings["task"], *settings["splits"]] = line
        return "\n".join(lines.values()) + "\n"

    def _path(self, name: str) -> str:
        return storage.join(self._root, self._folder, name)


def task_score(result: TaskResult, ref: TaskRef, file: str, main_score: str, kind: str) -> TaskScore:
    return TaskScore(ref.name, kind, float(result.get_score()), main_score, float(result.evaluation_time or 0.0), file)


def _mteb_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("mteb")
