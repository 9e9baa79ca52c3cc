"""A backend whose answers a person can compute, for tests of the HTTP side: no Ray, no model.

A text has as many tokens as characters, each token's id is the character's code below 300, and its vector is made of its
length, its prompt and its direction, then scaled to length 1 unless the call says otherwise.
"""

from __future__ import annotations

import asyncio

import numpy as np

from ullme_ray.serve.schemas import (
    ApiError,
    DecodeCall,
    EmbedCall,
    EmbedReply,
    InputRefusedError,
    ServedModel,
    Token,
    TokenizeCall,
    TokenizeReply,
)

NAME = "tiny-search"
OTHER = "tiny-other"
MAX_TOKENS = 128
MODEL = ServedModel(
    name=NAME,
    fingerprint="f" * 64,
    dim=4,
    max_tokens=MAX_TOKENS,
    vocab_size=300,
    pooling="mean",
    dtype="float32",
    prompts={"query": "q: ", "passage": ""},
)


class FakeBackend:
    """Serves `NAME`; `open` holds answers back, `error` fails them, `cancelled` counts calls that were dropped.

    Models in `asleep` are described once `open` lets them, those in `dead` never.
    """

    def __init__(self, *names: str) -> None:
        self.names = list(names or (NAME,))
        self.calls: list[EmbedCall] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None
        self.cancelled = 0
        self.asleep: set[str] = set()
        self.dead: set[str] = set()
        self.fingerprint = MODEL.fingerprint

    def models(self) -> list[str]:
        return self.names

    async def describe(self, model: str, *, wake: bool = True) -> ServedModel:
        if self.error:
            raise self.error
        if model in self.dead or (model in self.asleep and not wake):
            raise ApiError(503, "no replica")
        if model in self.asleep:
            await self._until_open()
        return ServedModel(**{**vars(MODEL), "name": model, "fingerprint": self.fingerprint})

    async def embed(self, call: EmbedCall) -> EmbedReply:
        self.calls.append(call)
        await self._until_open()
        if self.error:
            raise self.error
        inputs = [[ord(c) % 300 for c in t] for t in call.texts] if call.texts is not None else call.token_ids or []
        for position, ids in enumerate(inputs):
            if len(ids) > MAX_TOKENS and not call.truncate:
                raise InputRefusedError("too_long", position, len(ids), MAX_TOKENS)
        kept = [ids[:MAX_TOKENS] if call.truncation_direction == "right" else ids[-MAX_TOKENS:] for ids in inputs]
        num_tokens = [len(ids) for ids in kept]
        if call.max_request_tokens is not None and sum(num_tokens) > call.max_request_tokens:
            raise InputRefusedError("too_many_tokens", 0, sum(num_tokens), call.max_request_tokens)
        if call.pool:
            vectors: np.ndarray | list[np.ndarray] = np.stack([self._vector(ids, call) for ids in kept])
        else:
            vectors = [np.stack([[token, position, 0, 1] for position, token in enumerate(ids)]).astype("f4") for ids in kept]
        return EmbedReply(
            vectors,
            num_tokens,
            num_truncated=sum(len(ids) > MAX_TOKENS for ids in inputs),
            seconds={"tokenization": 0.001, "queue": 0.002, "inference": 0.003},
            fingerprint=self.fingerprint,
        )

    async def _until_open(self) -> None:
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _vector(self, ids: list[int], call: EmbedCall) -> np.ndarray:
        vector = np.array([len(ids), call.prompt == "query", sum(ids) / 100, -1 / 3], "f4")[: call.dimensions]
        return vector / np.linalg.norm(vector) if call.normalize else vector

    async def tokenize(self, call: TokenizeCall) -> TokenizeReply:
        ends = [Token(0, "<s>", True, None, None)] if call.add_special_tokens else []
        prompt = MODEL.prompts[call.prompt]
        num_tokens = sum(len(ends) + len(prompt + text) for text in call.texts)
        if call.max_request_tokens is not None and num_tokens > call.max_request_tokens:
            raise InputRefusedError("too_many_tokens", 0, num_tokens, call.max_request_tokens)
        return TokenizeReply(
            [[*ends, *(Token(ord(c) % 300, c, False, i, i + 1) for i, c in enumerate(prompt + t))] for t in call.texts]
        )

    async def decode(self, call: DecodeCall) -> list[str]:
        return ["".join(chr(token) for token in ids if token or not call.skip_special_tokens) for ids in call.token_ids]

    async def load(self) -> dict[str, dict[str, float]]:
        return {name: {"replicas": 2, "queue_requests": 3, "queue_tokens": 45, "batches": 7} for name in self.names}
