"""Checks between fields: what each value alone allows but the job as a whole does not."""

from __future__ import annotations

from collections.abc import Iterator

from ullme_ray.errors import Problem
from ullme_ray.spec.job import JobSpec, TrainSpec


def cross_field_problems(job: JobSpec) -> list[Problem]:
    """Every contradiction inside a job; `where` is the dotted path of the field to change."""
    return [*_job(job), *(_train(job, job.train) if job.train else ()), *_paths(job)]


def _job(job: JobSpec) -> Iterator[Problem]:
    if not job.stages:
        yield Problem("name", "has no stage to run; add a section: train, evaluate, embed or serve")
    scratch = job.model.scratch
    if job.model.base == "scratch":
        if scratch.hidden_size % scratch.heads:
            near = _near_multiples(scratch.hidden_size, scratch.heads)
            yield Problem("model.scratch.heads", f"= {scratch.heads} does not divide hidden_size {scratch.hidden_size}; use {near}")
        elif (scratch.hidden_size // scratch.heads) % 2:
            yield Problem("model.scratch.heads", f"= {scratch.heads} leaves heads of odd width; rotary positions need an even one")
        if job.train is None and job.evaluate is None:
            yield Problem("model.base", "= scratch makes an untrained model; add a train section or name a model")
        if job.model.lora is not None:
            yield Problem("model.lora", "cannot adapt `base: scratch`, whose weights are random; remove model.lora")
    for name, pool in (("embed.actors", job.embed and job.embed.actors), ("serve.replicas", job.serve and job.serve.replicas)):
        if pool and pool.min > pool.max:
            yield Problem(f"{name}.min", f"= {pool.min} is more than max = {pool.max}")
    if job.search.questions and not (job.serve and job.embed):
        yield Problem("search.questions", "are answered from the table through the server; add embed and serve sections")


def _train(job: JobSpec, train: TrainSpec) -> Iterator[Problem]:
    world_size = train.workers.num_workers
    if train.global_batch_size % world_size:
        near = _near_multiples(train.global_batch_size, world_size)
        yield Problem(
            "train.global_batch_size",
            f"= {train.global_batch_size} does not divide over {world_size} ranks; use {near}, or change train.workers.num_workers",
        )
    objective = train.objective
    if objective.contrastive_weight == objective.generation_weight == objective.alignment_weight == 0:
        yield Problem("train.objective", "has all three weights 0, so nothing would be learned; set one above 0")
    if objective.needs_negatives and train.negatives_per_query == 0:
        yield Problem(
            "train.negatives_per_query",
            f"= 0, but objective {objective.preset} compares positives with hard negatives; use 1 or more, or objective cl or sft",
        )
    if objective.reference == "adapter_off" and job.model.lora is None:
        yield Problem("train.objective.reference", "= adapter_off needs model.lora; use frozen_copy, or add model.lora")
    if train.max_generation_tokens is not None and train.max_generation_tokens > 4 * job.model.max_tokens:
        yield Problem(
            "train.max_generation_tokens",
            f"= {train.max_generation_tokens} is more than 4 x model.max_tokens = {job.model.max_tokens}; lower it",
        )


def _paths(job: JobSpec) -> Iterator[Problem]:
    paths = {"storage": job.storage}
    if job.train:
        paths |= {f"train.data.{i}.path": source.path for i, source in enumerate(job.train.data)}
    if job.evaluate:
        paths |= {f"evaluate.local.{i}.path": local.path for i, local in enumerate(job.evaluate.local)}
    if job.embed:
        paths |= {"embed.input.path": job.embed.input.path, "embed.output.path": job.embed.output.path}
    for where, path in paths.items():
        scheme, separator, rest = path.partition("://")
        if separator and scheme not in ("s3", "file"):
            yield Problem(where, f"= {path} has the unknown scheme {scheme}://; use a local path, s3://bucket/... or run:...")
        elif separator and not rest.strip("/"):
            yield Problem(where, f"= {path} names no {'bucket' if scheme == 's3' else 'folder'}")
        if path.startswith("run:data") and job.dataset is None:
            yield Problem(where, f"= {path} is written by the dataset section, which this job does not have; add dataset: {{name: aws_api_docs}}")
    if job.storage.startswith("run:"):
        yield Problem("storage", f"= {job.storage} is where run: paths lie, so it cannot be one itself")


def _near_multiples(value: int, factor: int) -> str:
    below, above = value // factor * factor, -(-value // factor) * factor
    return f"{below} or {above}" if below else str(above)
