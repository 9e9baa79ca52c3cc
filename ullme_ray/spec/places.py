"""Every place that a job file names: one list for the checks and for those who carry a job to other machines."""

from __future__ import annotations

import os

from ullme_ray.spec.job import JobSpec


def places(job: JobSpec) -> dict[str, str]:
    """Dotted key -> path, all but `storage`. A model counts where it is a folder and no name at a hub."""
    found: dict[str, str] = {}
    models = {"model.base": job.model.base}
    if job.train:
        found |= {f"train.data.{i}.path": source.path for i, source in enumerate(job.train.data)}
        if job.train.validation:
            found["train.validation.path"] = job.train.validation.path
    if job.evaluate:
        for i, local in enumerate(job.evaluate.local):
            found[f"evaluate.local.{i}.path"] = local.path
            found |= {f"evaluate.local.{i}.corpus.{j}": path for j, path in enumerate(local.corpus)}
        found |= {f"evaluate.mteb.{i}.folder": task.folder for i, task in enumerate(job.evaluate.mteb) if task.folder}
        if job.evaluate.generation:
            found["evaluate.generation.path"] = job.evaluate.generation.path
        models |= {f"evaluate.models.{i}.base": other.base for i, other in enumerate(job.evaluate.models)}
    if job.embed:
        found |= {"embed.input.path": job.embed.input.path, "embed.output.path": job.embed.output.path}
    if job.mine:
        found["mine.output"] = job.mine.output
        if job.mine.corpus:
            found["mine.corpus.path"] = job.mine.corpus.path
        if not job.mine.encoder.is_own:
            models["mine.encoder.base"] = job.mine.encoder.base
    if job.serve:
        found |= {f"serve.adapters.{i}.path": adapter.path for i, adapter in enumerate(job.serve.adapters)}
        models |= {f"serve.models.{i}.base": model.base for i, model in enumerate(job.serve.models) if model.base}
    return found | {where: base for where, base in models.items() if _is_folder(base)}


def _is_folder(base: str) -> bool:
    return "://" in base or base.startswith(("/", "~", ".")) or (base != "scratch" and os.path.isdir(base))
