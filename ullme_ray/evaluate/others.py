"""Any sentence-transformers model beside the job's own, run by that library itself: what its authors published is measured."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ullme_ray.errors import ModelError
from ullme_ray.model import base_folder
from ullme_ray.model.tokenizing import PromptName
from ullme_ray.spec.evaluation import OtherModelSpec
from ullme_ray.spec.job import JobSpec, ModelSpec

_COUNTED = (".safetensors", ".bin", ".json", ".txt", ".model", ".py")  # files that decide a vector


class OtherEncoder:
    """Encodes as `Encoder` does. Code that comes with a model is never run: the job trusts its own base alone."""

    def __init__(self, job: JobSpec, spec: OtherModelSpec, device: str | None) -> None:
        from sentence_transformers import SentenceTransformer

        folder = other_folder(job, spec)
        try:
            self._model: Any = SentenceTransformer(folder, device=device, local_files_only=True)
        except Exception as error:  # the library raises many kinds for a folder that is no model of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"evaluate.models: {spec.base} is no sentence-transformers model ({reason})") from error
        self._prompts = spec.prompts
        self.fingerprint = other_fingerprint(job, spec)

    def encode(self, texts: list[str], prompt: PromptName) -> np.ndarray:
        """(N, D) float32: of unit length, unless the model says that its vectors compare by their inner product."""
        encode = self._model.encode_query if prompt == "query" else self._model.encode_document
        given: dict[str, Any] = {"prompt": getattr(self._prompts, prompt)} if self._prompts is not None else {}
        vectors = encode(
            texts,
            normalize_embeddings=self._model.similarity_fn_name != "dot",
            show_progress_bar=False,
            convert_to_numpy=True,
            **given,
        )
        return np.asarray(vectors, np.float32)


def other_folder(job: JobSpec, spec: OtherModelSpec) -> str:
    """Local folder of the model.

    Raises:
        ModelError: it cannot be found or fetched.
    """
    model = ModelSpec(base=spec.base, revision=spec.revision, hub_token=job.model.hub_token)
    try:
        return base_folder(job.model_copy(update={"model": model, "train": None}))
    except ModelError as error:
        raise ModelError(f"evaluate.models: {error}") from error


def other_fingerprint(job: JobSpec, spec: OtherModelSpec) -> str:
    """sha256 over the model's files and the prompts: equal fingerprints give equal vectors."""
    folder = Path(other_folder(job, spec))
    prompts = spec.prompts.model_dump() if spec.prompts else None
    digest = hashlib.sha256(json.dumps(["sentence-transformers", prompts]).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in _COUNTED and path.is_file():
            stat = os.stat(path)
            digest.update(str(path.relative_to(folder)).encode() + _digest(str(path), stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _digest(path: str, num_bytes: int, mtime_ns: int) -> bytes:
    """Hash of a file's content; size and time are part of the key so that a changed file is read again."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
