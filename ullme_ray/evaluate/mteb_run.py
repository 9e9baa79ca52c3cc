"""MTEB over Ray: processes that run tasks share processes that encode, so one large task is spread as well as many small ones.

A task's process loads its data and scores it; texts go in chunks to whichever encoder is free, and at most two chunks wait at
each, so memory is that of a task. A result is written as soon as its task is done: a run that was killed goes on with the rest,
and a task that fails keeps none of the others from being run.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from ullme_ray.errors import DataError, UllmeError
from ullme_ray.evaluate.contenders import newest
from ullme_ray.evaluate.encoding import CHUNK_TEXTS, MAX_RESTARTS, EncoderPool, get_or_raise
from ullme_ray.evaluate.mteb_model import JobModel, model_meta, prompts_of, register
from ullme_ray.evaluate.mteb_results import FOLDER, ResultFolder, task_score
from ullme_ray.evaluate.mteb_scores import MtebScores, TaskScore
from ullme_ray.evaluate.mteb_tasks import TaskRef, find_tasks, make_task
from ullme_ray.model import encoder_fingerprint
from ullme_ray.progress import Progress
from ullme_ray.spec import JobSpec, absolute_paths

MAX_TASKS_AT_ONCE = 8  # each holds its data, and few texts are in flight at a time
_CHUNKS_PER_ENCODER = 2
_ASSUMED_TEXTS = 100_000  # of tasks whose size is not known before they are loaded


def run_mteb(job: JobSpec) -> MtebScores:
    """Runs what is not done yet of the job's tasks, on its newest model; tells which tasks failed.

    Raises:
        DataError: a task is not known.
        ModelError: the model is missing or cannot be loaded.
    """
    meta = register(job)
    folder = ResultFolder(job, meta)
    tasks = find_tasks(job)
    missing = [task for task in tasks if folder.read(task) is None]
    failed: dict[str, str] = {}
    if missing:
        with EncoderPool(job, num_texts=_ASSUMED_TEXTS) as pool, Progress("mteb", len(tasks), unit="tasks") as progress:
            progress.update(len(tasks) - len(missing))
            pool.load(newest(job), encoder_fingerprint(job, which=newest(job)))
            failed = _run_tasks(job, missing, folder, pool.ready(progress), progress, done=len(tasks) - len(missing))
    scores = tuple(_score(job, folder, task) for task in tasks if task.name not in failed)
    return MtebScores(str(meta.name), str(meta.revision), FOLDER, scores, failed)


def _score(job: JobSpec, folder: ResultFolder, ref: TaskRef) -> TaskScore:
    result = folder.read(ref)
    assert result is not None
    metadata = make_task(job, ref).metadata
    return task_score(result, ref, folder.file_of(ref), metadata.main_score, metadata.type)


def _run_tasks(
    job: JobSpec, tasks: list[TaskRef], folder: ResultFolder, encoders: list[Any], progress: Progress, *, done: int
) -> dict[str, str]:
    """Task -> why it failed, of those that did."""
    actor = ray.remote(num_cpus=0, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(_TaskActor)
    made_with = absolute_paths(job), encoder_fingerprint(job, which=newest(job)), encoders
    idle: list[Any] = [actor.remote(*made_with) for _ in range(min(len(tasks), len(encoders), MAX_TASKS_AT_ONCE))]
    waiting = deque(tasks)
    running: dict[Any, tuple[Any, TaskRef]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and idle:
                runner, task = idle.pop(), waiting.popleft()
                running[runner.run.remote(task)] = runner, task
            (finished,), _ = ray.wait(list(running), num_returns=1)
            runner, task = running.pop(finished)
            try:
                folder.write(_files(finished, task))
                if folder.read(task) is None:
                    raise DataError(
                        f"evaluate.mteb.{task.spec}: the task {task.name} lacks splits or subsets that were asked for"
                    )
            except DataError as error:
                failed[task.name] = str(error)
                if isinstance(error.__cause__, RayActorError):
                    runner = actor.remote(*made_with)  # the old one is dead
            idle.append(runner)
            done += 1
            progress.update(done)
        return failed
    finally:
        for runner in (*idle, *(runner for runner, _ in running.values())):
            ray.kill(runner)


def _files(reference: Any, task: TaskRef) -> dict[str, str]:
    """What a task's process made of it.

    Raises:
        DataError: the task failed; others may not.
        ModelError: the model did.
    """
    try:
        files: dict[str, str] = ray.get(reference)
    except RayActorError as error:
        raise DataError(
            f"evaluate.mteb.{task.spec}: the process that ran the task {task.name} died, also after {MAX_RESTARTS} restarts, "
            "as one does for lack of memory; give the machine more"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, UllmeError):
            raise error.cause from None
        raise DataError(
            f"evaluate.mteb.{task.spec}: the task {task.name} cannot be run "
            f"({type(error.cause).__name__}: {str(error.cause).splitlines()[0] if str(error.cause) else ''}); its data may be "
            "missing, or not be in mteb's layout"
        ) from error
    return files


class _TaskActor:
    """Runs one task after another with the shared encoders."""

    def __init__(self, job: JobSpec, fingerprint: str, encoders: list[Any]) -> None:
        logging.getLogger("mteb").setLevel(logging.ERROR)
        self._job = job
        encode = partial(_encode, encoders, newest(job), fingerprint)
        self._model: Any = JobModel(model_meta(job), prompts_of(job), encode)

    def run(self, ref: TaskRef) -> dict[str, str]:
        """The files that mteb's ResultCache makes of a task, by name."""
        import mteb

        with tempfile.TemporaryDirectory() as folder:
            cache = mteb.ResultCache(folder)
            mteb.evaluate(
                self._model,
                make_task(self._job, ref),
                cache=cache,
                co2_tracker=False,
                overwrite_strategy="always",
                show_progress_bar=False,
                encode_kwargs={"batch_size": CHUNK_TEXTS},
            )
            path = cache.get_task_result_path(ref.name, self._model.mteb_model_meta)
            return {name: (Path(path).parent / name).read_text(encoding="utf-8") for name in os.listdir(Path(path).parent)}


def _encode(encoders: list[Any], which: str, fingerprint: str, texts: list[str], prompt: str) -> np.ndarray:
    """(N, D): each text once, however often it comes, longest first, a chunk at a time to whichever encoder is free."""
    unique = list(dict.fromkeys(texts))
    order = sorted(range(len(unique)), key=lambda row: -len(unique[row]))
    chunks = deque(order[start : start + CHUNK_TEXTS] for start in range(0, len(order), CHUNK_TEXTS))
    free = deque(encoder for _ in range(_CHUNKS_PER_ENCODER) for encoder in encoders)
    running: dict[Any, tuple[Any, list[int]]] = {}
    vectors: np.ndarray | None = None
    while chunks or running:
        while chunks and free:
            encoder, rows = free.popleft(), chunks.popleft()
            chunk = [unique[row] for row in rows]
            running[encoder.encode_prompted.remote(which, fingerprint, chunk, prompt)] = encoder, rows
        (done,), _ = ray.wait(list(running), num_returns=1)
        encoder, rows = running.pop(done)
        found = get_or_raise(done)
        if vectors is None:
            vectors = np.empty((len(unique), found.shape[1]), np.float32)
        vectors[rows] = found
        free.append(encoder)
    assert vectors is not None, "mteb asked for no text"
    place = {text: row for row, text in enumerate(unique)}
    return vectors[[place[text] for text in texts]]
