"""The model replica: one process with the weights. Tokenizes in one thread, runs the forward in another.

A module without torch at its top: the ingress imports it to name the class, and must stay small.
"""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ullme_ray.errors import ModelError
from ullme_ray.serve.batching import TokenBatcher
from ullme_ray.serve.schemas import EmbedCall, EmbedReply, ServedModel
from ullme_ray.spec.job import JobSpec

TEXTS_PER_SLICE = 64  # tokenized in one go; between slices other requests get the thread


class Embedder:
    """Serves one model. Exists only once the weights are loaded and gave the vectors stored with the export.

    Raises:
        ModelError: the model cannot be loaded, or computes other vectors than when it was exported.
    """

    def __init__(self, job: JobSpec) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import torch

        from ullme_ray.model import open_encoder

        assert job.serve is not None
        if job.serve.gpus_per_replica == 0:
            torch.set_num_threads(job.serve.cpus_per_replica)
        self._job = job
        self._created = int(time.time())
        self._encoder = open_encoder(job, device=None if job.serve.gpus_per_replica else "cpu")
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._tokens_per_batch = job.serve.tokens_per_batch
        self._batcher = TokenBatcher(
            self._forward, tokens_per_batch=job.serve.tokens_per_batch, wait_s=job.serve.batch_wait_ms / 1000
        )

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Vectors of one request, batched with those of others."""
        slices = (
            [self._encoder.tokenizer.wrap_ids(call.token_ids)] if call.token_ids is not None else await self._tokenize(call)
        )
        input_ids = [ids for tokens in slices for ids in tokens.input_ids]
        vectors = await self._batcher.submit(input_ids, slices[0].prompt_length)
        if call.dimensions is not None and call.dimensions < self._encoder.dim:
            vectors = vectors[:, : call.dimensions]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return EmbedReply(
            vectors.astype(np.float32, copy=False),
            num_tokens=[len(ids) for ids in input_ids],
            num_truncated=sum(sum(tokens.truncated) for tokens in slices),
            fingerprint=self._encoder.fingerprint,
        )

    def describe(self, model: str) -> ServedModel:
        import torch
        import transformers

        import ullme_ray

        settings = self._encoder.settings
        return ServedModel(
            name=self._job.name,
            fingerprint=self._encoder.fingerprint,
            dim=self._encoder.dim,
            max_tokens=settings.max_tokens,
            vocab_size=int(self._encoder.backbone.get_input_embeddings().num_embeddings),
            pooling=settings.pooling,
            dtype=settings.dtype,
            prompts=dict(self._encoder.tokenizer.prompts),
            created=self._created,
            versions={
                "ullme_ray": ullme_ray.__version__,
                "torch": str(torch.__version__),  # a TorchVersion would make the ingress import torch
                "transformers": transformers.__version__,
            },
        )

    async def _tokenize(self, call: EmbedCall) -> list[Any]:
        loop, texts = asyncio.get_running_loop(), call.texts or []
        return [
            await loop.run_in_executor(
                self._tokenizer_thread,
                self._encoder.tokenizer.tokenize,  # type: ignore[arg-type]
                texts[start : start + TEXTS_PER_SLICE],
                call.prompt,
            )
            for start in range(0, len(texts), TEXTS_PER_SLICE)
        ]

    def _forward(self, input_ids: list[list[int]], prompt_length: int) -> np.ndarray:
        from ullme_ray.model import Tokens

        tokens = Tokens(input_ids, prompt_length, [False] * len(input_ids))
        vectors = self._encoder.embed_tokens(tokens, tokens_per_batch=self._tokens_per_batch)
        if not np.isfinite(vectors).all():
            raise ModelError("the model computed a vector that is not finite")
        return vectors
