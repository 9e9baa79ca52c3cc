"""The process that listens: the HTTP side as a Ray Serve deployment, small and without torch.

`Listener` opens the port itself. Ray Serve's HTTP proxy would take each request through two more processes and cost as much as
a small model's forward. Two listeners run, and the port is their lock: the one that holds it answers, the other tries to bind
it all the time and takes over within `_TAKEOVER_S` of the first one's death. Serve then starts another.

`Ingress` is the same API behind Serve's proxy, for where something else expects that one (KubeRay's RayService).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
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
from ullme_ray.spec.job import ServeSpec

logger = logging.getLogger("ray.serve")

_TAKEOVER_S = 0.05
_KEEP_ALIVE_S = 75.0  # longer than clients keep an idle connection, so that none is cut as it sends its next request
_DRAIN_S = 20.0  # for running requests when the listener is told to end
_BACKLOG = 2048


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
            timeout_graceful_shutdown=int(_DRAIN_S),
            lifespan="on",
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._listen(address))

    async def _listen(self, address: tuple[str, int]) -> None:
        while (listening := _bind(address)) is None:
            await asyncio.sleep(_TAKEOVER_S)
        await self._server.serve(sockets=[listening])

    async def check_health(self) -> None:
        """Asked by Serve, which replaces this process when it raises."""
        if self._task.done():
            raise RuntimeError("the listener has ended")

    async def __del__(self) -> None:
        """Called by Serve before it ends this process: closes the port, and lets running requests finish."""
        self._server.should_exit = True
        if not self._server.started:
            self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([self._task], timeout=_DRAIN_S)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # they are Ray's
        yield


def make_api(
    settings: ServeSpec, targets: Sequence[tuple[Sequence[str], bool]], replicas: Sequence[DeploymentHandle[Any]]
) -> FastAPI:
    """The routes over the deployments: for each the names it serves and whether it scales to zero, and its handle."""
    if settings.access_log and ray.is_initialized():
        access.log_to(Path(get_serve_logs_dir()), os.getpid())
    found = [Target(names, handle, may_sleep) for (names, may_sleep), handle in zip(targets, replicas, strict=True)]
    return create_api(found[0].names[0], settings, ReplicaBackend(found))


def _bind(address: tuple[str, int]) -> socket.socket | None:
    """A socket that listens there, or None while another process holds the port."""
    host, port = address
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        return None
    listening.setblocking(False)
    return listening
