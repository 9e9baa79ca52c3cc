"""The model replica: one process with the weights. Tokenizes in one thread, large texts in another; the forward has a third.

A module without torch at its top: the ingress imports it to name the class, and must stay small.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from ray import serve
from ray.serve.exceptions import RayServeException

from ullme_ray.errors import UllmeError
from ullme_ray.serve.batching import TokenBatcher
from ullme_ray.serve.models import Served, published_version
from ullme_ray.serve.schemas import (
    DecodeCall,
    EmbedCall,
    EmbedReply,
    InputRefusedError,
    ServedModel,
    Token,
    TokenizeCall,
    TokenizeReply,
)

if TYPE_CHECKING:
    from ullme_ray.serve.loaded import Lane, LoadedModel

logger = logging.getLogger("ray.serve")

# Tokenized in one go; between slices other requests get the thread. Of characters, or of token ids that come instead.
TEXTS_PER_SLICE = 64
CHARACTERS_PER_SLICE = 2**15
SWITCH_INTERVAL_S = 0.0005  # Python's 5 ms would keep the event loop waiting behind the forward's Python

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """What goes back to the ingress with every reply: the value, and how the replica fares."""

    value: Any  # a reply, or the InputRefusedError that answers bad input
    replica: str  # its id, which is Serve's own
    load: dict[str, float]


class Embedder:
    """Serves one model and the adapters over it.

    Raises:
        ModelError: the model cannot be loaded, or computes other vectors than when it was exported.
    """

    def __init__(self, served: Served) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        import torch

        settings = served.job.serve
        assert settings is not None
        if settings.gpus_per_replica == 0:
            torch.set_num_threads(settings.cpus_per_replica)
        elif settings.gpus_per_replica < 1:
            torch.cuda.set_per_process_memory_fraction(settings.gpus_per_replica)  # or one replica could starve the others
        self._served = served
        self._settings = settings
        self._id = _replica_id()
        self._loaded = self._load(settings.tokens_per_batch)
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._large_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize-large")
        self._is_in_doubt = False  # whether a forward failed since one was seen to work
        self._batcher = TokenBatcher(
            self._forward,
            tokens_per_batch=self._loaded.budget.tokens,
            wait_s=settings.batch_wait_ms / 1000,
            padded=self._loaded.encoder.packing is None,
        )
        if settings.reload_s:
            threading.Thread(target=self._watch, args=(settings.reload_s,), daemon=True, name="reload").start()

    def _load(self, tokens_per_batch: int | Literal["auto"]) -> LoadedModel:
        from ullme_ray.serve.loaded import LoadedModel

        settings = self._settings
        return LoadedModel(
            self._served,
            device=None if settings.gpus_per_replica else "cpu",
            tokens_per_batch=tokens_per_batch,
            warm_up=settings.warm_up,
        )

    def _watch(self, every_s: float) -> None:
        """Changes over to a newly published model: from one request to the next, with both in memory for a while.

        Requests that were tokenized for the old one are answered by it.
        """
        refused: Any = None
        while True:
            threading.Event().wait(every_s)
            try:
                version = published_version(self._served)
                if version is None or version in (self._loaded.version, refused):
                    continue
                refused = version  # unless it loads
                new = self._load(self._loaded.budget.tokens)  # timing it now would disturb those who are served
                new.budget.positions += self._loaded.budget.positions
                self._loaded = new
                logger.warning("%s: now serving %s", self._served.name, self._loaded.encoder.fingerprint[:12])
            except UllmeError as error:
                logger.error("%s: the newly published model is not served, the old one stays: %s", self._served.name, error)
            except Exception as error:  # noqa: BLE001 - such as memory that does not hold two models; the old one must go on
                logger.error("%s: the newly published model is not served, the old one stays: %r", self._served.name, error)

    async def embed(self, call: EmbedCall) -> Answer:
        """Vectors of one request, batched with those of others; its rows leave the queue when it is cancelled or too late."""
        try:
            async with asyncio.timeout(call.deadline_s):
                return self._answer(await self._embed(call))
        except InputRefusedError as error:
            return self._answer(error)

    async def _embed(self, call: EmbedCall) -> EmbedReply:
        loop, loaded = asyncio.get_running_loop(), self._loaded
        began = loop.time()
        slices = await self._tokenize(call, loaded)
        input_ids = [ids for tokens in slices for ids in tokens.input_ids]
        num_tokens = [len(ids) for ids in input_ids]
        if call.max_request_tokens is not None and sum(num_tokens) > call.max_request_tokens:
            raise InputRefusedError("too_many_tokens", 0, sum(num_tokens), call.max_request_tokens)
        seconds = {"tokenization": loop.time() - began}
        form = "tokens" if not call.pool else "unit" if call.normalize else "pooled"
        lane = loaded.lane(call.model, slices[0].prompt_length, form)  # type: ignore[arg-type]
        rows = await self._batcher.submit(input_ids, lane, seconds=seconds)
        return EmbedReply(
            _finished(np.stack(rows), call) if call.pool else rows,
            num_tokens=num_tokens,
            num_truncated=sum(sum(tokens.truncated) for tokens in slices),
            seconds=seconds,
            fingerprint=loaded.fingerprints[call.model],
        )

    async def _tokenize(self, call: EmbedCall, loaded: LoadedModel) -> list[Any]:
        """The request's `Tokens`, slice by slice.

        Raises:
            InputRefusedError: a text is too long, and may not be cut.
        """
        keep: Any = "start" if call.truncation_direction == "right" else "end"

        def tokenize(tokenizer: Any, start: int, part: Any) -> Any:
            if call.token_ids is not None:
                tokens = tokenizer.wrap_ids(part, keep=keep)
            else:
                tokens = tokenizer.tokenize(part, call.prompt, keep=keep)
            if not call.truncate and any(tokens.truncated):
                at = tokens.truncated.index(True)
                size = len(part[at]) if call.token_ids is not None else tokenizer.count(part[at], call.prompt)
                raise InputRefusedError("too_long", start + at, size, tokenizer.max_tokens)
            return tokens

        inputs: Sequence[Any] = call.token_ids if call.token_ids is not None else call.texts or []
        return await self._by_slice(loaded, inputs, tokenize)

    async def _by_slice(
        self, loaded: LoadedModel, inputs: Sequence[Any], work: Callable[[Any, int, Any], Result]
    ) -> list[Result]:
        """`work(tokenizer, start, part)` for one part of the inputs after the other; `start` numbers its first one."""
        loop, results = asyncio.get_running_loop(), []
        for start, stop in _slices(inputs):
            part = inputs[start:stop]
            if sum(map(len, part)) > CHARACTERS_PER_SLICE:
                thread, tokenizer = self._large_thread, loaded.large_tokenizer
            else:
                thread, tokenizer = self._tokenizer_thread, loaded.encoder.tokenizer
            results.append(await loop.run_in_executor(thread, work, tokenizer, start, part))
        return results

    async def tokenize(self, call: TokenizeCall) -> Answer:
        """Every text's tokens as the model sees them, prompt included, none cut off."""
        num_tokens = 0

        def tokenize(tokenizer: Any, _: int, part: list[str]) -> list[list[Token]]:
            nonlocal num_tokens
            texts = [tokenizer.prompts[call.prompt] + text for text in part]
            encodings = tokenizer.hf(texts, add_special_tokens=call.add_special_tokens, verbose=False).encodings
            num_tokens += sum(len(encoding.ids) for encoding in encodings)
            if call.max_request_tokens is not None and num_tokens > call.max_request_tokens:
                raise InputRefusedError("too_many_tokens", 0, num_tokens, call.max_request_tokens)
            return [_tokens(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

        try:
            parts = await self._by_slice(self._loaded, call.texts, tokenize)
        except InputRefusedError as error:
            return self._answer(error)
        return self._answer(TokenizeReply([tokens for part in parts for tokens in part]))

    async def decode(self, call: DecodeCall) -> Answer:
        """The text of each list of ids."""

        def decode(tokenizer: Any, _: int, part: list[list[int]]) -> list[str]:
            return [tokenizer.hf.decode(ids, skip_special_tokens=call.skip_special_tokens) for ids in part]

        parts = await self._by_slice(self._loaded, call.token_ids, decode)
        return self._answer([text for part in parts for text in part])

    async def check_health(self) -> None:
        """Asked by Serve, which replaces this process once it raises a few times in a row.

        A forward pass that failed may have failed for its texts. What tells is one of a single token: after a CUDA error, for
        one, every pass of this process fails.
        """
        if self._is_in_doubt:
            self._is_in_doubt = False  # until that one fails too
            token = 1 % self._loaded.encoder.tokenizer.hf.vocab_size
            await self._batcher.run_at_once([[token]], self._loaded.lane(self._served.name, 0, "unit"))

    def _forward(self, input_ids: list[list[int]], lane: Lane) -> Any:
        try:
            return lane.forward(input_ids)
        except Exception:
            self._is_in_doubt = True
            raise

    async def describe(self, model: str) -> Answer:
        import torch
        import transformers

        import ullme_ray

        loaded = self._loaded
        encoder, settings = loaded.encoder, loaded.encoder.settings
        return self._answer(
            ServedModel(
                name=model,
                fingerprint=loaded.fingerprints[model],
                dim=encoder.dim,
                max_tokens=settings.max_tokens,
                tokens_per_batch=loaded.budget.tokens,
                vocab_size=int(encoder.backbone.get_input_embeddings().num_embeddings),
                pooling=settings.pooling,
                dtype=settings.dtype,
                prompts=dict(encoder.tokenizer.prompts),
                created=loaded.created,
                parent=self._served.name if model != self._served.name else None,
                versions={
                    "ullme_ray": ullme_ray.__version__,
                    "torch": str(torch.__version__),  # a TorchVersion would make the ingress import torch
                    "transformers": transformers.__version__,
                },
            )
        )

    def _answer(self, value: Any) -> Answer:
        work = self._batcher.work
        load = {
            "queue_requests": self._batcher.waiting_requests,
            "queue_tokens": self._batcher.waiting_tokens,
            "batches": work.batches,
            "batch_rows": work.rows,
            "batch_tokens": work.tokens,
            "padded_tokens": self._loaded.budget.positions,
            "inference_seconds": work.forward_s,
        }
        return Answer(value, self._id, load)


def _replica_id() -> str:
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:  # a test without Serve
        return uuid.uuid4().hex


def _slices(inputs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Where slices begin and end; a text longer than a slice is one."""
    start = size = 0
    for position, item in enumerate(inputs):
        if position > start and (position - start == TEXTS_PER_SLICE or size + len(item) > CHARACTERS_PER_SLICE):
            yield start, position
            start, size = position, 0
        size += len(item)
    yield start, len(inputs)


def _finished(vectors: np.ndarray, call: EmbedCall) -> np.ndarray:
    """(N, D) float32 rows, cut to the dimensions asked for."""
    if call.dimensions is not None and call.dimensions < vectors.shape[1]:
        vectors = vectors[:, : call.dimensions]
        if call.normalize:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _tokens(text: str, encoding: Any) -> list[Token]:
    return [
        Token(id, name if special else text[start:stop], bool(special), *((None, None) if special else (start, stop)))
        for id, name, special, (start, stop) in zip(
            encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
        )
    ]
