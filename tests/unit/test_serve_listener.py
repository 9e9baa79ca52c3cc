"""The listener on a real port, over replicas that are none: two of them, one port, and no request lost between them."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_serve_backend import FakeReplicas

from ullme_ray.serve import front
from ullme_ray.serve.ingress import Listener
from ullme_ray.serve.launch import _SHORT_WAYS
from ullme_ray.spec.job import ServeSpec


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


end: Any = Listener.__del__


@pytest.fixture(autouse=True)
def ended_by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As Ray Serve does: it awaits `__del__` itself and leaves none for the garbage collector."""
    monkeypatch.setattr(Listener, "__del__", lambda self: None)
    yield
    gc.collect()


async def listener(port: int, replicas: FakeReplicas) -> Listener:
    new: Any = Listener.__new__(Listener)
    await new.__init__(ServeSpec(), ("127.0.0.1", port), [(["m"], False)], replicas)  # as Ray Serve does it
    assert replicas.given["_by_reference"] is False, "requests would go as calls of an actor"
    return new


async def until_up(client: httpx.AsyncClient) -> None:
    while True:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.02)


def test_the_second_listener_takes_over_and_running_requests_are_finished() -> None:
    async def test() -> None:
        port, first_replicas, second_replicas = free_port(), FakeReplicas(), FakeReplicas()
        first = await listener(port, first_replicas)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            await until_up(client)
            second = await listener(port, second_replicas)
            await asyncio.sleep(0.2)
            for _ in range(5):
                assert (await client.post("/v1/embeddings", json={"input": "x", "model": "m"})).status_code == 200
            assert not second_replicas.calls, "it waits for the port"
            await first.check_health()
            await second.check_health()

            first_replicas.open.clear()
            slow = asyncio.create_task(client.post("/v1/embeddings", json={"input": "slow", "model": "m"}))
            while first_replicas.calls[-1][0] != "embed" or len(first_replicas.calls) < 7:
                await asyncio.sleep(0.01)
            ending = asyncio.create_task(end(first))
            while any(server.is_serving() for server in first._server.servers):  # or it would answer the next request too
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(base_url=client.base_url, trust_env=False, timeout=20) as other:
                await until_up(other)
                assert (await other.post("/v1/embeddings", json={"input": "x", "model": "m"})).status_code == 200
            assert second_replicas.calls
            assert not slow.done()
            first_replicas.open.set()
            assert (await slow).status_code == 200
            await ending
            with pytest.raises(RuntimeError, match="has ended"):
                await first.check_health()
            assert (second._server.config.timeout_graceful_shutdown, second._drain_s) == (300, 300), (
                "as long as a request may take"
            )
        await end(second)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_no_connection_is_refused_while_one_listener_follows_another() -> None:
    """Each request comes on a connection of its own; five listeners end one after another, each with a successor that waits."""

    async def test() -> None:
        port, over, answers = free_port(), asyncio.Event(), list[bytes]()
        now = await listener(port, FakeReplicas())

        async def ask() -> None:
            while not over.is_set():
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                answers.append(await reader.read())
                writer.close()
                assert answers[-1].startswith(b"HTTP/1.1 200")

        async def twenty_more() -> None:
            begin = len(answers)
            while len(answers) < begin + 20 and not any(client.done() for client in clients):
                await asyncio.sleep(0.01)

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            await until_up(client)
        clients = [asyncio.create_task(ask()) for _ in range(4)]
        for _ in range(5):
            successor = await listener(port, FakeReplicas())
            await twenty_more()
            await end(now)
            await twenty_more()
            now = successor
        over.set()
        await asyncio.gather(*clients)
        await end(now)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_listener_that_never_got_the_port_ends_at_once() -> None:
    async def test() -> None:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            waiting = await listener(holder.getsockname()[1], FakeReplicas())
            await asyncio.sleep(0.1)
            await waiting.check_health()
            await asyncio.wait_for(end(waiting), 5)

    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize("variables", [_SHORT_WAYS["env_vars"], front.CALLBACK])
def test_rays_processes_send_one_another_whatever_our_limits_allow(variables: dict[str, str]) -> None:
    """Ray's own limit of a message is 4 MiB, for requests and answers alike."""
    code = "from ray.serve._private import constants; print(constants.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH)"
    told = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(told.stdout) == 2**31 - 1


def test_rays_switch_for_speed_opens_no_second_http_port() -> None:
    """It would, for the listener, without our keys and limits, and end no listener within Serve's own time."""
    names = ("RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_ENABLE_DIRECT_INGRESS")
    code = f"from ray.serve._private import constants; print(*(getattr(constants, name) for name in {names}))"
    environment = os.environ | _SHORT_WAYS["env_vars"]
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert told.stdout.split() == ["True", "False"]
