"""What the routes of both APIs share: the served models, the limits, and the way to the backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from ullme_ray.serve.access import Record
from ullme_ray.serve.answers import Dialect
from ullme_ray.serve.limits import Admission, timeout_of, too_late, unless_gone
from ullme_ray.serve.parsing import bad, shortened
from ullme_ray.serve.schemas import ApiError, Backend, EmbedCall, EmbedReply, InputRefusedError, ServedModel
from ullme_ray.spec.job import ServeSpec

Result = TypeVar("Result")


class Service:
    """One per process that listens."""

    def __init__(self, settings: ServeSpec, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend
        self.names = backend.models()
        self.started = int(time.time())
        self.admission = Admission(settings.max_queued_requests, settings.max_body_bytes)
        self._known: dict[str, ServedModel] = {}

    def admitted(self, request: Request) -> AbstractAsyncContextManager[bytes]:
        """A place among the requests, and the body; see `Admission`."""
        return self.admission.admitted(request)

    def known_name(self, name: str | None) -> str:
        """The name, or the default model's for None.

        Raises:
            ApiError: 404, no model is served under it.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            served = ", ".join(repr(served) for served in self.names)
            message = f"the model {shortened(name)!r} does not exist; this server has {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    async def model(self, name: str | None) -> ServedModel:
        """What a replica said of the model; asked once, and again after it was replaced.

        Raises:
            ApiError: as `known_name`, or 503 where no replica answers.
        """
        name = self.known_name(name)
        if name not in self._known:
            self._known[name] = await self.backend.describe(name)
        return self._known[name]

    async def check_health(self) -> None:
        """Raises ApiError (503) unless a replica of the default model has loaded it and computed its probe's vectors."""
        self._known[self.names[0]] = await self.backend.describe(self.names[0])

    async def embed(self, request: Request, call: EmbedCall, param: str, dialect: Dialect) -> EmbedReply:
        """The backend's answer, unless the client hangs up or the deadline passes; then the work is dropped.

        Raises:
            ApiError: 504 at the deadline, the dialect's code for too many tokens, or the backend's.
            ClientGoneError: the client hung up.
        """
        record: Record = request.state.record
        record.model = call.model
        record.num_inputs = len(call.texts if call.texts is not None else call.token_ids or [])
        try:
            reply = await self.before_deadline(request, lambda left: self.backend.embed(replace(call, deadline_s=left)))
        except InputRefusedError as error:
            raise bad(param, str(error), dialect, code=error.reason, status=dialect.too_much) from None
        record.num_tokens, record.num_truncated, record.seconds = sum(reply.num_tokens), reply.num_truncated, reply.seconds
        known = self._known.get(call.model)
        if known and reply.fingerprint not in ("", known.fingerprint):
            del self._known[call.model]  # a new export was published; ask again what it is
        return reply

    async def before_deadline(self, request: Request, work: Callable[[float], Awaitable[Result]]) -> Result:
        """Result of `work(seconds left)`; see `embed`."""
        record: Record = request.state.record
        left = timeout_of(request, self.settings.request_timeout_s) - record.elapsed_s
        if left <= 0:
            raise too_late()
        try:
            async with asyncio.timeout(left):
                return await unless_gone(request, work(left))
        except TimeoutError:
            raise too_late() from None

    def headers(self, reply: EmbedReply) -> dict[str, str]:
        return {"x-truncated-inputs": str(reply.num_truncated), "x-model-fingerprint": reply.fingerprint[:16]}
