"""Asking model replicas over a handle that dies, hangs, refuses: retries, deadlines, cancelling, descriptions, load. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from ullme_ray.serve import backend as backend_module
from ullme_ray.serve.backend import ATTEMPTS, ReplicaBackend, Target
from ullme_ray.serve.embedder import Answer
from ullme_ray.serve.schemas import ApiError, EmbedCall, EmbedReply, InputRefusedError, ServedModel


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 30)

    asyncio.run(bounded())


class FakeResponse:
    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(work)
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self._task).__await__()  # as Serve's: cancelling who waits does not reach the replica

    def cancel(self) -> None:
        self.was_cancelled = True
        self._task.cancel()


class FakeReplicas:
    """A Serve handle: dies under the first `deaths` calls, then answers, waits for `open`, or raises or answers `result`."""

    def __init__(self, deaths: int = 0, result: Any = None, fingerprint: str = "one") -> None:
        self.deaths, self.result, self.fingerprint = deaths, result, fingerprint
        self.calls: list[tuple[str, Any]] = []
        self.responses: list[FakeResponse] = []
        self.open = asyncio.Event()
        self.open.set()
        self.replica = "replica-1"
        self.up = [SimpleNamespace(unique_id="replica-1")]
        router = SimpleNamespace(_request_router=SimpleNamespace(curr_replicas=self.up))
        self._router = SimpleNamespace(_asyncio_router=router)

    def options(self, **given: Any) -> FakeReplicas:
        self.given = given
        return self

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


class Method:
    def __init__(self, replicas: FakeReplicas, name: str) -> None:
        self._replicas, self._name = replicas, name

    def remote(self, argument: Any) -> FakeResponse:
        self._replicas.calls.append((self._name, argument))
        response = FakeResponse(self._answer(argument))
        self._replicas.responses.append(response)
        return response

    async def _answer(self, argument: Any) -> Answer:
        replicas = self._replicas
        if len(replicas.calls) <= replicas.deaths:
            raise ActorDiedError()
        await replicas.open.wait()
        if isinstance(replicas.result, Exception) and not isinstance(replicas.result, InputRefusedError):
            raise replicas.result
        value = replicas.result
        if value is None and self._name == "describe":
            value = ServedModel(argument, replicas.fingerprint, 4, 8, 300, "mean", "float32")
        elif value is None:
            value = EmbedReply(np.ones((1, 4), np.float32), [1], fingerprint=replicas.fingerprint)
        return Answer(value, replicas.replica, {"queue_tokens": 7, "batches": len(replicas.calls)})


def over(replicas: FakeReplicas, *names: str, may_sleep: bool = False) -> ReplicaBackend:
    return ReplicaBackend([Target(names or ("m",), replicas, may_sleep)])  # type: ignore[arg-type]


CALL = EmbedCall("m", ["x"])


def test_a_request_whose_replica_died_is_asked_again() -> None:
    async def test() -> None:
        dies = FakeReplicas(deaths=ATTEMPTS - 1)
        assert (await over(dies).embed(CALL)).num_tokens == [1]
        assert len(dies.calls) == ATTEMPTS
        always = FakeReplicas(deaths=99)
        with pytest.raises(ApiError) as error:
            await over(always).embed(CALL)
        assert (error.value.status, len(always.calls)) == (503, ATTEMPTS)

    run(test())


def test_a_message_too_large_for_grpc_is_told_and_not_repeated() -> None:
    async def test() -> None:
        large = FakeReplicas(result=AioRpcError(StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata()))
        with pytest.raises(ApiError) as error:
            await over(large).embed(CALL)
        assert (error.value.status, len(large.calls)) == (413, 1)

    run(test())


def test_a_full_queue_and_a_refused_input_are_told_and_not_repeated() -> None:
    async def test() -> None:
        full = FakeReplicas(result=BackPressureError(num_queued_requests=9, max_queued_requests=9))
        with pytest.raises(ApiError) as error:
            await over(full).embed(CALL)
        assert (error.value.status, error.value.headers["retry-after"], len(full.calls)) == (429, "1", 1)
        refuses = FakeReplicas(result=InputRefusedError("too_long", 2, 99, 8))
        with pytest.raises(InputRefusedError) as refused:
            await over(refuses).embed(CALL)
        assert (refused.value.position, len(refuses.calls)) == (2, 1)
        with pytest.raises(ApiError) as unknown:
            await over(FakeReplicas()).embed(EmbedCall("other", ["x"]))
        assert unknown.value.status == 404

    run(test())


def test_past_its_deadline_a_call_is_cancelled_in_the_replica_and_answered() -> None:
    async def test() -> None:
        slow = FakeReplicas()
        slow.open.clear()
        with pytest.raises(ApiError) as error:
            await over(slow).embed(EmbedCall("m", ["x"], deadline_s=0.05))
        assert (error.value.status, error.value.code) == (504, "deadline_exceeded")
        assert slow.responses[0].was_cancelled
        (_, sent), *_ = slow.calls
        assert 0 < sent.deadline_s <= 0.05, "the replica drops it too, should the cancellation be lost"

    run(test())


def test_a_client_that_is_gone_cancels_the_work() -> None:
    async def test() -> None:
        slow = FakeReplicas()
        slow.open.clear()
        backend = over(slow)
        asking = asyncio.create_task(backend.embed(CALL))
        await asyncio.sleep(0.01)
        assert (await backend.load())["m"]["queue_requests"] == 1
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert slow.responses[0].was_cancelled
        assert (await backend.load())["m"]["queue_requests"] == 0

    run(test())


def test_a_description_is_asked_for_once_and_again_when_the_model_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        replicas = FakeReplicas()
        backend = over(replicas)
        for _ in range(3):
            assert (await backend.describe("m")).fingerprint == "one"
        assert len(replicas.calls) == 1
        replicas.fingerprint = "two"
        await backend.embed(CALL)
        assert (await backend.describe("m")).fingerprint == "two"
        monkeypatch.setattr(backend_module, "FRESH_S", 0.0)  # from here on renewed behind each answer
        replicas.result = ActorDiedError()
        await backend.describe("m")
        await asyncio.sleep(0.5)
        with pytest.raises(ApiError):
            await backend.describe("m")

    run(test())


def test_a_model_that_may_sleep_is_not_woken_by_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(backend_module, "FRESH_S", 0.0)
        replicas = FakeReplicas()
        backend = over(replicas, may_sleep=True)
        for _ in range(3):
            await backend.describe("m")
            await asyncio.sleep(0.01)
        assert len(replicas.calls) == 1

    run(test())


def test_a_model_that_may_sleep_is_described_without_waking_it_only_where_it_is_known() -> None:
    async def test() -> None:
        replicas = FakeReplicas()
        backend = over(replicas, may_sleep=True)
        with pytest.raises(ApiError) as error:
            await backend.describe("m", wake=False)
        assert (error.value.status, replicas.calls) == (503, [])
        known = await backend.describe("m")
        assert await backend.describe("m", wake=False) == known

    run(test())


def test_replicas_count_while_they_are_idle_and_their_work_when_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        replicas = FakeReplicas()
        backend = over(replicas)
        await backend.embed(CALL)
        monkeypatch.setattr(backend_module, "QUEUE_FRESH_S", 0.0)  # all that was heard is old
        load = (await backend.load())["m"]
        assert (load["replicas"], load["batches"], load["queue_tokens"]) == (1, 1, 0)
        monkeypatch.setattr(backend_module, "REQUEST_TIMEOUT_S", 0.0)
        assert (await backend.load())["m"]["batches"] == 1
        assert backend._loads["m"], "it is up"
        replicas.up.clear()
        for _ in range(2):
            load = (await backend.load())["m"]
            assert (load["replicas"], load["batches"]) == (0, 1)
        assert not backend._loads["m"]

    run(test())


def test_names_and_loads_of_several_models() -> None:
    async def test() -> None:
        first, second = FakeReplicas(), FakeReplicas()
        backend = ReplicaBackend([Target(["m", "m-legal"], first), Target(["n"], second)])  # type: ignore[arg-type]
        assert backend.models() == ["m", "m-legal", "n"]
        await backend.embed(EmbedCall("m-legal", ["x"]))
        await backend.embed(EmbedCall("n", ["x"]))
        await backend.embed(EmbedCall("n", ["x"]))
        assert ([c.model for _, c in first.calls], len(second.calls)) == (["m-legal"], 2)
        load = await backend.load()
        assert [load[name]["batches"] for name in backend.models()] == [1, 1, 2]
        assert (load["n"]["queue_tokens"], load["n"]["replicas"]) == (7, 1)

    run(test())
