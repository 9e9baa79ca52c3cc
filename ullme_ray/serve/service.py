"""What the routes of both APIs share: the served models, the limits, and the way to the backend."""

from __future__ import annotations

import asyncio
import contextlib
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

    async def model(self, request: Request, name: str | None) -> ServedModel:
        """What a replica said of the model; asked once, and again after it was replaced. A sleeping one is woken.

        Raises:
            ApiError: as `known_name`, 503 where no replica answers, or 504 at the request's deadline.
            ClientGoneError: the client hung up.
        """
        name = self.known_name(name)
        if name not in self._known:
            await self._describe(request, name)
        return self._known[name]

    async def described(self) -> list[ServedModel]:
        """What the backend knows of the models, for pages: those that sleep or do not answer are left out."""
        found: dict[str, ServedModel] = {}

        async def ask(name: str) -> None:
            with contextlib.suppress(ApiError):
                found[name] = await self.backend.describe(name, wake=False)

        await asyncio.gather(*map(ask, self.names))
        return [found[name] for name in self.names if name in found]

    async def check_health(self, request: Request) -> None:
        """Raises ApiError (503) unless a replica of the default model has loaded it and computed its probe's vectors."""
        await self._describe(request, self.names[0])

    async def _describe(self, request: Request, name: str) -> None:
        self._known[name] = await self.before_deadline(request, lambda _: self.backend.describe(name))

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
            raise refused(error, param, dialect) from None
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


def refused(error: InputRefusedError, param: str, dialect: Dialect) -> ApiError:
    return bad(param, str(error), dialect, code=error.reason, status=dialect.too_much)
