"""A proxy between S3 clients and a store that spoils requests on command: errors, delays, connections cut or stalled.

Runs in a thread of the process that makes it; `spoil` says from now on what happens to requests. Requests go through unaltered,
so signatures stay good. Costs a copy of every byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Literal

Fate = Literal["pass", "error", "slow", "cut", "lost", "stall", "unsupported", "careless"]
_COPY_BYTES = 2**14
_ERRORS = {500: "InternalError", 503: "ServiceUnavailable"}


@dataclass(frozen=True)
class Spoil:
    """What happens to requests, and to how many of them.

    error: answered 500 or 503, the store never sees them. slow: passed on after `delay_s`. cut: the connection is reset in the
    middle of an upload's body, or of a download's. lost: the store takes the upload, the connection is reset before its answer.
    stall: the middle of an upload's body is never read. unsupported: conditional puts are answered 501. careless: conditional
    puts that the store refuses are answered 200 (the condition is signed, so it cannot be taken out).
    """

    fates: tuple[Fate, ...]
    share: float = 1.0
    delay_s: tuple[float, float] = (0.2, 2.0)


@dataclass(frozen=True)
class Request:
    """A request that came through, or did not; `status` is 0 where the client saw no answer."""

    time: float  # monotonic
    method: str
    path: str
    fate: Fate
    status: int


class Proxy:
    """A context manager; `endpoint` is what clients take for the store."""

    def __init__(self, store_port: int, seed: int = 1) -> None:
        self.log: list[Request] = []
        self._store_port = store_port
        self._random = random.Random(seed)
        self._spoil: Spoil | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="s3-proxy", daemon=True)
        self._ready = threading.Event()
        self._port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def spoil(self, spoil: Spoil | None) -> None:
        """None ends all faults; stalled connections are let go."""
        self._spoil = spoil

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(10)

    async def _end(self) -> None:
        """Ends all connections; what they say about it is of no interest."""
        open_ones = asyncio.all_tasks() - {asyncio.current_task()}
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)
        self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20))
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        store_out: asyncio.StreamWriter | None = None
        try:
            store_in, store_out = await asyncio.open_connection("127.0.0.1", self._store_port, limit=2**20)
            while await self._exchange(client_in, client_out, store_in, store_out):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            _reset(client_out)
        finally:
            for stream in (client_out, store_out):
                if stream is not None:
                    stream.close()

    async def _exchange(
        self,
        client_in: asyncio.StreamReader,
        client_out: asyncio.StreamWriter,
        store_in: asyncio.StreamReader,
        store_out: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; False when the connection is over."""
        head = await client_in.readuntil(b"\r\n\r\n")
        first, headers = _parse(head)
        method, path = first.split(" ")[:2]
        fate, began = self._choose(method, headers), time.monotonic()

        def note(status: int) -> None:
            self.log.append(Request(began, method, path, fate, status))

        if fate in ("error", "unsupported"):
            status = 501 if fate == "unsupported" else self._random.choice(list(_ERRORS))
            if "expect" not in headers:
                await _copy_body(client_in, None, headers)
            note(status)
            client_out.write(_error_answer(status))
            await client_out.drain()
            return False
        if fate == "slow" and self._spoil:
            await asyncio.sleep(self._random.uniform(*self._spoil.delay_s))
        store_out.write(head)
        if "expect" in headers:  # 100 Continue, or an answer at once
            go_on = await store_in.readuntil(b"\r\n\r\n")
            client_out.write(go_on)
            if not go_on.startswith(b"HTTP/1.1 100"):
                note(_status(go_on))
                return False
        broken = fate in ("cut", "stall") and method in ("PUT", "POST")
        length = int(headers.get("content-length", 0))
        await _copy_body(client_in, store_out, headers, stop_after=length // 2 if broken else None)
        if broken:
            while fate == "stall" and self._spoil is not None:
                await asyncio.sleep(0.1)
            note(0)
            _reset(store_out)
            _reset(client_out)
            return False
        answer = await store_in.readuntil(b"\r\n\r\n")
        status = _status(answer)
        if fate == "lost":
            note(0)
            _reset(client_out)
            return False
        _, answer_headers = _parse(answer)
        if fate == "careless" and status == 412:
            note(200)
            client_out.write(b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
            await client_out.drain()
            return False
        client_out.write(answer)
        if method != "HEAD" and status not in (204, 304):
            size = int(answer_headers.get("content-length", 0))
            await _copy_body(store_in, client_out, answer_headers, stop_after=size // 2 if fate == "cut" else None)
        if fate == "cut":
            note(0)
            _reset(client_out)
            return False
        await client_out.drain()
        note(status)
        return "close" not in (headers.get("connection", ""), answer_headers.get("connection", ""))

    def _choose(self, method: str, headers: dict[str, str]) -> Fate:
        spoil = self._spoil
        if spoil is None or self._random.random() >= spoil.share:
            return "pass"
        fate = self._random.choice(spoil.fates)
        sends_body = int(headers.get("content-length", 0)) > 0
        if fate in ("lost", "stall") and not sends_body:
            return "pass"
        if fate in ("unsupported", "careless") and "if-none-match" not in headers:
            return "pass"
        if fate == "cut" and not sends_body and method != "GET":
            return "pass"
        return fate


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return first, headers


def _status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def _copy_body(
    source: asyncio.StreamReader,
    target: asyncio.StreamWriter | None,
    headers: dict[str, str],
    *,
    stop_after: int | None = None,
) -> None:
    """Copies a body of known length or in chunks; with no target it is thrown away."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        size = 1
        while size:
            line = await source.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            await _put(target, line + await source.readexactly(size + 2))
        return
    left = int(headers.get("content-length", 0)) if stop_after is None else stop_after
    while left:
        data = await source.read(min(left, _COPY_BYTES))
        if not data:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(data)
        await _put(target, data)


async def _put(target: asyncio.StreamWriter | None, data: bytes) -> None:
    if target is not None:
        target.write(data)
        await target.drain()


def _error_answer(status: int) -> bytes:
    code = "NotImplemented" if status == 501 else _ERRORS[status]
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>a test wants this</Message></Error>'
    head = (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return (head + body).encode()


def _reset(stream: asyncio.StreamWriter) -> None:
    """Ends a connection as a crash does: what was not sent is lost, and the peer gets a reset."""
    with contextlib.suppress(OSError):
        stream.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.transport.abort()
