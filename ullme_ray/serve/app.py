"""The HTTP side: a small process without torch that checks, limits and forwards requests, and answers in OpenAI's form.

It is apart from the model so that a model replica's death cuts no connection: embedding is idempotent, so it asks again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import ullme_ray
from ullme_ray.serve.backend import overloaded
from ullme_ray.serve.keys import KeyRing
from ullme_ray.serve.schemas import (
    ApiError,
    Backend,
    EmbedCall,
    EmbeddingRequest,
    ServedModel,
    embedding_answer,
    parse_body,
    to_call,
)
from ullme_ray.spec.job import ServeSpec

BODY_TIMEOUT_S = 60.0  # a client that sends no more must not hold its place among the requests for ever
LARGE_BYTES = 64 * 1024  # work on a body or answer above this leaves the event loop
OPEN_PATHS = ("/health",)  # answered without a key

Result = TypeVar("Result")


def create_api(name: str, settings: ServeSpec, backend: Backend) -> FastAPI:
    """The routes. `name` is what the served model is called.

    Raises:
        UllmeError: the API keys cannot be read.
    """
    api = FastAPI(
        title=f"Embeddings of {name}", version=ullme_ray.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    api.add_middleware(RequireKey, keys=KeyRing(settings.api_keys))
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_error)
    api.add_exception_handler(Exception, _answer_unexpected)
    admit = Admission(settings.max_queued_requests)
    listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "ullme_ray"}
    known: list[ServedModel] = []  # the model, once asked for

    async def served_model() -> ServedModel:
        if not known:
            known[:] = [await backend.describe(name)]
        return known[0]

    @api.post("/v1/embeddings", openapi_extra={"requestBody": _request_schema()})
    async def embeddings(request: Request) -> Response:
        with admit:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    raw = await read_body(request, settings.max_body_bytes)
            except TimeoutError:
                raise ApiError(408, f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None
            model = await served_model()

            def check() -> tuple[EmbeddingRequest, EmbedCall]:
                body = parse_body(raw)
                return body, to_call(body, model, max_inputs=settings.max_inputs)

            body, call = await _off_loop(check, large=len(raw) > LARGE_BYTES)
            reply = await backend.embed(call)

            def write() -> bytes:
                return embedding_answer(reply, model=name, encoding_format=body.encoding_format)

            answer = await _off_loop(write, large=sum(row.nbytes for row in reply.vectors) > LARGE_BYTES)
        headers = {"x-truncated-inputs": str(reply.num_truncated)}
        return Response(answer, media_type="application/json", headers=headers)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @api.get("/v1/models/{model}")
    async def one_model(model: str) -> dict[str, Any]:
        if model != name:
            raise ApiError(404, f"this server has {name!r} only", param="model", code="model_not_found")
        return listed

    @api.get("/health")
    async def health() -> dict[str, str]:
        """200 once a replica has loaded the model and computed the export's own vectors; 503 before."""
        known[:] = [await backend.describe(name)]
        return {"status": "ok"}

    @api.get("/info")
    async def info() -> dict[str, Any]:
        return asdict(await backend.describe(name))

    return api


class Admission:
    """Counts the requests being served and refuses one too many, before its body is read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0

    def __enter__(self) -> None:
        if self._inside >= self._limit:
            raise overloaded()
        self._inside += 1

    def __exit__(self, *_: object) -> None:
        self._inside -= 1


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes: a larger one is refused by its announced length, or once it passes the limit.

    Raises:
        ApiError: 413 for too large a body, 415 for one that is not plain JSON.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the request with content-type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the request without content-encoding")
    too_large = ApiError(413, f"the request body is larger than {limit} bytes; send fewer texts at once")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def _off_loop(work: Callable[[], Result], *, large: bool) -> Result:
    """Runs `work` here if it is quick, else in a thread."""
    return await asyncio.to_thread(work) if large else work()


class RequireKey:
    """Answers 401 to whoever has no key, before any route sees the request."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not self._keys.accepts(given):
                missing = "no API key was given" if not given else "the API key is not valid"
                error = ApiError(
                    401,
                    f"{missing}; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await _json(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _json(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such route", 405: "this route has no such method"}.get(error.status_code, str(error.detail))
    return _json(ApiError(error.status_code, f"{request.method}: {message}", headers=dict(error.headers or {})))


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    """The cause goes to the replica's log, never to the client."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return _json(ApiError(500, "the server failed on this request; its log says why", kind="server_error"))


def _request_schema() -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": EmbeddingRequest.model_json_schema()}}}
