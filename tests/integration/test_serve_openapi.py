"""The OpenAPI page is true: schemathesis makes requests out of it, good ones and bad ones, and holds the answers against it.

Over a fake backend, without Ray: what is tested is the page and the HTTP side.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from fake_backend import NAME, FakeBackend
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from starlette.testclient import TestClient

from ullme_ray.serve.app import create_api
from ullme_ray.spec.job import ServeSpec

EXAMPLES = 100  # of each kind for each route


def make_api() -> Any:
    return create_api(NAME, ServeSpec(max_inputs=8), FakeBackend())


def embed(http: TestClient) -> Any:
    return http.post("/v1/embeddings", json={"input": ["one", "two"], "model": NAME}).json()


def ask_all(operation: Any, mode: GenerationMode, statuses: Counter[tuple[str, int]]) -> None:
    """Sends the examples of one route and kind."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        if mode == GenerationMode.POSITIVE:
            case.headers["x-timeout-ms"] = "60000"  # 1 ms is a good value too, and its answer 504 is a true one
        response = case.call()
        statuses[mode.value, response.status_code] += 1
        case.validate_response(response)

    ask()


def test_requests_made_from_the_page_get_the_answers_that_it_promises() -> None:
    api = make_api()
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    schema.config.checks.negative_data_rejection.expected_statuses = ["400", "404", "413", "422"]
    statuses: Counter[tuple[str, int]] = Counter()
    with TestClient(api, raise_server_exceptions=False) as http:
        before = embed(http)
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 11
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode == GenerationMode.POSITIVE or operation.method.upper() == "POST":  # no GET can be malformed
                    ask_all(operation, mode, statuses)
        assert embed(http) == before
    asked: Counter[str] = Counter()
    for (mode, status), count in statuses.items():
        assert status < 500, statuses
        asked[mode] += count
    assert asked["negative"] >= 560, statuses
    assert statuses["positive", 200] >= 400, statuses


def test_a_page_that_is_wrong_would_be_seen() -> None:
    """The control: the same check fails a page that promises another answer."""
    api = make_api()
    raw = asyncio.run(_page(api))
    raw["paths"]["/embed"]["post"]["responses"]["200"]["content"]["application/json"]["schema"] = {"type": "string"}
    operation = schemathesis.openapi.from_dict(raw)["/embed"]["POST"]
    case = operation.Case(body={"inputs": "x"}, media_type="application/json")
    with pytest.raises(FailureGroup) as failed:
        case.validate_response(case.call(app=api))
    assert ["Response violates schema" in str(failure) for failure in failed.value.exceptions] == [True]


async def _page(api: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as http:
        return (await http.get("/openapi.json")).json()
