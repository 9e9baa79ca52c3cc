"""Runs inside Ray Serve's HTTP proxy, before Serve reads a request: keeps clients away from Serve's own control headers.

Only a RayService has that proxy (`deploy/rayobjects.py` sets this up there); `start_server` listens without it. Without this, a
request could switch off its own cancellation, set its own timeout (answered with 408 in plain text), or get a 500 for a header
that is not UTF-8.
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ullme_ray.serve.front:middlewares"}

_CONTROL_HEADERS = re.compile(rb"x-session-id|x-request-timeout-seconds|x-request-disconnect-disabled|serve-.*")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


class CleanHeaders:
    """Drops control headers, and a request id that is no plain word (Serve then makes one)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _is_clean(name, value)]}
        await self._app(scope, receive, send)


def _is_clean(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")  # Serve takes both spellings
    if name == b"x-request-id":
        return _REQUEST_ID.fullmatch(value) is not None
    return _CONTROL_HEADERS.fullmatch(name) is None


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy asks for at its start."""
    return [Middleware(CleanHeaders)]
