"""The HTTP side over a fake backend: OpenAI's forms in and out, limits, keys, errors. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ray import cloudpickle
from ray.serve import Application

from ullme_ray.errors import ServeError, UllmeError
from ullme_ray.serve import build_app, front
from ullme_ray.serve.app import create_api
from ullme_ray.serve.keys import KeyRing
from ullme_ray.serve.schemas import ApiError, EmbedCall, EmbedReply, ServedModel
from ullme_ray.spec import JobSpec, parse_job
from ullme_ray.spec.job import ServeSpec
from ullme_ray.spec.secrets import SecretRef

NAME = "tiny-search"
MODEL = ServedModel(
    name=NAME, fingerprint="f" * 64, dim=4, max_tokens=128, vocab_size=300, pooling="mean", dtype="float32", versions={}
)


class FakeBackend:
    """A text's vector is (its length, prompt is query, 0.1, 1/3); ids count as their sum."""

    def models(self) -> list[str]:
        return [NAME]

    def __init__(self) -> None:
        self.calls: list[EmbedCall] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def embed(self, call: EmbedCall) -> EmbedReply:
        self.calls.append(call)
        await self.open.wait()
        if self.error:
            raise self.error
        sizes = [len(t) for t in call.texts] if call.texts is not None else [sum(ids) for ids in call.token_ids or []]
        rows = [[size, call.prompt == "query", 0.1, 1 / 3] for size in sizes]
        return EmbedReply(np.array(rows, dtype=np.float32)[:, : call.dimensions], sizes, num_truncated=1)

    async def describe(self, model: str, *, wake: bool = True) -> ServedModel:
        if self.error:
            raise self.error
        return MODEL


def client(backend: Any, **settings: Any) -> httpx.AsyncClient:
    api = create_api(NAME, ServeSpec(**settings), backend)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 30)

    asyncio.run(bounded())


def assert_error(answer: httpx.Response, status: int, *, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    return error


def test_answers_have_the_form_of_openai() -> None:
    async def test() -> None:
        async with client(FakeBackend()) as http:
            answer = await http.post("/v1/embeddings", json={"input": ["ab", "abcd"], "model": NAME, "user": "me"})
            assert answer.status_code == 200
            assert answer.headers["x-truncated-inputs"] == "1"
            body = answer.json()
            assert body["object"] == "list"
            assert body["model"] == NAME
            assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
            assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", 0), ("embedding", 1)]
            expected = np.array([[2, 0, 0.1, 1 / 3], [4, 0, 0.1, 1 / 3]], dtype=np.float32)
            assert np.array_equal(np.array([item["embedding"] for item in body["data"]], dtype=np.float32), expected)

            answer = await http.post("/v1/embeddings", json={"input": "abc", "model": NAME, "encoding_format": "base64"})
            packed = base64.b64decode(answer.json()["data"][0]["embedding"])
            assert np.frombuffer(packed, dtype="<f4").tolist() == np.array([3, 0, 0.1, 1 / 3], dtype=np.float32).tolist()

            listed = (await http.get("/v1/models")).json()
            assert listed["object"] == "list"
            assert [(m["id"], m["object"]) for m in listed["data"]] == [(NAME, "model")]
            assert (await http.get(f"/v1/models/{NAME}")).json() == listed["data"][0]
            info = (await http.get("/info")).json()
            assert info["name"] == NAME
            assert info["dim"] == 4
            assert (await http.get("/health")).status_code == 200

    run(test())


def test_the_four_forms_of_input_reach_the_model() -> None:
    async def test() -> None:
        backend = FakeBackend()
        async with client(backend) as http:
            for value in ("hello", ["hello", "you"], [1, 2, 3], [[1, 2], [3]]):
                answer = await http.post("/v1/embeddings", json={"input": value, "model": NAME})
                assert answer.status_code == 200, answer.text
        assert [(call.texts, call.token_ids) for call in backend.calls] == [
            (["hello"], None),
            (["hello", "you"], None),
            (None, [[1, 2, 3]]),
            (None, [[1, 2], [3]]),
        ]

    run(test())


def test_input_type_picks_the_prompt_and_null_means_absent() -> None:
    async def test() -> None:
        backend = FakeBackend()
        async with client(backend) as http:
            for extra in ({}, {"input_type": "query"}, {"input_type": "passage"}, {"dimensions": 2}):
                await http.post("/v1/embeddings", json={"input": "x", "model": NAME, **extra})
            nulls = dict.fromkeys(("user", "dimensions", "encoding_format", "input_type"))
            await http.post("/v1/embeddings", json={"input": "x", "model": NAME, **nulls})
        assert [(call.prompt, call.dimensions) for call in backend.calls] == [
            ("passage", None),
            ("query", None),
            ("passage", None),
            ("passage", 2),
            ("passage", None),
        ]

    run(test())


def body(**fields: Any) -> bytes:
    return json.dumps({"input": "x", "model": NAME} | fields).encode()


BAD_REQUESTS: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, None),
    "not json": (b"hello", 400, None),
    "cut off": (b'{"input": "x", "mod', 400, None),
    "latin-1": ('{"input": "é", "model": "tiny-search"}'.encode("latin-1"), 400, None),
    "utf-16": ('{"input": "x", "model": "tiny-search"}'.encode("utf-16"), 400, None),
    "byte order mark": (b"\xef\xbb\xbf" + body(), 400, None),
    "NaN": (b'{"input": "x", "model": "tiny-search", "dimensions": NaN}', 400, None),
    "infinity in input": (b'{"input": [Infinity], "model": "tiny-search"}', 400, None),
    "deep": (b'{"input": ' + b"[" * 200_000 + b"]" * 200_000 + b', "model": "tiny-search"}', 400, None),
    "an integer of 5000 digits": (b'{"input": [' + b"9" * 5000 + b'], "model": "tiny-search"}', 400, None),
    "a list": (b"[1]", 400, None),
    "a string": (b'"x"', 400, None),
    "null": (b"null", 400, None),
    "no input": (b'{"model": "tiny-search"}', 400, "input"),
    "no model": (b'{"input": "x"}', 400, "model"),
    "another model": (body(model="gpt"), 404, "model"),
    "model is a number": (body(model=3), 400, "model"),
    "model is a path": (body(model="../../etc/passwd"), 404, "model"),
    "model is half a surrogate pair": (b'{"input": "x", "model": "\\ud800"}', 404, "model"),
    "model is endless": (body(model="m" * 100_000), 404, "model"),
    "unknown field": (body(dimension=3), 400, None),
    "unknown field, half a surrogate pair": (b'{"input": "x", "model": "tiny-search", "\\udfff": 1}', 400, None),
    "empty text": (body(input=""), 400, "input"),
    "an empty text among others": (body(input=["x", ""]), 400, "input"),
    "empty list": (body(input=[]), 400, "input"),
    "input is null": (body(input=None), 400, "input"),
    "input is a number": (body(input=7), 400, "input"),
    "input is an object": (body(input={"text": "x"}), 400, "input"),
    "input is true": (body(input=True), 400, "input"),
    "input holds booleans": (body(input=[True, False]), 400, "input"),
    "input holds null": (body(input=["x", None]), 400, "input"),
    "texts and ids mixed": (body(input=["x", 1]), 400, "input"),
    "ids and lists mixed": (body(input=[1, [2]]), 400, "input"),
    "ids are floats": (body(input=[1.0, 2.5]), 400, "input"),
    "texts in nested lists": (body(input=[["x"]]), 400, "input"),
    "three levels": (body(input=[[[1]]]), 400, "input"),
    "no ids": (body(input=[[]]), 400, "input"),
    "no ids among others": (body(input=[[1], []]), 400, "input"),
    "negative id": (body(input=[-1]), 400, "input"),
    "id just out of the vocabulary": (body(input=[299, 300]), 400, "input"),
    "huge id": (body(input=[[2**70]]), 400, "input"),
    "half a surrogate pair": (b'{"input": "\\ud83d", "model": "tiny-search"}', 400, "input"),
    "too many inputs": (body(input=["x"] * 9), 400, "input"),
    "dimensions 0": (body(dimensions=0), 400, "dimensions"),
    "dimensions negative": (body(dimensions=-3), 400, "dimensions"),
    "dimensions above the model's": (body(dimensions=5), 400, "dimensions"),
    "dimensions huge": (body(dimensions=10**400), 400, "dimensions"),
    "dimensions a float": (body(dimensions=2.5), 400, "dimensions"),
    "dimensions a string": (body(dimensions="2"), 400, "dimensions"),
    "dimensions true": (body(dimensions=True), 400, "dimensions"),
    "encoding_format unknown": (body(encoding_format="hex"), 400, "encoding_format"),
    "encoding_format a list": (body(encoding_format=["float"]), 400, "encoding_format"),
    "input_type unknown": (body(input_type="document"), 400, "input_type"),
    "user is a number": (body(user=1), 400, "user"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_told_what_is_wrong(case: str) -> None:
    content, status, param = BAD_REQUESTS[case]

    async def test() -> None:
        backend = FakeBackend()
        async with client(backend, max_inputs=8) as http:
            answer = await http.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
            assert_error(answer, status, param=param)
        assert backend.calls == []

    run(test())


def test_bodies_that_are_not_plain_json_or_too_large_are_refused() -> None:
    async def test() -> None:
        async with client(FakeBackend(), max_body_bytes=1000) as http:
            large = body(input="x" * 1000)
            assert_error(await http.post("/v1/embeddings", content=large, headers={"content-type": "application/json"}), 413)

            async def pieces() -> Any:  # no content-length
                for start in range(0, len(large), 100):
                    yield large[start : start + 100]

            assert_error(await http.post("/v1/embeddings", content=pieces(), headers={"content-type": "application/json"}), 413)
            lying = {"content-type": "application/json", "content-length": "9" * 30}
            assert_error(await http.post("/v1/embeddings", content=body(), headers=lying), 413)
            form = {"content-type": "application/x-www-form-urlencoded"}
            assert_error(await http.post("/v1/embeddings", content=body(), headers=form), 415)
            zipped = {"content-type": "application/json", "content-encoding": "gzip"}
            assert_error(await http.post("/v1/embeddings", content=body(), headers=zipped), 415)
            utf8 = {"content-type": "application/json; charset=utf-8"}
            assert (await http.post("/v1/embeddings", content=body(), headers=utf8)).status_code == 200

    run(test())


def test_unknown_routes_and_methods_answer_in_the_same_form() -> None:
    async def test() -> None:
        async with client(FakeBackend()) as http:
            assert_error(await http.get("/nowhere"), 404)
            assert_error(await http.get("/v1/embeddings"), 405)
            assert (await http.delete("/health")).status_code == 405
            assert assert_error(await http.get("/v1/models/other"), 404, param="model")["code"] == "model_not_found"

    run(test())


def test_one_request_too_many_gets_429_at_once_and_the_place_is_given_back() -> None:
    async def test() -> None:
        backend = FakeBackend()
        backend.open.clear()
        async with client(backend, max_queued_requests=2) as http:
            first = [asyncio.create_task(http.post("/v1/embeddings", content=body(), headers=JSON)) for _ in range(2)]
            while len(backend.calls) < 2:
                await asyncio.sleep(0)
            refused = await http.post("/v1/embeddings", content=body(), headers=JSON)
            assert assert_error(refused, 429)["code"] == "rate_limit_exceeded"
            assert int(refused.headers["retry-after"]) >= 1
            backend.open.set()
            assert [(await task).status_code for task in first] == [200, 200]
            for _ in range(5):  # errors give their place back too
                assert (await http.post("/v1/embeddings", content=b"?", headers=JSON)).status_code == 400
            assert (await http.post("/v1/embeddings", content=body(), headers=JSON)).status_code == 200

    run(test())


JSON = {"content-type": "application/json"}


def test_a_body_that_does_not_come_is_408_and_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullme_ray.serve.limits.BODY_TIMEOUT_S", 0.05)

    async def test() -> None:
        async def stuck() -> Any:
            yield body()[:5]
            await asyncio.Event().wait()

        async with client(FakeBackend(), max_queued_requests=1) as http:
            assert_error(await http.post("/v1/embeddings", content=stuck(), headers=JSON), 408)
            assert (await http.post("/v1/embeddings", content=body(), headers=JSON)).status_code == 200

    run(test())


def test_a_missing_model_is_503_and_a_failing_one_500_without_details() -> None:
    async def test() -> None:
        backend = FakeBackend()
        async with client(backend) as http:
            backend.error = ApiError(503, "no model replica answered in time", kind="server_error")
            assert (await http.get("/health")).status_code == 503
            assert_error(await http.post("/v1/embeddings", content=body(), headers=JSON), 503)
            backend.error = RuntimeError("secret detail")
            answer = await http.post("/v1/embeddings", content=body(), headers=JSON)
            assert assert_error(answer, 500)["type"] == "server_error"
            assert "secret detail" not in answer.text

    run(test())


def test_keys_open_all_but_health(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\n second-key ,third-key\n\n")

    async def test() -> None:
        async with client(FakeBackend(), api_keys=SecretRef(f"file:{keys}")) as http:
            for path in ("/v1/models", "/openapi.json", "/nowhere"):
                assert assert_error(await http.get(path), 401)["code"] == "invalid_api_key"
            assert (await http.get("/health")).status_code == 200
            refused: list[bytes] = [
                b"",
                b"Bearer",
                b"Bearer ",
                b"Bearer wrong",
                b"first-key",
                b"Basic first-key",
                b"Bearer \xff\xfe",
            ]
            refused += [b"Bearer first-key,second-key", b"Bearer " + b"k" * 10_000, b"Bearer first-ke"]
            for header in refused:
                answer = await http.post("/v1/embeddings", content=body(), headers=[*JSON.items(), (b"authorization", header)])
                assert_error(answer, 401)
            for header in (b"Bearer first-key", b"Bearer second-key", b"bearer third-key"):
                answer = await http.post("/v1/embeddings", content=body(), headers=[*JSON.items(), (b"authorization", header)])
                assert answer.status_code == 200

    run(test())


def test_keys_are_kept_as_hashes_and_must_exist(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("planted-key")
    ring = KeyRing(SecretRef(f"file:{keys}"))
    assert ring.accepts(b"Bearer planted-key")
    assert "planted-key" not in repr(vars(ring))
    assert KeyRing(None).accepts(b"")
    keys.write_text(" , \n,")
    with pytest.raises(ServeError, match="holds no key"):
        KeyRing(SecretRef(f"file:{keys}"))
    with pytest.raises(UllmeError, match="cannot be read"):
        KeyRing(SecretRef("env:ULLME_TEST_NO_SUCH_VARIABLE"))


def test_the_ingress_loads_no_torch() -> None:
    code = "import sys, ullme_ray.serve.ingress as _; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['numpy']"


def test_the_proxy_sees_none_of_the_clients_control_headers() -> None:
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(name for name, _ in scope["headers"])
        ids = [(b"x-request-id", b"of the ingress"), (b"content-type", b"x"), (b"X-Request-Id", b"of Serve")]
        await send({"type": "http.response.start", "status": 200, "headers": ids})

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    dropped = [
        (b"x-session-id", b"1"),
        (b"X_Session_ID", b"\xff"),
        (b"serve_multiplexed_model_id", b"m"),
        (b"x-request-id", b"\xff"),
    ]
    dropped += [(b"x-request-timeout-seconds", b"0.001"), (b"x-request-disconnect-disabled", b"?1"), (b"x-request-id", b"a\nb")]
    kept = [(b"authorization", b"Bearer k"), (b"x-request-id", b"abc-1"), (b"content-type", b"application/json")]

    async def test() -> None:
        (layer,) = front.middlewares()
        await layer.cls(app)({"type": "http", "headers": [*dropped, *kept]}, None, send)  # type: ignore[arg-type]

    run(test())
    assert seen == [name for name, _ in kept]
    assert sent[0]["headers"] == [(b"x-request-id", b"of the ingress"), (b"content-type", b"x")]


def test_what_is_handed_to_ray_holds_the_keys_reference_and_not_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLME_TEST_KEYS", "planted-key")
    job = parse_job(b"name: tiny\nmodel: {base: ./x}\nserve: {api_keys: env:ULLME_TEST_KEYS, replicas: {min: 1, max: 3}}")
    pickled = cloudpickle.dumps(build_app(job))
    assert b"ULLME_TEST_KEYS" in pickled
    assert b"planted-key" not in pickled


def versions(tree: dict[str, Any], **changed: Any) -> dict[str, str]:
    """What Ray Serve goes by when it decides which processes an update replaces."""
    serve = {"api_keys": "env:ULLME_TEST_KEYS", **changed}
    listener = build_app(JobSpec.model_validate({**tree, "serve": serve}), ("127.0.0.1", 8000))._bound_deployment
    (replica,) = [arg._bound_deployment for arg in listener.init_args if isinstance(arg, Application)]
    return {"listener": listener.version, "replica": replica.version}


def test_an_update_replaces_only_processes_that_are_told_something_new() -> None:
    tree = {"name": "tiny", "model": {"base": "./x"}}
    plain = versions(tree)
    assert versions(tree, replicas={"min": 2, "max": 5}) == plain
    other = versions(tree, tokens_per_batch=77)
    assert plain["listener"] != other["listener"]
    assert plain["replica"] != other["replica"]


def test_processes_that_end_wait_for_the_longest_request() -> None:
    job = parse_job(b"name: tiny\nmodel: {base: ./x}\nserve: {request_timeout_s: 1234}")
    waits = []
    for address in (("127.0.0.1", 8000), None):
        front = build_app(job, address)._bound_deployment
        (replica,) = [arg._bound_deployment for arg in front.init_args if isinstance(arg, Application)]
        waits += [front._deployment_config.graceful_shutdown_timeout_s, replica._deployment_config.graceful_shutdown_timeout_s]
    assert len(waits) == 4
    assert min(waits) > 1234


def test_an_update_takes_up_a_newly_published_model_unless_replicas_do_so_themselves(tmp_path: Path) -> None:
    tree = {"name": "tiny", "storage": str(tmp_path), "model": {"base": "./x"}, "train": {"data": [{"path": "x.jsonl"}]}}
    export = tmp_path / "tiny" / "model"
    export.mkdir(parents=True)
    (export / "modules.json").write_text("[]")
    before, reloading = versions(tree), versions(tree, reload_s=5)
    (export / "model.safetensors").write_bytes(b"other weights")
    after = versions(tree)
    assert before["listener"] == after["listener"]
    assert before["replica"] != after["replica"]
    assert versions(tree, reload_s=5) == reloading
