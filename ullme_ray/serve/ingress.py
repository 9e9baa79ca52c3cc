"""The process that listens: the HTTP side as a Ray Serve deployment, small and without torch.

`Listener` opens the port itself. Ray Serve's HTTP proxy would take each request through two more processes and cost as much as
a small model's forward. Two listeners run: one holds the port and answers, the other waits for it and takes over when the first
one dies, in milliseconds, or ends in good order, without a gap (`ullme_ray.serve.port`). Serve then starts another.

`Ingress` is the same API behind Serve's proxy, for where something else expects that one (KubeRay's RayService).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import uvicorn
from fastapi import FastAPI
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.handle import DeploymentHandle

from ullme_ray.serve import access
from ullme_ray.serve.app import create_api
from ullme_ray.serve.backend import ReplicaBackend, Target
from ullme_ray.serve.embedder import SWITCH_INTERVAL_S
from ullme_ray.serve.limits import longest_request_s
from ullme_ray.serve.port import Port
from ullme_ray.spec.job import ServeSpec

logger = logging.getLogger("ray.serve")

_KEEP_ALIVE_S = 75.0  # longer than clients keep an idle connection, so that none is cut as it sends its next request
_LAST_REQUESTS_S = 1.0  # for open connections to ask once more and be told that this was the last time


class Ingress:
    """Ray Serve's entry point; wrapped by `serve.ingress`, which asks it for the app once it exists."""

    def __init__(
        self, settings: ServeSpec, targets: Sequence[tuple[Sequence[str], bool]], *replicas: DeploymentHandle[Any]
    ) -> None:
        self._api = make_api(settings, targets, replicas)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


class Listener:
    """Answers HTTP on a port of its own as soon as the port is free."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that the event loop exists
        self,
        settings: ServeSpec,
        address: tuple[str, int],
        targets: Sequence[tuple[Sequence[str], bool]],
        *replicas: DeploymentHandle[Any],
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config = uvicorn.Config(
            make_api(settings, targets, replicas),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(_KEEP_ALIVE_S),
            timeout_graceful_shutdown=math.ceil(longest_request_s(settings)),
            lifespan="on",
        )
        self._drain_s = longest_request_s(settings)
        self._server = _Server(config)
        self._port = Port(*address)
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        await self._server.serve(sockets=[await self._port.take()])

    async def check_health(self) -> None:
        """Asked by Serve, which replaces this process when it raises."""
        if self._task.done():
            raise RuntimeError("the listener has ended")

    async def __del__(self) -> None:
        """Called by Serve before it ends this process: gives the port away, and lets running requests finish."""
        self._port.pass_on()
        await self._server.finish_connections(_LAST_REQUESTS_S)
        self._server.should_exit = True
        if not self._server.started:
            self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([self._task], timeout=self._drain_s)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # they are Ray's
        yield

    async def finish_connections(self, seconds: float) -> None:
        """Accepts none, and answers what comes on the open ones as their last request: uvicorn cuts what it thinks idle."""
        loop, servers = asyncio.get_running_loop(), getattr(self, "servers", [])
        for listening in (listening for server in servers for listening in server.sockets):
            loop.remove_reader(listening.fileno())  # asyncio, unlike uvloop, cuts what it accepts in the moment it closes
        await asyncio.sleep(0.02)
        for server in servers:
            server.close()
        self.config.encoded_headers.append((b"connection", b"close"))
        self.server_state.default_headers = self.config.encoded_headers
        deadline = time.monotonic() + seconds
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def make_api(
    settings: ServeSpec, targets: Sequence[tuple[Sequence[str], bool]], replicas: Sequence[DeploymentHandle[Any]]
) -> FastAPI:
    """The routes over the deployments: for each the names it serves and whether it scales to zero, and its handle."""
    if settings.access_log and ray.is_initialized():
        access.log_to(Path(get_serve_logs_dir()), os.getpid())
    # By gRPC, which is quicker than a call of an actor. Said here, since the handles come with the defaults of the driver.
    ways = [
        replica.options(_by_reference=False, request_serialization="pickle", response_serialization="pickle")
        for replica in replicas
    ]
    found = [Target(names, way, may_sleep) for (names, may_sleep), way in zip(targets, ways, strict=True)]
    return create_api(found[0].names[0], settings, ReplicaBackend(found))
