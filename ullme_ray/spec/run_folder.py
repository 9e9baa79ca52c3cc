"""Where everything of one run lies: `storage`/`name`, the only meeting place of the stages."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from ullme_ray.spec.job import JobSpec


@dataclass(frozen=True)
class RunFolder:
    """Absolute paths inside one run's folder. Local paths are made absolute, for Ray workers have their own working folder."""

    root: str

    @classmethod
    def of(cls, job: JobSpec) -> RunFolder:
        return cls(_absolute(f"{job.storage.rstrip('/')}/{job.name}"))

    def resolve(self, path: str) -> str:
        """`run:x` -> x inside this run; s3:// paths as they are; local paths made absolute."""
        return f"{self.root}/{path[4:].lstrip('/')}" if path.startswith("run:") else _absolute(path)

    @property
    def job_file(self) -> str:
        return f"{self.root}/job.yaml"

    @property
    def data(self) -> str:
        return f"{self.root}/data"

    @property
    def rejects(self) -> str:
        """Training rows that were left out: one JSON object a line, with file, row, reason and how the row starts."""
        return f"{self.root}/rejects.jsonl"

    @property
    def base(self) -> str:
        """The model made for `base: scratch`."""
        return f"{self.root}/base"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    @property
    def export(self) -> str:
        """The trained model, as a sentence-transformers folder."""
        return f"{self.root}/model"

    @property
    def adapter(self) -> str:
        """The trained LoRA adapter, as a PEFT folder."""
        return f"{self.root}/adapter"

    @property
    def metrics(self) -> str:
        return f"{self.root}/metrics"

    @property
    def evaluation(self) -> str:
        return f"{self.root}/evaluation"


def absolute_paths(job: JobSpec) -> JobSpec:
    """The same job for any working folder, such as that of a Ray worker: local paths absolute, `run:` paths as they are."""
    tree = job.model_dump(mode="json")
    # Defaults are left out here, for a model's folder may say otherwise, and only what the user wrote can contradict it.
    tree["model"] = job.model.model_dump(mode="json", exclude_unset=True)

    def replace(section: Any, key: str, prefix: str = "") -> None:
        value = section.get(key) if section else None
        if value is not None and value.startswith(prefix) and not value.startswith(("env:", "run:")):
            section[key] = prefix + _absolute(value.removeprefix(prefix))

    replace(tree, "storage")
    if os.path.isdir(os.path.expanduser(job.model.base)) and job.model.base != "scratch":
        replace(tree["model"], "base")
    replace(tree["model"], "hub_token", prefix="file:")
    replace(tree["serve"], "api_keys", prefix="file:")
    for source in (tree["train"] or {}).get("data", ()):
        replace(source, "path")
    if job.train and job.train.validation:
        replace(tree["train"]["validation"], "path")
    replace(tree["train"], "checkpoint_key", prefix="file:")
    replace(tree["schedule"], "webhook", prefix="file:")
    evaluate = tree["evaluate"] or {}
    for local_set in evaluate.get("local", ()):
        replace(local_set, "path")
        local_set["corpus"] = [path if path.startswith("run:") else _absolute(path) for path in local_set["corpus"]]
    replace(evaluate.get("generation"), "path")
    for task in evaluate.get("mteb", ()):
        replace(task, "folder")
    for other in evaluate.get("models", ()):
        if os.path.isdir(os.path.expanduser(other["base"])):
            replace(other, "base")
    for adapter in (tree["serve"] or {}).get("adapters", ()):
        replace(adapter, "path")
    for position, model in enumerate(job.serve.models if job.serve else ()):
        if model.base is not None and os.path.isdir(os.path.expanduser(model.base)):
            replace(tree["serve"]["models"][position], "base")
    if tree["embed"]:
        replace(tree["embed"]["input"], "path")
        replace(tree["embed"]["output"], "path")
    if job.mine:
        replace(tree["mine"], "output")
        replace(tree["mine"]["corpus"], "path")
        if os.path.isdir(os.path.expanduser(job.mine.encoder.base)) and not job.mine.encoder.is_own:
            replace(tree["mine"]["encoder"], "base")
    return JobSpec.model_validate(tree)


def dump_job(job: JobSpec) -> str:
    """The resolved job as YAML: defaults included, local paths absolute, secrets still references."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(absolute_paths(job).model_dump(mode="json"), stream)
    return stream.getvalue()


def _absolute(path: str) -> str:
    if path.startswith("file://"):
        path = path[len("file://") :]
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
