"""From the HTTP side to the model replicas: one call, repeated once where its replica died under it. No torch.

Embedding is idempotent, so a request whose replica is gone is simply asked again of another.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ullme_ray.serve.schemas import ApiError, DecodeCall, EmbedCall, EmbedReply, ServedModel, TokenizeCall, TokenizeReply

logger = logging.getLogger("ray.serve")

ATTEMPTS = 2  # of a request whose replica died under it
REQUEST_TIMEOUT_S = 600.0
HEALTH_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1


class ReplicaBackend:
    """Model replicas behind a Serve handle."""

    def __init__(self, name: str, embedder: DeploymentHandle[Any]) -> None:
        self._name = name
        self._embedder = embedder

    def models(self) -> list[str]:
        return [self._name]

    async def embed(self, call: EmbedCall) -> EmbedReply:
        return await self._ask("embed", call, timeout_s=REQUEST_TIMEOUT_S)

    async def describe(self, model: str) -> ServedModel:
        return await self._ask("describe", model, timeout_s=HEALTH_TIMEOUT_S)

    async def tokenize(self, call: TokenizeCall) -> TokenizeReply:
        return await self._ask("tokenize", call, timeout_s=REQUEST_TIMEOUT_S)

    async def decode(self, call: DecodeCall) -> list[str]:
        return await self._ask("decode", call, timeout_s=REQUEST_TIMEOUT_S)

    async def load(self) -> dict[str, dict[str, float]]:
        return await self._ask("load", timeout_s=HEALTH_TIMEOUT_S)

    async def _ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Calls a replica. Serve does not repeat a call whose replica died while it ran, so this does."""
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in range(1, ATTEMPTS + 1):
                    response = getattr(self._embedder, method).remote(*arguments)
                    try:
                        return await response
                    except RayActorError:
                        logger.warning("a model replica died under a request (attempt %d of %d)", attempt, ATTEMPTS)
                        if attempt == ATTEMPTS:
                            raise
        except TimeoutError:
            raise unavailable("no model replica answered in time") from None
        except BackPressureError:
            raise overloaded() from None
        except (RayActorError, DeploymentUnavailableError):
            raise unavailable("no model replica is available") from None


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="unavailable", headers={"retry-after": str(RETRY_AFTER_S)})


def overloaded() -> ApiError:
    return ApiError(
        429,
        "the server has as many requests as it can queue; try again later",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )
