"""Around every request: who asks (key, rate), under which id, how it ended (log, metrics). No text of a request is kept.

The access log is one JSON object a line, on the logger `ullme_ray.serve.access`. The ingress writes it to
`access-<pid>.jsonl` in Ray Serve's folder of logs.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ullme_ray.serve.answers import dialect_of, json_error
from ullme_ray.serve.keys import KeyRing, RateLimit
from ullme_ray.serve.limits import ClientGoneError
from ullme_ray.serve.schemas import ApiError

logger = logging.getLogger("ray.serve")
access_log = logging.getLogger("ullme_ray.serve.access")

OPEN_ROUTES = ("/", "/health")  # GET is answered without a key; the page holds nothing, it asks with the key typed in
CLIENT_GONE = 499  # nginx's number; nobody sees it but the log
LOG_BYTES, LOGS_KEPT = 64 * 2**20, 4
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # a W3C traceparent


@dataclass
class Record:
    """What is known of one request, filled on its way."""

    method: str
    request_id: str
    trace_id: str | None = None
    route: str = "unknown"  # the path as declared, never as sent
    key: str | None = None
    model: str | None = None
    num_inputs: int = 0
    num_tokens: int = 0
    num_truncated: int = 0
    status: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began

    def to_json(self) -> str:
        return json.dumps(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": self.request_id,
                "trace_id": self.trace_id,
                "method": self.method,
                "route": self.route,
                "status": self.status,
                "duration_ms": round(self.elapsed_s * 1000, 3),
                "key": self.key,
                "model": self.model,
                "inputs": self.num_inputs,
                "tokens": self.num_tokens,
                "truncated": self.num_truncated,
            }
        )


class Observed:
    """Gives each request its id and record, and tells `finished` how it ended. Answers for what the routes failed on."""

    def __init__(self, app: ASGIApp, finished: Callable[[Record], None]) -> None:
        self._app, self._finished = app, finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        trace = _TRACE.fullmatch(headers.get(b"traceparent", b"").decode("latin-1"))
        method = scope["method"] if scope["method"] in _METHODS else "other"
        record = Record(method, request_id, trace[1] if trace else None)
        scope.setdefault("state", {})["record"] = record

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except (ClientDisconnect, ClientGoneError):
            record.status = CLIENT_GONE
        except Exception as error:
            # Without the error's own words: a tokenizer's may repeat the text.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, frames)
            if record.status:
                raise
            failed = ApiError(
                dialect_of(scope["path"]).failed,
                f"the server failed on this request; its log says why under {request_id}",
                kind="server_error",
            )
            await json_error(failed, scope["path"])(scope, receive, answer)
        finally:
            record.status = record.status or CLIENT_GONE  # cancelled: the proxy saw the client hang up
            record.route = getattr(scope.get("route"), "path", record.route)
            self._finished(record)


class RequireKey:
    """Answers 401 to whoever has no key, and 429 to a key that asks too often, before any route sees the request."""

    def __init__(self, app: ASGIApp, keys: KeyRing, rate: RateLimit | None) -> None:
        self._app, self._keys, self._rate = app, keys, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["path"] in OPEN_ROUTES and scope["method"] == "GET"):
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        key = self._keys.identify(given)
        if key is None:
            missing = "no API key was given" if not given else "the API key is not valid"
            error = ApiError(
                401,
                f"{missing}; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await json_error(error, scope["path"])(scope, receive, send)
            return
        scope["state"]["record"].key = key
        if self._rate is None or scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        left, wait_s = self._rate.take(key, time.monotonic())
        counts = {"x-ratelimit-limit-requests": str(self._rate.per_minute), "x-ratelimit-remaining-requests": str(left)}
        if wait_s:
            error = ApiError(
                429,
                f"this key may send {self._rate.per_minute} requests a minute; try again in {wait_s} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait_s), **counts},
            )
            await json_error(error, scope["path"])(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(counts)
            await send(message)

        await self._app(scope, receive, answer)


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def log_to(folder: Path, pid: int) -> None:
    """Writes the access log into a folder, from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(folder / f"access-{pid}.jsonl", maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
