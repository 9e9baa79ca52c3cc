"""What keeps a request from harming others: how many may be inside, how much they hold, how long they take, who still waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ullme_ray.serve.answers import json_error
from ullme_ray.serve.schemas import ApiError
from ullme_ray.spec.job import ServeSpec

BODY_TIMEOUT_S = 60.0  # a client that sends no more must not hold its place among the requests for ever
BODIES_HELD = 32  # largest bodies in memory at once; 429 beyond it
LARGE_BYTES = 64 * 1024  # work on a body or answer above this leaves the event loop
RETRY_AFTER_S = 1
TIMEOUT_HEADER = "x-timeout-ms"

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client hung up; nobody reads an answer."""


class Admission:
    """Counts the requests being served and the bytes of their bodies; refuses what would be one too many.

    Args:
        max_requests: refused before their body is read.
        max_body_bytes: of one body.
    """

    def __init__(self, max_requests: int, max_body_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_body_bytes = max_body_bytes
        self.num_requests = 0
        self.num_bytes = 0

    @property
    def is_full(self) -> bool:
        return self.num_requests >= self._max_requests

    @asynccontextmanager
    async def admitted(self, request: Request) -> AsyncIterator[bytes]:
        """Holds a place for the request as long as the block runs, and gives its body.

        Raises:
            ApiError: 429 without a place, else as `_read`.
        """
        if self.is_full:
            raise overloaded()
        self.num_requests += 1
        held: list[int] = []
        try:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    raw = await self._read(request, held)
            except TimeoutError:
                raise ApiError(408, f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None
            yield raw
        finally:
            self.num_requests -= 1
            self.num_bytes -= sum(held)

    async def _read(self, request: Request, held: list[int]) -> bytes:
        """The body: a larger one than allowed is refused by its announced length, or once it passes the limit.

        Raises:
            ApiError: 413 for too large a body, 415 for one that is not plain JSON, 429 where the others fill the memory.
        """
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the request with content-type: application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "send the request without content-encoding")
        limit = self._max_body_bytes
        too_large = ApiError(413, f"the request body is larger than {limit} bytes; send fewer texts at once")
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
            raise too_large
        chunks = []
        async for chunk in request.stream():
            held.append(len(chunk))
            self.num_bytes += len(chunk)
            if sum(held) > limit:
                raise too_large
            if self.num_bytes > BODIES_HELD * limit:
                raise overloaded()
            chunks.append(chunk)
        return b"".join(chunks)


class RefuseOverload:
    """Answers 429 where there is no place, before FastAPI looks for the route, which costs more than all the rest of a refusal.

    Args:
        paths: whose POST requests take a place. The routes ask for it themselves, for what passes here.
    """

    def __init__(self, app: ASGIApp, admission: Admission, paths: Collection[str]) -> None:
        self._app, self._admission, self._paths = app, admission, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and self._admission.is_full
            and (path := scope["path"]) in self._paths
        ):
            scope["state"]["record"].route = path
            await json_error(overloaded(), path)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def overloaded() -> ApiError:
    return ApiError(
        429,
        "the server has as many requests as it can queue; try again later",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )


def longest_request_s(settings: ServeSpec) -> float:
    """How long a request may be running, which is how long a process that is told to end waits for those it has."""
    return max(settings.request_timeout_s, BODY_TIMEOUT_S)


def timeout_of(request: Request, longest_s: float) -> float:
    """Seconds that the request may take in all: the server's limit, or less where the client says so.

    Raises:
        ApiError: the header is no whole number above 0.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest_s
    if not (given.isascii() and given.isdigit() and len(given) <= 9 and int(given) > 0):
        raise ApiError(400, f"header {TIMEOUT_HEADER} must be a whole number of milliseconds above 0")
    return min(longest_s, int(given) / 1000)


def too_late() -> ApiError:
    return ApiError(504, "the request was not done by its deadline", kind="server_error", code="deadline_exceeded")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The work's result. It is cancelled as soon as the client hangs up; its body must have been read.

    Raises:
        ClientGoneError: the client hung up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def off_loop(work: Callable[[], Result], *, size: int) -> Result:
    """Runs `work` on `size` bytes here if it is quick, else in a thread."""
    return await asyncio.to_thread(work) if size > LARGE_BYTES else work()
