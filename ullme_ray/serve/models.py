"""Which models a job serves under which names, and where each lies. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ullme_ray import storage
from ullme_ray.errors import ServeError, StorageError
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.spec.job import ModelSpec, ReplicasSpec


@dataclass(frozen=True)
class Served:
    """One model with replicas of its own, and the adapters that share them."""

    name: str
    job: JobSpec  # whose model it is
    pool: ReplicasSpec
    adapters: dict[str, str]  # served name -> PEFT folder

    @property
    def names(self) -> list[str]:
        return [self.name, *self.adapters]


def served_models(job: JobSpec) -> list[Served]:
    """The job's own model first.

    Raises:
        ServeError: a run that `serve.models` names does not exist.
    """
    settings = job.serve
    assert settings is not None
    folder = RunFolder.of(job)
    own = Served(job.name, job, settings.replicas, {a.name: folder.resolve(a.path) for a in settings.adapters})
    others = []
    for position, model in enumerate(settings.models):
        if model.run is not None:
            other = _job_of_run(job, model.run, f"serve.models.{position}.run")
        else:
            assert model.base is not None
            spec = ModelSpec(base=model.base, dtype=job.model.dtype, hub_token=job.model.hub_token)
            other = job.model_copy(update={"train": None, "model": spec})
        others.append(Served(model.name, other.model_copy(update={"serve": settings}), model.replicas, {}))
    return [own, *others]


def _job_of_run(job: JobSpec, run: str, field: str) -> JobSpec:
    path = RunFolder.of(job.model_copy(update={"name": run})).job_file
    try:
        return parse_job(storage.read_bytes(path), source=path)
    except (OSError, StorageError) as error:
        raise ServeError(
            f"{field} = {run}: {path} cannot be read; run that job first, or correct the name ({error})"
        ) from error


def published_version(served: Served) -> tuple[tuple[str, str], ...] | None:
    """Tells one state of the model's and its adapters' files from another; None while one of them is being written.

    Covers what a run publishes: a trained model and the adapters. A base model is taken to stay as it is.
    """
    folders = [(folder, "adapter_config.json") for folder in served.adapters.values()]
    if served.job.train is not None:
        folders.append((RunFolder.of(served.job).export, "modules.json"))
    files = {file.path: file.version for folder, _ in folders for file in storage.list_files(folder)}
    if any(not storage.exists(storage.join(folder, last)) for folder, last in folders):
        return None
    return tuple(sorted(files.items()))
