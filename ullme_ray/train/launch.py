"""From the driver: starts the ranks on Ray Train, shows their progress, brings errors home."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ullme_ray import storage, telemetry
from ullme_ray.errors import StorageError, TrainingError, UllmeError
from ullme_ray.model import check_base, ensure_base, open_tokenizer
from ullme_ray.pairs import check_sources
from ullme_ray.progress import Progress
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.spec.run_folder import dump_job
from ullme_ray.train.checkpoint import check_resumable, list_checkpoints
from ullme_ray.train.curves import write_curves
from ullme_ray.train.lock import RunLock
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

    mailbox = _Mailbox.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    steps_done = done[-1].step if done else 0
    trainer = _Trainer(
        _train_on_worker,
        train_loop_config={"job": dump_job(job), "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=train.workers.num_workers,
            use_gpu=train.workers.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.workers.cpus_per_worker}
            | ({"GPU": train.workers.gpus_per_worker} if train.workers.gpus_per_worker else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if train.workers.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            # Checkpoints are ours (train/checkpoint.py). Ray's own state of the run is never resumed: its snapshot file is
            # written in place, and a crash in mid-write would make the run impossible to restart.
            name=f"{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=tempfile.mkdtemp(prefix="ullme-ray-train-"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    with Progress("train", total=train.max_steps, unit="steps") as bar:
        bar.note(batch_arithmetic(job))
        if steps_done:
            bar.note(f"resumes after step {steps_done}")
        try:
            with (
                RunLock(job, bar.note),
                Trackers(job, bar.note, steps_done=steps_done) as trackers,
                _Watcher(job, mailbox, bar, trackers) as watcher,
            ):
                try:
                    trainer.fit()
                except ray.train.TrainingFailedError as error:
                    raise _home(error, mailbox) from None
                failure = ray.get(mailbox.failure.remote())
                if failure is not None:
                    raise failure
        finally:
            _draw_curves(job, bar)  # also of a run that broke off: there they are wanted most
    return TrainResult(run.export, int(watcher.last.get("step", steps_done)), already_done=False, final=watcher.last)


def _draw_curves(job: JobSpec, bar: Progress) -> None:
    try:
        write_curves(job)
    except Exception as error:  # noqa: BLE001 - a picture must never cost a trained model, nor hide why a run failed
        bar.note(f"the curves could not be drawn: {type(error).__name__}: {error}")


def batch_arithmetic(job: JobSpec) -> str:
    """`global 512 = 16 ranks x 32 queries; chunk 8 -> 4 chunks of 2 passages each`."""
    train = job.train
    assert train is not None
    per_rank = train.global_batch_size // train.workers.num_workers
    chunks = -(-per_rank // train.chunk_size)
    passages = train.positives_per_query + train.negatives_per_query
    return (
        f"global {train.global_batch_size} = {train.workers.num_workers} ranks x {per_rank} queries; "
        f"chunk {train.chunk_size} -> {chunks} chunks; {passages} passages per query"
    )


def _train_on_worker(config: dict[str, Any]) -> None:
    """Entry of a Ray Train worker."""
    import logging

    from ullme_ray.train.loop import train_on_rank

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    mailbox = config["mailbox"]
    if ray.get(mailbox.failure.remote()) is not None:
        return  # Ray restarts ranks after any error; one that a restart cannot cure ends the run here
    job = parse_job(config["job"].encode(), source="job")
    if job.train is not None and job.train.workers.gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes a GPU where it sees one, also one that is not ours
    try:
        train_on_rank(job, lambda record: mailbox.put.remote(record))
    except UllmeError as error:
        if not isinstance(error, StorageError):  # a store may recover, bad data will not
            ray.get(mailbox.fail.remote(error))
        raise


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C an exception; Ray Train (2.60) puts a handler in its place that ends the process with 0, as if done."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


@ray.remote
class _Mailbox:
    """Between the ranks and the driver: rank 0's metrics and notes, and an error that no restart can cure."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._failure: UllmeError | None = None

    def put(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records

    def fail(self, error: UllmeError) -> None:
        self._failure = self._failure or error

    def failure(self) -> UllmeError | None:
        return self._failure


class _Watcher:
    """A thread that moves records from the mailbox to the progress bar and the trackers while `fit` blocks."""

    def __init__(self, job: JobSpec, mailbox: Any, bar: Progress, trackers: Trackers) -> None:
        self.job_name = job.name
        self.mailbox = mailbox
        self.bar = bar
        self.trackers = trackers
        self.last: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="train-progress", daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            stopping = self._stop.wait(0.5)
            for record in ray.get(self.mailbox.take.remote()):
                if "note" in record:
                    self.bar.note(record["note"])
                    continue
                self.last |= record
                self.bar.update(record["step"], **shown_figures(self.last))
                self.trackers.write(record)
                telemetry.train_record(self.job_name, record)
            if stopping:
                return


_SHORT = {"contrastive_loss": "con", "generation_loss": "gen", "alignment_loss": "align"}


def shown_figures(record: dict[str, Any]) -> dict[str, str]:
    """The figures of a record, short enough for a line of 100 columns; a loss of exactly 0 belongs to no term of the job."""
    parts = {_SHORT.get(name, name.removesuffix("_loss")): value for name, value in record.items() if name.endswith("_loss")}
    shown = {"loss": f"{record['loss']:.3f}"} if "loss" in record else {}
    shown |= {name: f"{value:.3f}" for name, value in parts.items() if value != 0}
    shown |= {name.removeprefix("validation_"): f"{record[name]:.3f}" for name in record if name.startswith("validation_")}
    for name, short, form in (
        ("grad_norm", "grad", "{:.3g}"),
        ("learning_rate", "lr", "{:.1e}"),
        ("tokens_per_s", "tokens/s", "{:,.0f}"),
        ("mfu", "MFU", "{:.0%}" if record.get("mfu", 0.0) >= 0.1 else "{:.1%}"),
    ):
        if name in record:
            shown[short] = form.format(record[name])
    return shown


def _home(error: Exception, mailbox: Any) -> UllmeError:
    """What the ranks failed of, as an error of ours."""
    failure: UllmeError | None = ray.get(mailbox.failure.remote())
    if failure is not None:
        return failure
    causes = sorted(getattr(error, "worker_failures", {}).items())
    for _, cause in causes:  # first of all ranks: the others may only have lost their connection to this one
        if isinstance(cause, UllmeError):
            return cause
    for rank, cause in causes:
        return TrainingError(f"rank {rank} failed more than train.max_failures times: {type(cause).__name__}: {cause}")
    return TrainingError(f"training failed: {error}")
