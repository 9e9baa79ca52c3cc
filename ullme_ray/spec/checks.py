"""Checks between fields: what each value alone allows but the job as a whole does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ullme_ray.reach import refused_path, refused_url
from ullme_ray.spec.evaluation import EvaluateSpec
from ullme_ray.spec.job import EmbedOutputSpec, JobSpec, LatentAttentionSpec, MineSpec, ServeSpec, TrainSpec
from ullme_ray.spec.places import places


@dataclass(frozen=True)
class Contradiction:
    """Values that cannot stand together: dotted paths of the `fields` compared, the one to change first."""

    fields: tuple[str, ...]
    message: str


def contradictions(job: JobSpec) -> list[Contradiction]:
    """Every contradiction inside a job."""
    return [
        *_stages(job),
        *_model(job),
        *_pools(job),
        *(_train(job, job.train) if job.train else ()),
        *(_mine(job, job.mine) if job.mine else ()),
        *(_evaluate(job, job.evaluate) if job.evaluate else ()),
        *_chunks(job),
        *(_serve(job, job.serve) if job.serve else ()),
        *(_stored_vectors(job, job.embed.output) if job.embed else ()),
        *_paths(job),
        *_cluster(job),
    ]


def _stages(job: JobSpec) -> Iterator[Contradiction]:
    if not job.stages:
        yield Contradiction(
            ("train", "evaluate", "embed", "serve"),
            "is missing, and so are evaluate, embed and serve: there is nothing to run; add one of these sections",
        )
    if job.search.questions and not (job.serve and job.embed):
        yield Contradiction(
            ("search.questions", "serve", "embed"),
            "are answered from the table through the server; add embed and serve sections, or remove the questions",
        )


def _model(job: JobSpec) -> Iterator[Contradiction]:
    if job.model.latent_attention != LatentAttentionSpec() and job.model.pooling != "latent_attention":
        yield Contradiction(
            ("model.latent_attention", "model.pooling"),
            f"is the shape of a pooling that this job does not use (model.pooling = {job.model.pooling}); "
            "remove it, or set model.pooling: latent_attention",
        )
    if job.model.pooling == "latent_attention" and job.model.base == "scratch":
        width, heads = job.model.scratch.hidden_size, job.model.latent_attention.heads
        if width % heads:
            yield Contradiction(
                ("model.latent_attention.heads", "model.scratch.hidden_size"),
                f"= {heads} does not divide hidden_size {width}; change one of them",
            )
    scratch = job.model.scratch
    if job.model.base != "scratch":
        return
    fields = ("model.scratch.heads", "model.scratch.hidden_size", "model.base")
    if scratch.hidden_size % scratch.heads:
        divisors = [n for n in range(1, scratch.hidden_size + 1) if scratch.hidden_size % (2 * n) == 0]
        near = sorted(divisors, key=lambda n: abs(n - scratch.heads))[:2]
        use = " or ".join(map(str, sorted(near))) or "an even hidden_size"
        yield Contradiction(fields, f"= {scratch.heads} does not divide hidden_size {scratch.hidden_size}; use {use}")
    elif (scratch.hidden_size // scratch.heads) % 2:
        yield Contradiction(
            fields,
            f"= {scratch.heads} makes heads of odd width {scratch.hidden_size // scratch.heads};"
            " rotary positions need an even one: change heads or hidden_size",
        )
    if job.train is None:
        yield Contradiction(
            ("model.base", "train"), "= scratch is made from the texts it is trained on; add a train section or name a model"
        )
    if job.model.lora is not None:
        yield Contradiction(
            ("model.lora", "model.base"), "cannot adapt `base: scratch`, whose weights are random; remove model.lora"
        )


def _pools(job: JobSpec) -> Iterator[Contradiction]:
    pools = {
        "mine.actors": job.mine.actors if job.mine else None,
        "embed.actors": job.embed.actors if job.embed else None,
        "serve.replicas": job.serve.replicas if job.serve else None,
    }
    for name, pool in pools.items():
        if pool and pool.min > pool.max:
            yield Contradiction(
                (f"{name}.min", f"{name}.max"), f"= {pool.min} is more than max = {pool.max}; lower min or raise max"
            )


def _serve(job: JobSpec, serve: ServeSpec) -> Iterator[Contradiction]:
    taken = {job.name: "name"}
    for kind, names in (("models", [m.name for m in serve.models]), ("adapters", [a.name for a in serve.adapters])):
        for position, name in enumerate(names):
            at = f"serve.{kind}.{position}"
            if name in taken:
                yield Contradiction(
                    (f"{at}.name", taken[name]),
                    f"= {name} is taken; a name stands for one model, so choose another",
                )
            taken.setdefault(name, f"{at}.name")
    for position, model in enumerate(serve.models):
        at = f"serve.models.{position}"
        if (model.run is None) == (model.base is None):
            given = "both run and base" if model.run else "neither run nor base"
            yield Contradiction((at, f"{at}.run", f"{at}.base"), f"has {given}; give one of them")
        if model.run == job.name:
            yield Contradiction((f"{at}.run", "name"), f"= {model.run} is this job itself, which is served anyway; remove it")
        if model.replicas.min > model.replicas.max:
            yield Contradiction(
                (f"{at}.replicas.min", f"{at}.replicas.max"),
                f"= {model.replicas.min} is more than max = {model.replicas.max}; lower min or raise max",
            )
    if serve.adapters and job.model.pooling == "latent_attention":
        yield Contradiction(
            ("serve.adapters", "model.pooling"), "do not go with latent_attention pooling; merge them, or remove them"
        )


def _train(job: JobSpec, train: TrainSpec) -> Iterator[Contradiction]:
    world_size, batch = train.workers.num_workers, train.global_batch_size
    if batch % world_size:
        yield Contradiction(
            ("train.global_batch_size", "train.workers.num_workers"),
            f"= {batch} does not divide over {world_size} ranks; use {_near_multiples(batch, world_size)},"
            " or change train.workers.num_workers",
        )
    least = train.workers.min_workers
    if least is not None and least > world_size:
        yield Contradiction(
            ("train.workers.min_workers", "train.workers.num_workers"),
            f"= {least} is more than num_workers = {world_size}; lower it or raise num_workers",
        )
    objective, at = train.objective, "train.objective"
    names = ("contrastive_weight", "generation_weight", "alignment_weight", "distill_weight")
    weights = tuple(f"{at}.{name}" for name in names)
    if not any(getattr(objective, name) for name in names):
        yield Contradiction((at, f"{at}.preset", *weights), "has all weights 0, so nothing would be learned; set one above 0")
    if objective.needs_negatives and train.negatives_per_query == 0:
        yield Contradiction(
            ("train.negatives_per_query", f"{at}.preset", f"{at}.generation", *weights),
            f"= 0, but objective {objective.preset} compares positives with hard negatives;"
            " use 1 or more, or objective cl or sft",
        )
    for i, source in enumerate(train.data):
        if not source.in_batch_negatives and train.negatives_per_query == 0:
            yield Contradiction(
                (f"train.data.{i}.in_batch_negatives", "train.negatives_per_query"),
                "= false leaves no negative at all, since train.negatives_per_query = 0; use 1 or more, or true",
            )
    margin, epsilon = objective.negative_margin, objective.miner_epsilon
    if margin is not None and epsilon is not None and margin >= epsilon:
        yield Contradiction(
            (f"{at}.negative_margin", f"{at}.miner_epsilon", f"{at}.preset"),
            f"= {margin} drops every negative that miner_epsilon = {epsilon} keeps, so nothing would be learned;"
            " lower it, or raise miner_epsilon",
        )
    widths = objective.matryoshka
    if widths is not None and widths.weights is not None and len(widths.weights) != len(widths.dims):
        yield Contradiction(
            (f"{at}.matryoshka.weights", f"{at}.matryoshka.dims"),
            f"are {len(widths.weights)} for {len(widths.dims)} dims; give one weight for each, or remove them",
        )
    lora = job.model.lora
    if lora is not None and lora.adapters == "separate" and objective.generation_weight == 0:
        yield Contradiction(
            ("model.lora.adapters", f"{at}.generation_weight", f"{at}.preset"),
            "= separate has an adapter for the generation loss, whose weight is 0; use shared, or a preset that generates",
        )
    yield from _sharding(job, train)
    if objective.reference == "adapter_off" and job.model.lora is None:
        yield Contradiction(
            (f"{at}.reference", "model.lora"), "= adapter_off needs model.lora; use frozen_copy, or add model.lora"
        )
    if train.max_generation_tokens is not None and train.max_generation_tokens > 4 * job.model.max_tokens:
        yield Contradiction(
            ("train.max_generation_tokens", "model.max_tokens"),
            f"= {train.max_generation_tokens} is more than 4 x model.max_tokens = {job.model.max_tokens}; lower it",
        )


def _sharding(job: JobSpec, train: TrainSpec) -> Iterator[Contradiction]:
    engine, at = train.deepspeed, "train.deepspeed"
    if train.workers.gpu_memory_gb is not None and train.workers.gpus_per_worker == 0:
        yield Contradiction(
            ("train.workers.gpu_memory_gb", "train.workers.gpus_per_worker"),
            f"= {train.workers.gpu_memory_gb:g} is of GPUs that this job does not use; set gpus_per_worker: 1, or remove it",
        )
    if engine.offload_optimizer and engine.zero_stage == 0:
        yield Contradiction(
            (f"{at}.offload_optimizer", f"{at}.zero_stage"), "needs an optimizer that is sharded; use zero_stage 1, 2 or 3"
        )
    if engine.offload_parameters and engine.zero_stage != 3:
        yield Contradiction(
            (f"{at}.offload_parameters", f"{at}.zero_stage"), "needs sharded parameters; use zero_stage 3, or remove it"
        )
    if job.model.lora is not None and job.model.lora.quantize_base is not None:
        if train.workers.gpus_per_worker == 0:
            yield Contradiction(
                ("model.lora.quantize_base", "train.workers.gpus_per_worker"),
                "= nf4 runs on a GPU only; set train.workers.gpus_per_worker: 1, or remove it",
            )
        if engine.zero_stage == 3:
            yield Contradiction(
                ("model.lora.quantize_base", f"{at}.zero_stage"),
                "= nf4 weights cannot be sharded; use zero_stage 0, 1 or 2, or remove it",
            )


def _mine(job: JobSpec, mine: MineSpec) -> Iterator[Contradiction]:
    if job.train is None:
        yield Contradiction(("mine", "train"), "makes negatives for the rows of train.data; add a train section")
    if mine.depth - mine.skip_first < mine.negatives_per_query:
        yield Contradiction(
            ("mine.depth", "mine.skip_first", "mine.negatives_per_query"),
            f"= {mine.depth} less skip_first = {mine.skip_first} leaves fewer than negatives_per_query = "
            f"{mine.negatives_per_query}; use {mine.skip_first + mine.negatives_per_query} or more",
        )
    if mine.encoder.is_own:
        for name in ("revision", "pooling", "max_tokens", "prompts"):
            if getattr(mine.encoder, name) is not None:
                yield Contradiction(
                    (f"mine.encoder.{name}", "mine.encoder.base"),
                    f"cannot be set for encoder {mine.encoder.base}, which has the settings of the model section; remove it",
                )


def _evaluate(job: JobSpec, evaluate: EvaluateSpec) -> Iterator[Contradiction]:
    if not (evaluate.local or evaluate.mteb or evaluate.generation):
        yield Contradiction(
            ("evaluate", "evaluate.local"),
            "measures nothing; add local: [{path: FOLDER}], mteb: [TASK] or generation: {path: FILE}",
        )
    for i, local in enumerate(evaluate.local):
        at = f"evaluate.local.{i}"
        if local.table and job.embed is None:
            yield Contradiction(
                (f"{at}.table", "embed"), "= true searches the embeddings table of this job; add an embed section"
            )
        if local.table and local.corpus:
            yield Contradiction((f"{at}.corpus", f"{at}.table"), "is not searched where table is true; remove one of them")
    for i, other in enumerate(evaluate.models):
        if not other.base:
            yield Contradiction((f"evaluate.models.{i}",), "names no model; add base: the name or folder of one")
    for i, task in enumerate(evaluate.mteb):
        at = f"evaluate.mteb.{i}"
        if task.folder and (task.name or task.types):
            yield Contradiction((f"{at}.folder", f"{at}.name"), "is one task by itself; remove name and types")
        if bool(task.folder) != bool(task.type):
            yield Contradiction(
                (f"{at}.type", f"{at}.folder"), "and folder go together: a folder needs its task's type, a name has its own"
            )
        if not (task.folder or task.name or task.types or task.languages):
            yield Contradiction((at,), "names no task; give a name, types, languages or a folder")


def _chunks(job: JobSpec) -> Iterator[Contradiction]:
    chunks = job.embed.input.chunks if job.embed else None
    if chunks is None:
        return
    at = "embed.input.chunks"
    if chunks.overlap >= chunks.tokens:
        yield Contradiction(
            (f"{at}.overlap", f"{at}.tokens"),
            f"= {chunks.overlap} repeats all {chunks.tokens} tokens of a chunk, so that no text would ever end; "
            f"use {chunks.tokens - 1} or fewer, better a tenth of tokens",
        )
    if chunks.tokens > job.model.max_tokens:
        yield Contradiction(
            (f"{at}.tokens", "model.max_tokens"),
            f"= {chunks.tokens} is more than model.max_tokens = {job.model.max_tokens}; lower it or raise model.max_tokens",
        )


def _stored_vectors(job: JobSpec, output: EmbedOutputSpec) -> Iterator[Contradiction]:
    at = "embed.output"
    if output.mantissa_bits is not None and output.dtype != "float32":
        yield Contradiction(
            (f"{at}.mantissa_bits", f"{at}.dtype"),
            f"= {output.mantissa_bits} rounds float32 numbers, and dtype is {output.dtype}; remove it, or use dtype: float32",
        )
    if output.dims is not None and output.dims % 8 and output.dtype in ("binary", "ubinary"):
        yield Contradiction(
            (f"{at}.dims", f"{at}.dtype"),
            f"= {output.dims} does not fill whole bytes with bits, as dtype: {output.dtype} needs; "
            f"use {_near_multiples(output.dims, 8)}",
        )
    width = job.model.scratch.hidden_size
    if output.dims is not None and job.model.base == "scratch" and output.dims > width:
        yield Contradiction(
            (f"{at}.dims", "model.scratch.hidden_size"),
            f"= {output.dims}, but the vectors have model.scratch.hidden_size = {width} numbers; use {width} or fewer",
        )


def _paths(job: JobSpec) -> Iterator[Contradiction]:
    for where, path in {"storage": job.storage, **places(job)}.items():
        scheme, separator, rest = path.partition("://")
        if separator and scheme not in ("s3", "file"):
            yield Contradiction(
                (where,), f"= {path} has the unknown scheme {scheme}://; use a local path, s3://bucket/... or run:..."
            )
        elif separator and not rest.strip("/"):
            yield Contradiction((where,), f"= {path} names no {'bucket' if scheme == 's3' else 'folder'}")
        is_local = scheme == "file" if separator else not path.startswith("run:")
        if is_local and (refused := refused_path(path)):
            yield Contradiction((where,), f"= {path} {refused}")
        if path.startswith("run:") and ".." in path.split("/"):
            yield Contradiction((where,), f"= {path} leaves the run's folder; remove the `..`")
        if path.startswith("run:data") and job.dataset is None:
            yield Contradiction(
                (where, "dataset"),
                f"= {path} is written by the dataset section, which this job does not have;"
                " add dataset: {name: aws_api_docs}",
            )
    if job.storage.startswith("run:"):
        yield Contradiction(("storage",), f"= {job.storage} is where run: paths lie, so it cannot be one itself")


def _cluster(job: JobSpec) -> Iterator[Contradiction]:
    groups = job.cluster.workers
    for i, group in enumerate(groups):
        at = f"cluster.workers.{i}"
        if group.min > group.max:
            yield Contradiction(
                (f"{at}.min", f"{at}.max"), f"= {group.min} is more than max = {group.max}; lower min or raise max"
            )
        if group.name in {before.name for before in groups[:i]}:
            yield Contradiction((f"{at}.name",), f"= {group.name} is the name of an earlier group; give each its own")
        for label in group.node_labels:
            if not all(label.partition("=")):
                yield Contradiction((f"{at}.node_labels",), f"has {label!r}; write key=value")
    addresses = {"cluster.address": job.cluster.address, "cluster.redis": job.cluster.redis}
    for where, address in addresses.items():
        if address is not None and (refused := refused_url(address)):
            yield Contradiction((where,), f"= {address}: {refused}; name another host")
    if job.cluster.redis_password is not None and job.cluster.redis is None:
        yield Contradiction(("cluster.redis_password", "cluster.redis"), "is of a Redis that is not named; add cluster.redis")
    for stage in job.schedule.stages if job.schedule else ():
        if stage not in job.stages:
            yield Contradiction(
                ("schedule.stages", stage), f"has {stage}, for which the job has no section; add it, or remove the stage"
            )
    if job.schedule and set(job.stages) <= {"serve"}:
        yield Contradiction(("schedule", "train", "evaluate", "embed"), "has nothing to start: a server runs all the time")


def _near_multiples(value: int, factor: int) -> str:
    below, above = value // factor * factor, -(-value // factor) * factor
    return f"{below} or {above}" if below else str(above)
