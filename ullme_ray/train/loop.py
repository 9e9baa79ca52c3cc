"""Training on one rank, top to bottom: build, resume, fetch, step, log, checkpoint, export. Read this first."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ullme_ray import storage
from ullme_ray.errors import TrainingError
from ullme_ray.model.adapters import ENCODE, merge_lora
from ullme_ray.model.backbone import DTYPES, base_folder
from ullme_ray.model.encoder import open_tokenizer
from ullme_ray.model.export import export_encoder
from ullme_ray.model.speed import non_embedding_parameters, peak_flops
from ullme_ray.model.two_pass import build_two_pass
from ullme_ray.pairs import data_fingerprint, read_sources
from ullme_ray.spec.job import JobSpec, TrainSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.train.checkpoint import TrainState, open_checkpoint, restore_state, restore_weights, save_checkpoint
from ullme_ray.train.collate import TrainBatch, collate, shortest_first
from ullme_ray.train.collectives import gather_objects, world
from ullme_ray.train.data import BatchSampler
from ullme_ray.train.metrics import MetricsLog, memory_bytes, speed
from ullme_ray.train.open_engine import open_engine
from ullme_ray.train.reference import Table, ensure_reference, reference_logps
from ullme_ray.train.step import total_tokens, train_step
from ullme_ray.train.validation import Validator

Report = Callable[[dict[str, Any]], None]
Mark = Callable[[int, str], None]


def train_on_rank(job: JobSpec, report: Report, mark: Mark) -> None:
    """Runs the job's training on this rank; the process group must be up. Resumes from the newest checkpoint by itself.

    Args:
        report: gets every logged record, and `{"note": sentence}` for what a person should know; on rank 0 only.
        mark: gets steps done and what this rank is about to do; named when ranks wait for one another in vain.

    Raises:
        UllmeError: data, model or checkpoint cannot be used, or a loss is not finite.
    """
    train = job.train
    assert train is not None
    rank, world_size = world()
    per_rank = train.global_batch_size // world_size

    # Build
    sources = read_sources(job, publish_rejects=rank == 0)
    if rank == 0:
        for note in (note for source in sources for note in source.notes):
            report({"note": note})
    sampler = BatchSampler(sources, train, seed=job.seed)
    tokenizer = open_tokenizer(job, which="base")
    module = build_two_pass(
        base_folder(job),
        job.model,
        reference=train.objective.reference if train.objective.needs_reference else "none",
        gradient_checkpointing=train.gradient_checkpointing,
        seed=job.seed,
    )
    num_parameters = non_embedding_parameters(module.causal_lm)
    validator = Validator(job, tokenizer) if train.validation is not None else None

    # Resume: weights before the engine is made of them, then what the optimizer keeps
    reader = open_checkpoint(job)
    if reader is not None:
        restore_weights(module, reader)
    engine = open_engine(module, job, world_size)
    if reader is not None:
        restore_state(engine, reader)
    at = reader.progress if reader is not None else TrainState(step=0, data=data_fingerprint(sources))
    _check_same_rows(at, data_fingerprint(sources))
    reference: Table | None = None
    if train.objective.needs_reference and train.objective.reference == "precomputed":
        reference = ensure_reference(engine, sampler, tokenizer, job, steps_done=at.step)
    peak = peak_flops(engine.device, DTYPES[job.model.dtype]) * world_size
    log = MetricsLog(RunFolder.of(job).metrics, steps_done=at.step) if rank == 0 else None

    if validator is not None and at.step == 0:  # where the curve begins; no checkpoint to keep, so it competes with none
        untrained = {"step": 0, "validation_ndcg": validator.measure(engine)}
        if log is not None:
            log.write(untrained)
            report(untrained)

    def fetch(step: int) -> TrainBatch:
        examples = shortest_first(sampler.examples(step, rank * per_rank, per_rank))
        batch = collate(
            examples,
            tokenizer,
            with_generation=train.objective.needs_generation,
            max_generation_tokens=train.max_generation_tokens or job.model.max_tokens,
        )
        return replace(batch, reference_logps=reference_logps(examples, reference)) if reference is not None else batch

    with ThreadPoolExecutor(1) as prefetch:  # the next batch is tokenized while this one is computed
        upcoming = prefetch.submit(fetch, at.step) if not _is_over(at, train) else None
        while not _is_over(at, train):
            step, start = at.step, time.perf_counter()
            assert upcoming is not None
            mark(step, "preparing the batch")
            batch = upcoming.result().to(engine.device)
            if step + 1 < train.max_steps:
                upcoming = prefetch.submit(fetch, step + 1)

            learning_rate = learning_rate_at(step, train)
            engine.set_learning_rate(learning_rate)
            mark(step, "computing")
            result = train_step(engine, batch, train.objective, chunk_size=train.chunk_size, step=step, seed=job.seed)

            encode_tokens, generate_tokens = total_tokens(batch)
            seconds = time.perf_counter() - start
            at = replace(at, step=step + 1)
            improved = False
            if validator is not None and (at.step % validator.settings.every_steps == 0 or at.step == train.max_steps):
                mark(at.step, "validating")
                before = at.best
                at = replace(at, validations=(*at.validations, (at.step, validator.measure(engine))))
                improved = at.best != before
            at = replace(at, finished=_is_over(at, train))

            if log is not None and (at.step % train.log_every_steps == 0 or at.finished or at.just_validated):
                record = {
                    **result.as_record(train.objective),
                    **speed(num_parameters, encode_tokens, generate_tokens, seconds=seconds, peak=peak),
                    **({"validation_ndcg": at.validations[-1][1]} if at.just_validated else {}),
                    "step": at.step,
                    "learning_rate": learning_rate,
                    "memory_bytes": memory_bytes(engine.device),
                }
                log.write(record)
                report(record)

            if at.step % train.checkpoint_every_steps == 0 or improved or at.finished:
                if log is not None:
                    log.flush()  # first: a resumed run drops records after its checkpoint, but cannot make up missing ones
                mark(at.step, "writing a checkpoint")
                save_checkpoint(engine, job, at)

    if log is not None:
        log.close()
    mark(at.step, "exporting")
    _export(job, at)


def _check_same_rows(at: TrainState, fingerprint: str) -> None:
    """All ranks see the same training rows, and those with which the run began; a collective call.

    Raises:
        TrainingError: they do not.
    """
    if len(set(gather_objects(fingerprint))) > 1:
        raise TrainingError("the ranks read different rows of train.data: a file changed while they started; start again")
    if at.data != fingerprint:
        raise TrainingError(
            f"the rows of train.data are not those that this run began with {at.step} steps ago; put them back to resume, "
            f"or give the job another name"
        )


def _is_over(at: TrainState, train: TrainSpec) -> bool:
    """All steps are done, or the last `patience` validations brought nothing better."""
    patience = train.validation.patience if train.validation is not None else None
    if at.step >= train.max_steps:
        return True
    if patience is None or at.best is None:
        return False
    return len([step for step, _ in at.validations if step > at.best[0]]) >= patience


def learning_rate_at(step: int, train: TrainSpec) -> float:
    """Learning rate of a step (from 0): linear warm-up to the peak, then the schedule. A function of the step: no state."""
    warmup = train.warmup_steps
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, train.max_steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[train.lr_schedule]
    return train.learning_rate * shape


def _export(job: JobSpec, at: TrainState) -> None:
    """Rank 0 puts the weights of the best validated, or else the last, checkpoint into a fresh copy of the base."""
    train = job.train
    assert train is not None
    keeps_best = train.validation is not None and train.validation.export == "best" and at.best is not None
    reader = open_checkpoint(job, step=at.best[0] if keeps_best and at.best else None)
    assert reader is not None
    if world()[0] != 0:
        return
    run = RunFolder.of(job)
    module = build_two_pass(base_folder(job), job.model, reference="none", dtype=torch.float32)
    restore_weights(module, reader)
    with tempfile.TemporaryDirectory() as local:
        if job.model.lora is not None:
            module.lm.save_pretrained(f"{local}/adapter", selected_adapters=[ENCODE])
            storage.put_folder(f"{local}/adapter", run.adapter, last="adapter_config.json")
        backbone = merge_lora(module.lm).base_model.to(DTYPES[job.model.dtype])
        training = {
            "objective": train.objective.preset,
            "steps": reader.progress.step,
            "global batch size": train.global_batch_size,
            "learning rate": train.learning_rate,
        }
        tokenizer = open_tokenizer(job, which="base").hf
        head = module.head.to(DTYPES[job.model.dtype]) if module.head is not None else None
        export_encoder(backbone, tokenizer, job, f"{local}/model", training=training, head=head)
        storage.put_folder(f"{local}/model", run.export, last="modules.json")
