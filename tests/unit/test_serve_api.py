"""Both APIs over a computable backend: TEI's routes, number types, truncation, deadlines, clients that leave, keys, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fake_backend import MAX_TOKENS, NAME, OTHER, FakeBackend
from prometheus_client.parser import text_string_to_metric_families

from ullme_ray.serve import tei_api
from ullme_ray.serve.access import access_log
from ullme_ray.serve.app import create_api
from ullme_ray.serve.keys import KeyRing, RateLimit
from ullme_ray.serve.quantising import quantised
from ullme_ray.serve.schemas import ApiError
from ullme_ray.spec.job import ServeSpec
from ullme_ray.spec.secrets import SecretRef


def client(backend: FakeBackend, **settings: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_api(NAME, ServeSpec(**settings), backend), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def assert_tei_error(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == kind
    return answer.json()["error"]


def unit(*numbers: float) -> list[float]:
    vector = np.array(numbers, "f4")
    return (vector / np.linalg.norm(vector)).tolist()


def test_tei_routes_give_what_tei_gives() -> None:
    async def test() -> None:
        async with client(FakeBackend()) as http:
            one = await http.post("/embed", json={"inputs": "AB"})
            assert one.json() == [pytest.approx(unit(2, 0, 1.31, -1 / 3))]
            assert one.headers["x-truncated-inputs"] == "0"
            assert (await http.post("/", json={"inputs": "AB"})).json() == one.json()
            both = await http.post("/embed", json={"inputs": ["AB", "C"], "prompt_name": "query", "normalize": False})
            assert both.json() == [pytest.approx([2, 1, 1.31, -1 / 3]), pytest.approx([1, 1, 0.67, -1 / 3])]
            by_ids = await http.post("/embed", json={"inputs": [[65, 66], [67]]})
            assert by_ids.json() == (await http.post("/embed", json={"inputs": ["AB", "C"]})).json()
            cut = await http.post("/embed", json={"inputs": "AB", "dimensions": 2.0, "truncate": None})
            assert cut.json() == [pytest.approx(unit(2, 0))]

            states = (await http.post("/embed_all", json={"inputs": ["AB", "C"]})).json()
            assert states == [[[65, 0, 0, 1], [66, 1, 0, 1]], [[67, 0, 0, 1]]]

            sentences = {"source_sentence": "AB", "sentences": ["AB", "CCCC"]}
            scores = (await http.post("/similarity", json={"inputs": sentences})).json()
            assert scores == pytest.approx([1, float(np.dot(unit(2, 0, 1.31, -1 / 3), unit(4, 0, 2.68, -1 / 3)))])

            tokens = (await http.post("/tokenize", json={"inputs": "A"})).json()
            assert tokens == [
                [
                    {"id": 0, "text": "<s>", "special": True, "start": None, "stop": None},
                    {"id": 65, "text": "A", "special": False, "start": 0, "stop": 1},
                ]
            ]
            bare = (await http.post("/tokenize", json={"inputs": ["A"], "add_special_tokens": False})).json()
            assert [token["id"] for token in bare[0]] == [65]
            assert (await http.post("/decode", json={"ids": [0, 65, 66]})).json() == ["AB"]
            assert (await http.post("/decode", json={"ids": [[0, 65]], "skip_special_tokens": False})).json() == ["\0A"]

            info = (await http.get("/info")).json()
            assert info["model_id"] == NAME
            assert info["model_type"] == {"embedding": {"pooling": "mean"}}
            assert info["max_input_length"] == MAX_TOKENS
            assert info["auto_truncate"] is True
            assert (await http.get("/health")).json() == {"status": "ok"}

    run(test())


TEI_REFUSALS: dict[str, tuple[str, Any, int, str]] = {
    "empty batch": ("/embed", {"inputs": []}, 400, "Empty"),
    "empty text": ("/embed", {"inputs": ["x", ""]}, 400, "Empty"),
    "too many": ("/embed", {"inputs": ["x"] * 9}, 413, "Validation"),
    "too long": ("/embed", {"inputs": "x" * 129, "truncate": False}, 413, "Validation"),
    "no inputs": ("/embed", {}, 422, "Validation"),
    "wrong type": ("/embed", {"inputs": {"a": 1}}, 422, "Validation"),
    "unknown prompt": ("/embed", {"inputs": "x", "prompt_name": "x"}, 422, "Validation"),
    "ids out of range": ("/embed", {"inputs": [300]}, 422, "Validation"),
    "dimensions": ("/embed", {"inputs": "x", "dimensions": 5}, 422, "Validation"),
    "int8 of no unit": ("/embed", {"inputs": "x", "normalize": False, "output_dtype": "int8"}, 422, "Validation"),
    "direction": ("/embed_all", {"inputs": "x", "truncation_direction": "up"}, 422, "Validation"),
    "another model": ("/embed", {"inputs": "x", "model": "gpt"}, 404, "Validation"),
    "no sentences": ("/similarity", {"inputs": {"source_sentence": "x", "sentences": []}}, 400, "Empty"),
    "sentences": ("/similarity", {"inputs": {"source_sentence": "x", "sentences": "y"}}, 422, "Validation"),
    "tokenize ids": ("/tokenize", {"inputs": [1]}, 422, "Validation"),
    "decode texts": ("/decode", {"ids": ["x"]}, 422, "Validation"),
    "not an object": ("/decode", [1], 422, "Validation"),
}


@pytest.mark.parametrize("case", TEI_REFUSALS)
def test_tei_routes_refuse_in_teis_form(case: str) -> None:
    path, body, status, kind = TEI_REFUSALS[case]

    async def test() -> None:
        async with client(FakeBackend(), max_inputs=8) as http:
            assert_tei_error(await http.post(path, json=body), status, kind)

    run(test())


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_number_types_agree_in_both_apis_and_are_not_taken_for_float32(dtype: str) -> None:
    async def test() -> None:
        async with client(FakeBackend()) as http:
            exact = np.array((await http.post("/embed", json={"inputs": ["AB", "z"]})).json(), "f4")
            body = {"input": ["AB", "z"], "model": NAME, "output_dtype": dtype}
            plain = (await http.post("/v1/embeddings", json=body)).json()["data"]
            numbers = np.array([row["embedding"] for row in plain])
            packed = await http.post("/v1/embeddings", json={**body, "encoding_format": "base64"})  # as openai's client does
            assert (packed.status_code, packed.json()["error"]["param"]) == (400, "encoding_format")
            assert 'encoding_format "float"' in packed.json()["error"]["message"]
            assert (await http.post("/embed", json={"inputs": ["AB", "z"], "output_dtype": dtype})).json() == numbers.tolist()
            levels = numbers + (128 if dtype in ("int8", "binary") else 0)
            if dtype.endswith("binary"):
                assert np.array_equal(np.unpackbits(levels.astype(np.uint8), axis=1)[:, :4], exact > 0)
                assert not np.unpackbits(levels.astype(np.uint8), axis=1)[:, 4:].any()
            else:
                assert np.abs(((levels + 0.5) / 255 * 8 - 4) / np.sqrt(4) - exact).max() < 4 / 255

    run(test())


def test_fixed_ranges_keep_the_direction_of_real_widths() -> None:
    vectors = np.random.default_rng(5).normal(size=(50, 576)).astype("f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    back = ((quantised(vectors, "uint8").astype("f4") + 0.5) / 255 * 8 - 4) / np.sqrt(576)
    cosines = (back * vectors).sum(axis=1) / np.linalg.norm(back, axis=1)
    assert cosines.min() > 0.9999


def test_truncation_is_counted_turned_and_refused_on_request() -> None:
    async def test() -> None:
        backend = FakeBackend()
        long = "a" * MAX_TOKENS + "b"
        async with client(backend) as http:
            answer = await http.post("/v1/embeddings", json={"input": [long, "x"], "model": NAME})
            assert answer.headers["x-truncated-inputs"] == "1"
            refused = await http.post("/v1/embeddings", json={"input": ["x", long], "model": NAME, "truncate": False})
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "too_long"
            assert "text 1 has 129 tokens" in refused.json()["error"]["message"]
            right = (await http.post("/embed", json={"inputs": long})).json()
            for direction in ("left", "Left"):
                assert (await http.post("/embed", json={"inputs": long, "truncation_direction": direction})).json() != right

    run(test())


def test_tokens_of_a_request_are_limited() -> None:
    async def test() -> None:
        async with client(FakeBackend(), max_request_tokens=10) as http:
            answer = await http.post("/v1/embeddings", json={"input": ["abcdef"] * 2, "model": NAME})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "too_many_tokens"
            assert_tei_error(await http.post("/embed", json={"inputs": ["abcdef"] * 2}), 413, "Validation")
            assert_tei_error(await http.post("/tokenize", json={"inputs": ["abcdef"] * 2}), 413, "Validation")
            assert_tei_error(await http.post("/decode", json={"ids": [[65] * 6] * 2}), 413, "Validation")
            assert (await http.post("/embed", json={"inputs": "abcdef"})).status_code == 200
            assert (await http.post("/tokenize", json={"inputs": "abcdef"})).status_code == 200
            assert (await http.post("/decode", json={"ids": [65] * 6})).status_code == 200

    run(test())


def test_several_models_are_told_apart_by_name() -> None:
    async def test() -> None:
        backend = FakeBackend(NAME, OTHER)
        async with client(backend) as http:
            assert [m["id"] for m in (await http.get("/v1/models")).json()["data"]] == [NAME, OTHER]
            assert (await http.post("/v1/embeddings", json={"input": "x", "model": OTHER})).json()["model"] == OTHER
            await http.post("/embed", json={"inputs": "x", "model": OTHER})
            await http.post("/embed", json={"inputs": "x"})
        assert [call.model for call in backend.calls] == [OTHER, OTHER, NAME]

    run(test())


def test_a_new_export_is_described_anew() -> None:
    async def test() -> None:
        backend = FakeBackend()
        async with client(backend) as http:
            await http.post("/embed", json={"inputs": "x"})
            backend.fingerprint = "e" * 64
            assert (await http.post("/embed", json={"inputs": "x"})).headers["x-model-fingerprint"] == "e" * 16
            assert (await http.get("/info")).json()["model_sha"] == "e" * 64

    run(test())


def test_the_deadline_is_the_servers_or_less() -> None:
    async def test() -> None:
        backend = FakeBackend()
        async with client(backend, request_timeout_s=0.2) as http:
            await http.post("/embed", json={"inputs": "x"}, headers={"x-timeout-ms": "90000"})
            assert backend.calls[0].deadline_s is not None
            assert backend.calls[0].deadline_s <= 0.2
            backend.open.clear()
            late = await http.post("/v1/embeddings", json={"input": "x", "model": NAME})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert_tei_error(await http.post("/embed", json={"inputs": "x"}, headers={"x-timeout-ms": "10"}), 504, "Unhealthy")
            assert backend.cancelled == 2
            for wrong in ("", "0", "-1", "1.5", "soon", "9" * 30):
                answer = await http.post("/embed", json={"inputs": "x"}, headers={"x-timeout-ms": wrong})
                assert answer.status_code == 400, wrong
            assert (await http.get("/load")).json()["load"]["requests"] == 0

    run(test())


def test_a_model_that_must_wake_up_is_waited_for_until_the_deadline() -> None:
    async def test() -> None:
        backend = FakeBackend(NAME, OTHER)
        backend.asleep.add(OTHER)
        backend.open.clear()
        soon = {"x-timeout-ms": "300"}
        async with client(backend) as http:
            late = await http.post("/v1/embeddings", json={"input": "x", "model": OTHER}, headers=soon)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            for path, body in (
                ("/embed", {"inputs": "x", "model": OTHER}),
                ("/similarity", {"inputs": {"source_sentence": "x", "sentences": ["y"]}, "parameters": {"model": OTHER}}),
                ("/tokenize", {"inputs": "x", "model": OTHER}),
                ("/decode", {"ids": [65], "model": OTHER}),
            ):
                assert_tei_error(await http.post(path, json=body, headers=soon), 504, "Unhealthy")
            assert backend.cancelled == 5
            assert (await http.get("/load")).json()["load"]["requests"] == 0
            backend.open.set()
            assert (await http.post("/embed", json={"inputs": "x", "model": OTHER})).status_code == 200

    run(test())


def test_pages_wake_no_model_and_outlive_a_dead_one() -> None:
    async def test() -> None:
        backend = FakeBackend(NAME, OTHER, "dead")
        backend.asleep.add(OTHER)
        backend.dead.add("dead")
        backend.open.clear()
        async with client(backend) as http:
            load = (await http.get("/load")).json()
            assert [model["name"] for model in load["models"]] == [NAME]
            assert list(load["load"]["models"]) == [NAME, OTHER, "dead"]
            schema = (await http.get("/openapi.json")).json()["paths"]["/v1/embeddings"]["post"]["requestBody"]
            properties = schema["content"]["application/json"]["schema"]["properties"]
            assert properties["model"]["enum"] == [NAME, OTHER, "dead"]
            backend.dead.add(NAME)
            assert (await http.get("/load")).json()["models"] == []
            assert (await http.get("/openapi.json")).status_code == 200
            assert (await http.get("/")).status_code == 200

    run(test())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": ["x"] * 2000}),
        ("/similarity", {"inputs": {"source_sentence": "x", "sentences": ["y"] * 2000}}),
        ("/tokenize", {"inputs": ["x"] * 2000}),
        ("/decode", {"ids": [[65]] * 2000}),
    ],
)
def test_large_bodies_are_checked_and_written_off_the_event_loop(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ullme_ray.serve.limits.LARGE_BYTES", 1000)
    at_work: dict[str, set[bool]] = {"check_inputs": set(), "split_input": set(), "dumps": set()}

    def watched(name: str, work: Any) -> Any:
        def watch(*args: Any, **options: Any) -> Any:
            at_work[name].add(threading.current_thread() is threading.main_thread())
            return work(*args, **options)

        return watch

    for name in ("check_inputs", "split_input"):
        monkeypatch.setattr(tei_api, name, watched(name, getattr(tei_api, name)))
    monkeypatch.setattr(tei_api, "json", SimpleNamespace(dumps=watched("dumps", json.dumps)))

    async def test() -> None:
        async with client(FakeBackend()) as http:
            assert (await http.post(path, json=body)).status_code == 200

    run(test())
    assert at_work["check_inputs"] == {False}
    assert set().union(*at_work.values()) == {False}


def test_the_work_of_a_client_that_hung_up_is_dropped() -> None:
    async def test() -> None:
        backend = FakeBackend()
        backend.open.clear()
        api = create_api(NAME, ServeSpec(), backend)
        messages = [{"type": "http.request", "body": b'{"inputs": "x"}', "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "query_string": b"", "root_path": ""}
        running = asyncio.create_task(api(scope, receive, send))
        while not backend.calls:
            await asyncio.sleep(0)
        gone.set()
        await running
        assert backend.cancelled == 1
        assert sent == []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as http:
            assert 'te_request_failure{err="client_gone"} 1.0' in (await http.get("/metrics")).text
            assert (await http.get("/load")).json()["load"]["requests"] == 0

    run(test())


def test_a_full_server_refuses_before_it_looks_for_the_route_and_counts_it(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        backend = FakeBackend()
        backend.open.clear()
        api = create_api(NAME, ServeSpec(max_queued_requests=1), backend)
        routed: dict[str, bool] = {}  # by path, whether FastAPI looked for its route

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            await api(scope, receive, send)
            routed[scope["path"]] = "route" in scope

        async with httpx.AsyncClient(transport=httpx.ASGITransport(watched), base_url="http://test") as http:
            first = asyncio.create_task(http.post("/embed", json={"inputs": "x"}))
            while not backend.calls:
                await asyncio.sleep(0)
            with caplog.at_level(logging.INFO, access_log.name):
                tei = await http.post("/embed_all", content=b"no JSON")
                openai = await http.post("/v1/embeddings", content=b"no JSON")
            assert_tei_error(tei, 429, "Overloaded")
            assert (openai.status_code, openai.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert tei.headers["retry-after"] == openai.headers["retry-after"] == "1"
            assert tei.headers["x-request-id"] != openai.headers["x-request-id"]
            logged = [json.loads(record.message) for record in caplog.records if record.name == access_log.name]
            assert [(line["route"], line["status"]) for line in logged] == [("/embed_all", 429), ("/v1/embeddings", 429)]
            assert (await http.post("/nowhere")).status_code == 404
            assert (await http.get("/info")).status_code == 200
            assert routed == {"/embed_all": False, "/v1/embeddings": False, "/nowhere": False, "/info": True}
            backend.open.set()
            assert (await first).status_code == 200
            assert (await http.post("/embed_all", content=b"no JSON")).status_code == 400
            assert 'te_request_failure{err="overloaded"} 2.0' in (await http.get("/metrics")).text

    run(test())


def test_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullme_ray.serve.limits.BODIES_HELD", 2)

    async def test() -> None:
        backend = FakeBackend()
        backend.open.clear()
        body = {"inputs": "x" * 900}
        async with client(backend, max_body_bytes=1000) as http:
            first = [asyncio.create_task(http.post("/embed", json=body)) for _ in range(2)]
            while len(backend.calls) < 2:
                await asyncio.sleep(0)
            assert_tei_error(await http.post("/embed", json=body), 429, "Overloaded")
            backend.open.set()
            assert [(await task).status_code for task in first] == [200, 200]
            assert (await http.post("/embed", json=body)).status_code == 200

    run(test())


def test_keys_are_rotated_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullme_ray.serve.keys.LOOK_AGAIN_S", 0.0)
    keys = tmp_path / "keys"
    keys.write_text("old-key\n")
    ring = KeyRing(SecretRef(f"file:{keys}"))
    assert ring.accepts(b"Bearer old-key")

    def replace_keys(content: str) -> None:
        (tmp_path / "new").write_text(content)
        os.replace(tmp_path / "new", keys)

    replace_keys("new-key\nold-key\n")
    assert ring.accepts(b"Bearer old-key")
    assert ring.accepts(b"Bearer new-key")
    assert ring.identify(b"Bearer old-key") != ring.identify(b"Bearer new-key")
    replace_keys("new-key\n")
    assert not ring.accepts(b"Bearer old-key")
    for broken in ("", " , "):
        replace_keys(broken)
        assert ring.accepts(b"Bearer new-key"), "a file without keys must not lock everybody out"
    keys.unlink()
    assert ring.accepts(b"Bearer new-key")
    assert not ring.accepts(b"Bearer old-key")


def test_each_key_has_its_own_rate(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a\nb\n")

    async def test() -> None:
        async with client(FakeBackend(), api_keys=SecretRef(f"file:{tmp_path}/keys"), requests_per_minute=2) as http:

            async def ask(key: str) -> httpx.Response:
                return await http.post("/embed", json={"inputs": "x"}, headers={"authorization": f"Bearer {key}"})

            answers = [await ask("a") for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
            assert_tei_error(answers[2], 429, "Overloaded")
            assert 1 <= int(answers[2].headers["retry-after"]) <= 30
            assert (await ask("b")).status_code == 200

    run(test())


def test_a_bucket_fills_again_over_a_minute() -> None:
    rate = RateLimit(60)
    assert [rate.take("k", 0.0) for _ in range(60)][-1] == (0, 0)
    assert rate.take("k", 0.5) == (0, 1)
    assert rate.take("k", 1.5)[1] == 0
    assert rate.take("k", 1000.0) == (59, 0)


def test_metrics_have_teis_names_and_count_once() -> None:
    async def test() -> None:
        async with client(FakeBackend()) as http:
            await http.post("/embed", json={"inputs": ["ab", "c"]})
            await http.post("/v1/embeddings", json={"input": "x" * (MAX_TOKENS + 1), "model": NAME})
            await http.post("/embed", json={"inputs": 3})
            await http.get("/info")
            answer = await http.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            samples = {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(answer.text)
                for sample in family.samples
            }
            assert samples["te_request_count", "batch"] == 1
            assert samples["te_request_count", "single"] == 2
            assert samples["te_request_success", "single"] == 1
            assert samples["te_request_failure", "validation"] == 1
            assert samples["te_embed_success",] == 3
            assert samples["te_embed_tokens",] == 3 + MAX_TOKENS
            assert samples["te_embed_truncated",] == 1
            assert samples["te_request_duration_count",] == 2
            assert samples["te_request_queue_duration_sum",] == pytest.approx(0.004)
            assert samples["te_queue_size",] == 0
            assert samples["te_queue_tokens", NAME] == 45

    run(test())


def test_the_access_log_is_json_and_ids_go_in_and_out(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with client(FakeBackend()) as http:
            trace = "4bf92f3577b34da6a3ce929d0e0e4736"
            headers = {"x-request-id": "mine-1", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
            answer = await http.post("/embed", json={"inputs": ["ab", "c"]}, headers=headers)
            assert answer.headers.get_list("x-request-id") == ["mine-1"]
            odd = await http.get("/v1/models/x", headers=[(b"x-request-id", b"a b\xff")])
            assert len(odd.headers["x-request-id"]) == 32
            await http.get("/hidden/otters")
            first, second, third = (json.loads(record.message) for record in caplog.records if record.name == access_log.name)
            assert (first["request_id"], first["trace_id"], first["route"], first["status"]) == ("mine-1", trace, "/embed", 200)
            assert (first["inputs"], first["tokens"], first["truncated"], first["model"]) == (2, 3, 0, NAME)
            assert first["duration_ms"] > 0
            assert (second["route"], second["status"], second["request_id"]) == (
                "/v1/models/{model}",
                404,
                odd.headers["x-request-id"],
            )
            assert (third["route"], third["status"]) == ("unknown", 404)

    with caplog.at_level(logging.INFO, access_log.name):
        run(test())


def test_a_planted_secret_is_told_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, text = "planted-key-7c1f", "planted sentence about otters"
    (tmp_path / "keys").write_text(key)

    async def test() -> None:
        backend = FakeBackend()
        async with client(backend, api_keys=SecretRef(f"file:{tmp_path}/keys")) as http:
            http.headers["authorization"] = f"Bearer {key}"
            told = []
            for body in (
                {"inputs": text},
                {"inputs": [text, ""]},
                {"inputs": {text: text}},
                {"inputs": "x", "dimensions": text},
                {"inputs": [text, 3]},
                {"inputs": text * 9, "truncate": False},
                {"inputs": "x", "normalize": {text: [text]}},
            ):
                for path in ("/embed", "/embed_all"):
                    told.append(await http.post(path, json=body))
                told.append(await http.post("/v1/embeddings", json={"input": body["inputs"], "model": NAME, "user": {text: 1}}))
            told.append(await http.post("/similarity", json={"inputs": {"source_sentence": text, "sentences": {text: text}}}))
            told.append(await http.post("/tokenize", json={"inputs": {text: 1}}))
            told.append(await http.post("/embed", content=f'{{"inputs": "{text}'))
            backend.error = RuntimeError(text)
            told.append(await http.post("/embed", json={"inputs": text}))
            assert_tei_error(told[-1], 424, "Backend")
            backend.error = ApiError(503, "none is up")
            told.append(await http.post("/embed", json={"inputs": text}, headers={"x-request-id": "fine"}))
            backend.error = None
            told += [await http.get(path) for path in ("/metrics", "/load", "/", "/info", "/openapi.json", f"/{text}")]
            told.append(await http.get("/info", headers={"authorization": f"Bearer {key}x"}))
            assert len(told) > 30
            for answer in told:
                for secret in (key, text):
                    assert secret not in answer.text, (answer.request.url, answer.text[:300])
                    assert secret not in str(answer.headers)

    with caplog.at_level(logging.DEBUG, access_log.name):
        run(test())
    assert any("RuntimeError" in record.getMessage() for record in caplog.records), "else the failure was not logged"
    assert key not in caplog.text
    assert text not in caplog.text


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k")

    async def test() -> None:
        async with client(FakeBackend(), api_keys=SecretRef(f"file:{tmp_path}/keys")) as http:
            page = await http.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "http://" not in page.text
            assert "https://" not in page.text
            assert_tei_error(await http.get("/load"), 401, "Unauthorized")
            assert_tei_error(await http.post("/", json={"inputs": "x"}), 401, "Unauthorized")

    run(test())
