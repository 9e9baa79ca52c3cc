"""The table of nasty requests over a fake backend: each is refused in JSON, none reaches the model, and nothing changes."""

from __future__ import annotations

import asyncio

import httpx
from fake_backend import NAME, FakeBackend
from nasty_requests import MAX_BODY_BYTES, MAX_INPUTS, nasty_requests

from ullme_ray.serve.answers import dialect_of
from ullme_ray.serve.app import create_api
from ullme_ray.spec.job import ServeSpec


def test_every_nasty_request_is_refused_in_the_form_of_its_api() -> None:
    async def test() -> None:
        backend = FakeBackend()
        api = create_api(NAME, ServeSpec(max_inputs=MAX_INPUTS, max_body_bytes=MAX_BODY_BYTES), backend)
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            for name, method, path, content, headers in nasty_requests(NAME):
                answer = await http.request(method, path, content=content, headers=headers)
                shown = (name, answer.status_code, answer.text[:200])
                assert 400 <= answer.status_code < 500, shown
                if dialect_of(path).flat:
                    assert set(answer.json()) == {"error", "error_type"}, shown
                else:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, shown
                assert len(answer.content) < 1000, "an answer repeats the request"
            assert backend.calls == []
            assert (await http.get("/load")).json()["load"]["requests"] == 0

    asyncio.run(asyncio.wait_for(test(), 60))
