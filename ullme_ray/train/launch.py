"""Training from the driver: what is checked before, what runs on each rank, what is left to do after."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import ray

from ullme_ray import storage
from ullme_ray.errors import CollectiveError, StorageError, UllmeError
from ullme_ray.model import check_base, ensure_base, open_tokenizer
from ullme_ray.pairs import check_sources
from ullme_ray.progress import Progress
from ullme_ray.report.curves import write_curves
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.train.checkpoint import check_resumable, list_checkpoints
from ullme_ray.train.collectives import is_collective_error, limit_of_later_groups, world
from ullme_ray.train.lock import RunLock
from ullme_ray.train.mailbox import SETTLE_S, SignsOfLife, Watcher, open_mailbox, read_signs, who_did_not_answer
from ullme_ray.train.ranks import run_ranks
from ullme_ray.train.trackers import Trackers, check_trackers
from ullme_ray.train.validation import read_validation_set


@dataclass(frozen=True)
class TrainResult:
    """Where the trained model lies, and how the run went."""

    model: str
    steps: int
    already_done: bool
    final: dict[str, Any]  # the last record of metrics; empty when nothing was left to do


def preflight(job: JobSpec) -> None:
    """Before long work: base model, training data, writable storage, trackers, resumable checkpoint.

    Raises:
        UllmeError: with the reason.
    """
    check_base(job)
    _check_tokenizer(job)
    storage.check_writable(RunFolder.of(job).root)
    check_sources(job)
    check_trackers(job)
    if job.train is not None and job.train.validation is not None:
        read_validation_set(job)
    for checkpoint in list_checkpoints(job)[-1:]:
        check_resumable(job, checkpoint)


def _check_tokenizer(job: JobSpec) -> None:
    """Prompts and chat template must leave room for texts. A scratch model has no tokenizer yet, and no chat template ever."""
    train = job.train
    assert train is not None
    if job.model.base != "scratch":
        tokenizer = open_tokenizer(job, which="base")
        if train.objective.needs_generation:
            tokenizer.generation_room(train.max_generation_tokens or job.model.max_tokens)


def run_train(job: JobSpec) -> TrainResult:
    """Trains the job's model to its last step and exports it; a run that was cut off goes on from its last checkpoint.

    Raises:
        UllmeError: data, model or settings cannot be used, or a loss is not finite.
        TrainingError: ranks died more than `train.max_failures` times.
    """
    train = job.train
    assert train is not None
    run = RunFolder.of(job)
    ensure_base(job)
    done = list_checkpoints(job)
    if done:
        check_resumable(job, done[-1])
        if done[-1].manifest["finished"] and storage.exists(storage.join(run.export, "modules.json")):
            return TrainResult(run.export, done[-1].step, already_done=True, final={})

    mailbox = open_mailbox()
    steps_done = done[-1].step if done else 0
    with Progress("train", total=train.max_steps, unit="steps") as bar:
        if steps_done:
            bar.note(f"resumes after step {steps_done}")
        try:
            with (
                RunLock(job, bar.note),
                Trackers(job, bar.note, steps_done=steps_done) as trackers,
                Watcher(job, mailbox, bar, trackers) as watcher,
            ):
                run_ranks(job, mailbox, bar, _train_on_worker)
        finally:
            _draw_curves(job, bar)  # also of a run that broke off: there they are wanted most
    return TrainResult(run.export, int(watcher.last.get("step", steps_done)), already_done=False, final=watcher.last)


def _draw_curves(job: JobSpec, bar: Progress) -> None:
    try:
        write_curves(job)
    except Exception as error:  # noqa: BLE001 - a picture must never cost a trained model, nor hide why a run failed
        bar.note(f"the curves could not be drawn: {type(error).__name__}: {error}")


def _train_on_worker(config: dict[str, Any]) -> None:
    """Entry of a Ray Train worker."""
    import logging

    from ullme_ray.train.loop import train_on_rank

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    mailbox = config["mailbox"]
    if ray.get(mailbox.failure.remote()) is not None:
        return  # Ray restarts ranks after any error; one that a restart cannot cure ends the run here
    job = parse_job(config["job"].encode(), source="job")
    assert job.train is not None
    if job.train.workers.gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes a GPU where it sees one, also one that is not ours
    rank, timeout_s = world()[0], job.train.workers.timeout_s
    limit_of_later_groups(timeout_s)
    with SignsOfLife(mailbox, rank) as signs:
        try:
            train_on_rank(job, lambda record: mailbox.put.remote(record), signs.at)
        except UllmeError as error:
            if not isinstance(error, StorageError):  # a store may recover, bad data will not
                ray.get(mailbox.fail.remote(error))
            raise
        except Exception as error:
            if not is_collective_error(error):
                raise
            time.sleep(SETTLE_S)  # so that a rank which died a moment ago counts as silent
            place, answer = signs.place, who_did_not_answer(read_signs(mailbox), rank)
            raise CollectiveError(
                f"{place.name} waited for the others while {place.doing} after step {place.step}, at most "
                f"train.workers.timeout_s = {timeout_s:g} s: {answer}"
            ) from error
