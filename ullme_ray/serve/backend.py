"""From the HTTP side to the model replicas: a call is repeated where its replica died under it. No torch.

Embedding is idempotent, so a request whose replica is gone is simply asked again of another. What the replicas tell of
themselves comes with their answers, so that looking at the load costs no call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ullme_ray.serve.limits import RETRY_AFTER_S, overloaded, too_late
from ullme_ray.serve.schemas import (
    ApiError,
    DecodeCall,
    EmbedCall,
    EmbedReply,
    InputRefusedError,
    ServedModel,
    TokenizeCall,
    TokenizeReply,
)

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3  # of a request whose replica died under it: the second may still go to one that died at the same time
RETRY_WAIT_S = 0.05  # before the next attempt, in which the router learns of the death
REQUEST_TIMEOUT_S = 600.0
DESCRIBE_TIMEOUT_S = 5.0
FRESH_S = 1.0  # how old a description may be before it is asked for again, behind the answer
QUEUE_FRESH_S = 5.0  # how long what a replica said of its queue is believed


@dataclass(frozen=True)
class Target:
    """A deployment of replicas and the names it serves."""

    names: Sequence[str]
    replicas: DeploymentHandle[Any]
    may_sleep: bool = False  # scales to zero: then it is not woken to describe itself

    def running(self) -> set[str]:
        """Ids of the replicas that are up, as Serve's router in this process knows them; its own interface gives none."""
        handle: Any = self.replicas
        router = handle._router._asyncio_router._request_router  # None before the router heard of the deployment
        return {replica.unique_id for replica in list(router.curr_replicas)} if router else set()


class ReplicaBackend:
    """Model replicas behind Serve handles; the first target's first name is the default model."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = {name: target for target in targets for name in target.names}
        self._known: dict[str, tuple[float, ServedModel]] = {}
        self._refreshing: dict[str, asyncio.Task[None]] = {}
        self._in_flight: dict[str, int] = defaultdict(int)  # by a target's first name
        self._loads: dict[str, dict[str, tuple[float, dict[str, float]]]] = defaultdict(dict)
        self._ended: dict[str, dict[str, float]] = defaultdict(dict)  # work of replicas that are gone

    def models(self) -> list[str]:
        return list(self._targets)

    async def describe(self, model: str, *, wake: bool = True) -> ServedModel:
        """From what is known, and renewed behind the answer; asked of a replica where nothing is known."""
        if model not in self._known:
            target = self._target(model)
            if target.may_sleep and not wake:
                raise unavailable("nothing is known of the model, and it may sleep")
            timeout_s = REQUEST_TIMEOUT_S if target.may_sleep else DESCRIBE_TIMEOUT_S
            await self._ask_description(model, timeout_s)
        asked, described = self._known[model]
        if time.monotonic() - asked > FRESH_S and not self._targets[model].may_sleep and model not in self._refreshing:
            self._refreshing[model] = asyncio.create_task(self._refresh(model))
        return described

    async def _refresh(self, model: str) -> None:
        try:
            await self._ask_description(model, DESCRIBE_TIMEOUT_S)
        except ApiError as error:
            if error.status != 429:  # a full replica is a healthy one
                self._known.pop(model, None)
        except Exception as error:  # noqa: BLE001 - nobody awaits this task; the next description is asked for and fails aloud
            logger.warning("%s could not be described: %r", model, error)
            self._known.pop(model, None)
        finally:
            self._refreshing.pop(model, None)

    async def _ask_description(self, model: str, timeout_s: float) -> None:
        described: ServedModel = await self._ask(self._target(model), "describe", model, timeout_s=timeout_s)
        self._known[model] = time.monotonic(), described

    async def embed(self, call: EmbedCall) -> EmbedReply:
        timeout_s = min(call.deadline_s or REQUEST_TIMEOUT_S, REQUEST_TIMEOUT_S)
        reply: EmbedReply = await self._ask(self._target(call.model), "embed", call, timeout_s=timeout_s)
        known = self._known.get(call.model)
        if known and known[1].fingerprint != reply.fingerprint:
            self._known.pop(call.model, None)  # a new model was published
        return reply

    async def tokenize(self, call: TokenizeCall) -> TokenizeReply:
        return await self._ask(self._target(call.model), "tokenize", call, timeout_s=REQUEST_TIMEOUT_S)

    async def decode(self, call: DecodeCall) -> list[str]:
        return await self._ask(self._target(call.model), "decode", call, timeout_s=REQUEST_TIMEOUT_S)

    async def load(self) -> dict[str, dict[str, float]]:
        """For each name its replicas' work so far, and their queue as last heard; adapters share their model's."""
        now, found = time.monotonic(), {}
        for name, target in self._targets.items():
            first, running = target.names[0], target.running()
            self._forget_ended(first, running)
            total: dict[str, float] = defaultdict(float, self._ended[first])
            total["queue_requests"] = self._in_flight[first]
            total["queue_tokens"] = 0
            for heard, load in self._loads[first].values():
                for key, value in load.items():
                    if key == "queue_tokens" and now - heard < QUEUE_FRESH_S:
                        total[key] += value
                    elif not key.startswith("queue"):
                        total[key] += value  # of replicas that ended too: these only grow
            total["replicas"] = len(running)
            found[name] = dict(total)
        return found

    def _forget_ended(self, first: str, running: set[str]) -> None:
        """Keeps of a replica that is gone, and has no request left that could tell of it, the sum of its work only."""
        loads, ended, now = self._loads[first], self._ended[first], time.monotonic()
        for replica in [r for r, (heard, _) in loads.items() if r not in running and now - heard > REQUEST_TIMEOUT_S]:
            for key, value in loads.pop(replica)[1].items():
                if not key.startswith("queue"):
                    ended[key] = ended.get(key, 0) + value

    def _target(self, model: str) -> Target:
        if model not in self._targets:
            raise ApiError(404, "this server has no such model", param="model", code="model_not_found")
        return self._targets[model]

    async def _ask(self, target: Target, method: str, argument: Any, *, timeout_s: float) -> Any:
        """Calls a replica. Serve does not repeat a call whose replica died while it ran, so this does.

        Cancelling it cancels the call in the replica.
        """
        first = target.names[0]
        self._in_flight[first] += 1
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in range(1, ATTEMPTS + 1):
                    if isinstance(argument, EmbedCall):
                        argument = replace(argument, deadline_s=max(0.0, deadline - time.monotonic()))
                    response = getattr(target.replicas, method).remote(argument)
                    try:
                        answer = await response
                        break
                    except asyncio.CancelledError:
                        response.cancel()
                        raise
                    except (RayActorError, AioRpcError) as error:
                        if _is_too_large(error):
                            raise ApiError(413, "the request or its answer is too large; send fewer texts at once") from None
                        logger.warning("a model replica died under a request (attempt %d of %d)", attempt, ATTEMPTS)
                        if attempt == ATTEMPTS:
                            raise
                        await asyncio.sleep(RETRY_WAIT_S * attempt)
        except TimeoutError:
            raise too_late() from None
        except BackPressureError:
            raise overloaded() from None
        except (RayActorError, AioRpcError, DeploymentUnavailableError):
            raise unavailable("no model replica is available") from None
        finally:
            self._in_flight[first] -= 1
        self._loads[first][answer.replica] = time.monotonic(), answer.load
        if isinstance(answer.value, InputRefusedError):
            raise answer.value
        return answer.value


def _is_too_large(error: Exception) -> bool:
    """Whether gRPC does not carry the message. Any replica would say so, and none is dead."""
    return isinstance(error, AioRpcError) and error.code() == StatusCode.RESOURCE_EXHAUSTED


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="unavailable", headers={"retry-after": str(RETRY_AFTER_S)})
