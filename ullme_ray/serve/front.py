"""Runs inside Ray Serve's HTTP proxy, before Serve reads a request: keeps clients away from Serve's own control headers, and
Serve from sending the request's id a second time.

Only a RayService has that proxy (`deploy/rayobjects.py` sets this up there, by `CALLBACK` in its pods' environment);
`start_server` listens without it. Without this, a request could switch off its own cancellation, set its own timeout (answered
with 408 in plain text), or get a 500 for a header that is not UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Ray Serve's limit of a message between its processes, 4 MiB if nobody says otherwise; each reads it at its start. This is the
# most that gRPC can send: how large requests and answers become is bounded by our own limits, of bodies, inputs and tokens.
MESSAGES = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}
CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ullme_ray.serve.front:middlewares", **MESSAGES}

_CONTROL_HEADERS = re.compile(rb"x-session-id|x-request-timeout-seconds|x-request-disconnect-disabled|serve-.*")
_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


class CleanHeaders:
    """Drops control headers, and a request id that is no plain word (Serve then makes one); an answer has one request id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _is_clean(name, value)]}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": list(_with_one_id(message.get("headers", ())))}
            await send(message)

        await self._app(scope, receive, answer)


def _with_one_id(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The headers with the first request id only: the ingress's own, to which Serve adds its."""
    has_id = False
    for name, value in headers:
        is_id = name.lower() == _ID_HEADER
        if not (is_id and has_id):
            yield name, value
        has_id = has_id or is_id


def _is_clean(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")  # Serve takes both spellings
    if name == _ID_HEADER:
        return _REQUEST_ID.fullmatch(value) is not None
    return _CONTROL_HEADERS.fullmatch(name) is None


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy asks for at its start."""
    return [Middleware(CleanHeaders)]
