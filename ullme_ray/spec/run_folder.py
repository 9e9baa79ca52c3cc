"""Where everything of one run lies: `storage`/`name`, the only meeting place of the stages."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

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
    def metrics(self) -> str:
        return f"{self.root}/metrics"

    @property
    def evaluation(self) -> str:
        return f"{self.root}/evaluation"


def dump_job(job: JobSpec) -> str:
    """The resolved job, defaults included, as YAML that loads to an equal job. Secrets stay references."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(job.model_dump(mode="json"), stream)
    return stream.getvalue()


def _absolute(path: str) -> str:
    if path.startswith("file://"):
        path = path[len("file://") :]
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
