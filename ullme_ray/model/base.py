"""The base model of `base: scratch`, made once per run from the job's own training texts."""

from __future__ import annotations

import itertools
import json
import tempfile

from ullme_ray import storage
from ullme_ray.errors import ModelError
from ullme_ray.model.scratch import build_scratch
from ullme_ray.pairs import read_sources
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

_VOCABULARY_ROWS = 50_000


def ensure_base(job: JobSpec) -> None:
    """Makes the run's scratch model if the job wants one and it is not there yet; does nothing otherwise.

    Raises:
        DataError: the training rows it learns its vocabulary from cannot be read.
        ModelError: the run's folder holds a scratch model of another shape, length or seed.
    """
    if job.model.base != "scratch" or job.train is None:
        return
    folder = RunFolder.of(job).base
    ready = storage.join(folder, "ready.json")
    wanted = {"scratch": job.model.scratch.model_dump(mode="json"), "max_tokens": job.model.max_tokens, "seed": job.seed}
    if storage.exists(ready):
        if json.loads(storage.read_text(ready)) != wanted:
            raise ModelError(
                f"{folder} holds a scratch model made with other values of model.scratch, model.max_tokens or seed; "
                f"put them back, remove that folder, or give the job another name"
            )
        return
    texts: list[str] = []
    for source in read_sources(job):
        for pair in itertools.islice(source.pairs, _VOCABULARY_ROWS):
            texts += [pair.query, *pair.positives]
    with tempfile.TemporaryDirectory() as local:
        build_scratch(texts, job.model.scratch, max_tokens=job.model.max_tokens, seed=job.seed, folder=local)
        storage.put_folder(local, folder)
    storage.write_text(ready, json.dumps(wanted))  # last, so that a half-written folder is made again
