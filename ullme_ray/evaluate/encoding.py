"""Encodes texts in Ray actors, a chunk at a time; vectors come back as they are done, so nothing has to be held twice.

One actor per free GPU, else a few CPU actors. It never waits for a core that does not come: where all are taken, a single
actor runs beside whatever holds them.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from ullme_ray.errors import ModelError, UllmeError
from ullme_ray.evaluate.others import OtherEncoder
from ullme_ray.model import Encoder, open_encoder
from ullme_ray.model.encoder import Which
from ullme_ray.model.tokenizing import PromptName
from ullme_ray.progress import Progress
from ullme_ray.spec import JobSpec, absolute_paths
from ullme_ray.spec.evaluation import OtherModelSpec

CHUNK_TEXTS = 256
MAX_CPU_ACTORS = 4  # every actor holds the whole model
MAX_RESTARTS = 2
SETTLE_S = 5.0  # how long cores of a stage that just ended may take to be reported free
NOTE_AFTER_S = 30.0

Model = Which | OtherModelSpec  # of the job, or any other


class _EncodeActor:
    """Holds one encoder at a time. Every call names the model it wants, so that Ray can restart the actor after a crash.

    And its fingerprint: an actor that starts late, or again on another machine, must not give vectors of another model.
    """

    def __init__(self, job: JobSpec, device: str | None) -> None:
        self._job, self._device = job, device
        self._which: Model | None = None
        self._encoder: Encoder | OtherEncoder | None = None

    def load(self, which: Model, fingerprint: str) -> None:
        """Loads a model in place of the one before."""
        self._open(which, fingerprint)

    def encode(self, which: Model, fingerprint: str, texts: list[str], prompt: PromptName) -> np.ndarray:
        return self._open(which, fingerprint).encode(texts, prompt)

    def encode_prompted(self, which: Which, fingerprint: str, texts: list[str], prompt: str) -> np.ndarray:
        """Vectors of texts under any prompt."""
        encoder = self._open(which, fingerprint)
        assert isinstance(encoder, Encoder)
        return encoder.encode_prompted(texts, prompt)

    def _open(self, which: Model, fingerprint: str) -> Encoder | OtherEncoder:
        if self._encoder is None or self._which != which:
            self._encoder = None  # its memory goes first
            if isinstance(which, OtherModelSpec):
                self._encoder = OtherEncoder(self._job, which, self._device)
            else:
                self._encoder = open_encoder(self._job, which=which, device=self._device)
            self._which = which
        if self._encoder.fingerprint != fingerprint:
            raise ModelError(
                f"a Ray worker loads another model (fingerprint {self._encoder.fingerprint[:12]}) than this machine "
                f"({fingerprint[:12]}); give all machines the same model folder, or keep it on s3://"
            )
        return self._encoder


class EncoderPool:
    """Actors that encode with one model after another, for starting a process costs more than loading a small model.

    The first `load` starts them; leaving the `with` block ends them.

    Args:
        num_texts: about how many texts will come for one model; few texts start few actors.
    """

    def __init__(self, job: JobSpec, *, num_texts: int) -> None:
        self._job = job
        self._num_texts = num_texts
        self._actors: list[Any] = []
        self._loading: dict[Any, Any] = {}
        self._idle: list[Any] = []

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for actor in self._idle:
            ray.kill(actor)
        # One in the middle of a call ends after it: killing it would make Ray tell the user that it tries the call again.
        self._actors, self._idle, self._loading = [], [], {}

    def load(self, which: Model, fingerprint: str) -> None:
        """Makes this the model of all later calls.

        Args:
            fingerprint: of the model that the caller means; an actor that loads another one is an error.
        """
        if not self._actors:
            self._start()
        self._which, self._fingerprint = which, fingerprint
        self._loading = {actor.load.remote(which, fingerprint): actor for actor in self._actors}
        self._idle = []

    def _start(self) -> None:
        actor_class = ray.remote(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(_EncodeActor)
        located = absolute_paths(self._job)
        self._actors = [
            actor_class.options(**reserved).remote(located, None if "num_gpus" in reserved else "cpu")
            for reserved in actor_options(num_chunks=-(-self._num_texts // CHUNK_TEXTS))
        ]

    def ready(self, progress: Progress) -> list[Any]:
        """The actors themselves, once at least one has loaded the model; the others take calls while they still load.

        Raises:
            ModelError: the model cannot be loaded in an actor.
        """
        while not self._idle:
            done, _ = ray.wait(list(self._loading), num_returns=1, timeout=NOTE_AFTER_S)
            if not done:
                progress.note("still loading the model, or waiting for the cluster to place its first actor")
            for reference in done:
                self._loaded(reference)
        return list(self._actors)

    def encode(self, texts: Sequence[str], prompt: PromptName, progress: Progress) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers into `texts`, their vectors), chunk by chunk, in any order; chunks are of texts of like length.

        Raises:
            ModelError: the model cannot be loaded in an actor.
        """
        order = np.array(sorted(range(len(texts)), key=lambda row: -len(texts[row])), dtype=np.int64)
        chunks = deque(order[start : start + CHUNK_TEXTS] for start in range(0, len(order), CHUNK_TEXTS))
        running: dict[Any, tuple[Any, np.ndarray]] = {}
        while chunks or running:
            while chunks and self._idle:
                actor, rows = self._idle.pop(), chunks.popleft()
                chunk = [texts[row] for row in rows]
                running[actor.encode.remote(self._which, self._fingerprint, chunk, prompt)] = actor, rows
            done, _ = ray.wait([*running, *self._loading], num_returns=1, timeout=NOTE_AFTER_S)
            if not done and not running:
                progress.note("still loading the model, or waiting for the cluster to place its first actor")
            for reference in done:
                if reference in self._loading:
                    self._loaded(reference)
                else:
                    actor, rows = running.pop(reference)
                    vectors = get_or_raise(reference)
                    self._idle.append(actor)
                    yield rows, vectors

    def _loaded(self, reference: Any) -> None:
        actor = self._loading.pop(reference)
        get_or_raise(reference)
        self._idle.append(actor)


def get_or_raise(reference: Any) -> Any:
    """`ray.get`, with our own errors as they were raised.

    Raises:
        ModelError: the actor died more often than Ray restarts it.
    """
    try:
        return ray.get(reference)
    except RayActorError as error:
        raise ModelError(
            f"a process that encodes died, also after {MAX_RESTARTS} restarts, as one does for lack of memory; "
            "give the machine more memory, or lower model.max_tokens"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, UllmeError):
            raise error.cause from None
        raise


def actor_options(num_chunks: int) -> list[dict[str, Any]]:
    """What each actor reserves, one entry an actor."""
    gpus = int(_free("GPU", num_chunks))
    if gpus:
        return [{"num_gpus": 1, "num_cpus": 0}] * max(1, min(gpus, num_chunks))
    one_machine = len(ray.nodes()) == 1  # a local Ray may have been told of more CPUs than there are
    most = min(MAX_CPU_ACTORS, os.cpu_count() or 1) if one_machine else MAX_CPU_ACTORS
    wanted = max(1, min(num_chunks, most))
    cpus = int(_free("CPU", wanted))
    return [{"num_cpus": 1}] * min(wanted, cpus) if cpus else [{"num_cpus": 0}]


def _free(resource: str, wanted: int) -> float:
    """Free units of a resource, after giving a stage that just ended a moment to let go of them."""
    wanted = min(wanted, int(ray.cluster_resources().get(resource, 0)))
    deadline = time.monotonic() + SETTLE_S
    while (free := float(ray.available_resources().get(resource, 0.0))) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return free
