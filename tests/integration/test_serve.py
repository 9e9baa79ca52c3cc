"""The server on a real Ray: the official client, equal vectors, bad requests, replicas killed under load, keys, secrets."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import ray

from ullme_ray.errors import ModelError, ServeError, UllmeError
from ullme_ray.model import Encoder, open_encoder
from ullme_ray.serve import Server, preflight, start_server
from ullme_ray.spec import JobSpec, parse_job

KEY = "planted-key-7c1f"
SECRET_TEXT = "planted sentence about otters"
WORDS = ["bucket", "object", "policy", "access", "private", "public", "table", "query", "returns", "value", "request"]


@dataclass(frozen=True)
class Running:
    server: Server
    job: JobSpec
    encoder: Encoder

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str | None = KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=60, trust_env=False)


def make_job(tmp: Path, base: str, **serve: object) -> JobSpec:
    settings = {"port": 0, "replicas": {"min": 1, "max": 1}} | serve
    job = {
        "name": "tiny-search",
        "storage": str(tmp / "runs"),
        "model": {"base": base, "max_tokens": 128, "prompts": {"query": "make a query: ", "passage": ""}},
        "serve": settings,
    }
    return parse_job(json.dumps(job).encode())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, ray_local: None) -> Iterator[Running]:
    tmp = tmp_path_factory.mktemp("serve")
    (tmp / "keys").write_text(f"other-key\n{KEY}\n")
    job = make_job(
        tmp,
        tiny_base,
        api_keys=f"file:{tmp}/keys",
        replicas={"min": 2, "max": 2},
        tokens_per_batch=512,
        max_inputs=300,
        max_body_bytes=6_000_000,
    )
    encoder = open_encoder(job, device="cpu")
    with start_server(job) as server:
        yield Running(server, job, encoder)


def test_a_model_that_differs_from_its_probe_is_not_served(tmp_path: Path, tiny_base: str, ray_local: None) -> None:
    """Comes before the module's server is up, for there is one per cluster."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    wrong = {"prompt": "passage", "text": "bucket", "embedding": [1.0] + [0.0] * 31}
    (folder / "probe.json").write_text(json.dumps({"fingerprint": "", "entries": [wrong]}))
    with pytest.raises(ServeError, match="computes other vectors than when it was exported"):
        start_server(make_job(tmp_path, str(folder)))


def assert_same(vectors: object, expected: np.ndarray) -> None:
    given = np.asarray(vectors, dtype=np.float64)
    assert given.shape == expected.shape
    assert np.linalg.norm(given, axis=1) == pytest.approx(1, abs=1e-5)
    assert (given * expected).sum(axis=1).min() >= 0.999999


def some_texts(count: int, seed: int) -> list[str]:
    """Texts of 1 to 60 words, some cut by max_tokens."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.choice([1, 2, 5, 9, 20, 60]))) for _ in range(count)]


def test_the_openai_client_gets_the_encoders_vectors(running: Running) -> None:
    client, encoder, name = running.client(), running.encoder, running.job.name
    texts = some_texts(20, seed=1)
    for encoding in (openai.omit, "float", "base64"):
        answer = client.embeddings.create(input=texts, model=name, encoding_format=encoding)  # type: ignore[arg-type]
        vectors = [item.embedding for item in answer.data]
        if encoding == "base64":  # asked for by name, the client hands it over as it came
            vectors = [v if isinstance(v, list) else np.frombuffer(base64.b64decode(v), "<f4") for v in vectors]
        assert_same(vectors, encoder.encode(texts))
        assert answer.model == name
        assert [item.index for item in answer.data] == list(range(20))
        assert answer.usage.prompt_tokens == encoder.tokenizer.tokenize(texts, "passage").num_tokens
    assert_same([client.embeddings.create(input=texts[0], model=name).data[0].embedding], encoder.encode(texts[:1]))
    assert [model.id for model in client.models.list()] == [name]


def test_prompts_token_ids_and_dimensions(running: Running) -> None:
    client, encoder, name = running.client(), running.encoder, running.job.name
    texts = some_texts(6, seed=2)
    as_query = client.embeddings.create(input=texts, model=name, extra_body={"input_type": "query"})
    assert_same([item.embedding for item in as_query.data], encoder.encode(texts, "query"))
    assert not np.allclose(encoder.encode(texts, "query"), encoder.encode(texts), atol=1e-3), (
        "else the line above shows nothing"
    )

    ids = encoder.tokenizer.tokenize(texts, "passage").input_ids
    by_ids = client.embeddings.create(input=ids, model=name)
    assert_same([item.embedding for item in by_ids.data], encoder.encode(texts))
    assert_same([client.embeddings.create(input=ids[0], model=name).data[0].embedding], encoder.encode(texts[:1]))

    short = client.embeddings.create(input=texts, model=name, dimensions=8)
    cut = encoder.encode(texts)[:, :8]
    assert_same([item.embedding for item in short.data], cut / np.linalg.norm(cut, axis=1, keepdims=True))


def test_any_mix_and_order_of_concurrent_requests_gives_the_same_vectors(running: Running) -> None:
    texts = some_texts(150, seed=3)
    expected = {prompt: running.encoder.encode(texts, prompt) for prompt in ("query", "passage")}  # type: ignore[arg-type]
    choose = random.Random(4)
    requests = [
        (choose.sample(range(150), choose.choice([1, 1, 3, 40])), choose.choice(["query", "passage"])) for _ in range(80)
    ]

    async def ask(client: openai.AsyncOpenAI, rows: list[int], prompt: str) -> None:
        answer = await client.embeddings.create(
            input=[texts[row] for row in rows], model=running.job.name, extra_body={"input_type": prompt}
        )
        assert_same([item.embedding for item in answer.data], expected[prompt][rows])

    async def ask_all() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
            await asyncio.gather(*(ask(client, rows, prompt) for rows, prompt in requests))

    asyncio.run(ask_all())


def test_info_health_and_truncation_are_visible(running: Running) -> None:
    with running.http() as http:
        info = http.get("/info").json()
        assert (info["name"], info["dim"], info["max_tokens"]) == (running.job.name, running.encoder.dim, 128)
        assert info["fingerprint"] == running.encoder.fingerprint
        assert (info["pooling"], info["dtype"]) == ("mean", "float32")
        assert http.get("/health").status_code == 200
        assert 'te_replicas{model="tiny-search"} 2.0' in http.get("/metrics").text
        answer = http.post("/v1/embeddings", json={"input": ["bucket " * 500, "bucket"], "model": running.job.name})
        assert answer.headers["x-truncated-inputs"] == "1"


def test_a_request_and_an_answer_of_more_than_four_mebibytes_arrive(running: Running) -> None:
    """By token ids, of which each takes two bytes in the request, also between Ray's processes."""
    assert 300 * 8_000 * 2 > 4 * 2**20
    assert 300 * 128 * 32 * 4 > 4 * 2**20
    with running.http() as http:
        answer = http.post("/embed_all", json={"inputs": [[5] * 8_000] * 300}, timeout=300)
    assert answer.status_code == 200, answer.text[:300]
    assert np.array(answer.json()).shape == (300, 128, 32)


def bad_requests(name: str) -> list[tuple[str, str, bytes]]:
    """(method, path, body) that must be refused in JSON."""

    def body(**fields: object) -> bytes:
        return json.dumps({"input": "x", "model": name} | fields).encode()

    inputs: list[object] = ["", [], None, 7, 1.5, True, {}, ["x", ""], ["x", 1], [[]], [[1], []], [-1], [10**6], [[2**80]]]
    inputs += [[1.5], [None], [["x"]], [[[1]]], ["x"] * 301, [[1], "x"], [False]]
    raw = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'"x"',
        b"[" * 100_000,
        b"{}" * 3,
        b'{"input":"\\ud800","model":"%s"}' % name.encode(),
    ]
    raw += [
        b'{"input":[NaN],"model":"x"}',
        b'{"input":[' + b"9" * 6000 + b"]}",
        b'{"input":[1e999],"model":"%s"}' % name.encode(),
    ]
    raw += [
        body(**extra)
        for extra in ({"model": "gpt"}, {"model": 1}, {"dimensions": 0}, {"dimensions": -1}, {"dimensions": 10**30})
    ]
    raw += [
        body(**extra)
        for extra in ({"dimensions": "8"}, {"encoding_format": "hex"}, {"input_type": "doc"}, {"user": 3}, {"x": 1})
    ]
    raw += [b"x" * 7_000_000, b'{"input":"' + b"y" * 6_000_000 + b'"}']
    posts = [("POST", "/v1/embeddings", content) for content in [*raw, *(body(input=value) for value in inputs)]]
    others = [
        ("GET", "/v1/embeddings"),
        ("PUT", "/v1/embeddings"),
        ("POST", "/health"),
        ("GET", "/nope"),
        ("POST", "/v1/embeddings/"),
    ]
    return [*posts, *((method, path, b"") for method, path in [*others, ("GET", "/v1/models/other"), ("GET", "/%ff/../etc")])]


def test_bad_requests_are_refused_in_json_and_change_nothing(running: Running) -> None:
    probe = {"input": some_texts(5, seed=5), "model": running.job.name}
    cases = bad_requests(running.job.name)
    assert len(cases) >= 40
    with running.http() as http:
        before = http.post("/v1/embeddings", json=probe).json()

        def send(case: tuple[str, str, bytes]) -> tuple[tuple[str, str, bytes], httpx.Response]:
            method, path, content = case
            return case, http.request(method, path, content=content, headers={"content-type": "application/json"})

        with ThreadPoolExecutor(4) as pool:
            for case, answer in pool.map(send, cases):
                shown = (*case[:2], case[2][:60], answer.status_code, answer.text[:200])
                assert answer.status_code in (400, 404, 405, 413), shown
                told = answer.json()
                if case[1] == "/health":  # a route of TEI's answers in TEI's form
                    assert set(told) == {"error", "error_type"}, shown
                else:
                    assert set(told["error"]) == {"message", "type", "param", "code"}, shown
        after = http.post("/v1/embeddings", json=probe).json()
    assert_same([item["embedding"] for item in after["data"]], np.array([item["embedding"] for item in before["data"]]))


def test_odd_headers_are_no_error(running: Running) -> None:
    odd = [
        (b"x-request-id", b"\xff"),
        (b"x-session-id", b"\xff"),
        (b"serve-multiplexed-model-id", b"\xff"),
        (b"x-note", b"\xfe"),
    ]
    odd += [(b"x-request-timeout-seconds", b"0.0001"), (b"x-request-timeout-seconds", b"\xff"), (b"accept", b"nonsense")]
    with running.http() as http:
        for header in odd:
            assert http.get("/info", headers=[header]).status_code == 200, header


def test_a_client_that_hangs_up_harms_nobody(running: Running) -> None:
    host, port = running.server.url.removeprefix("http://").split(":")
    content = json.dumps({"input": some_texts(200, seed=6), "model": running.job.name}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    for cut in (len(content), len(content) // 2, 0):
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, no goodbye
            connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[:cut])
    text = some_texts(1, seed=7)
    answer = running.client().embeddings.create(input=text, model=running.job.name)
    assert_same([answer.data[0].embedding], running.encoder.encode(text))


def test_keys_open_the_server_and_wrong_ones_do_not(running: Running) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        running.client("wrong").embeddings.create(input="x", model=running.job.name)
    assert error.value.code == "invalid_api_key"
    assert running.client("other-key").embeddings.create(input="x", model=running.job.name).data
    with running.http(None) as http:
        assert http.get("/health").status_code == 200
        for path in ("/info", "/v1/models", "/openapi.json", "/nope"):
            assert http.get(path).status_code == 401
    with pytest.raises(openai.NotFoundError) as missing:
        running.client().embeddings.create(input="x", model="other-model")
    assert missing.value.code == "model_not_found"


def replica_pids(deployment: str) -> list[int]:
    """Of this test's own Ray, by the title that Ray gives its processes."""
    ours = psutil.Process().children(recursive=True)
    return [p.pid for p in ours if " ".join(p.cmdline()).startswith(f"ray::ServeReplica:ullme_ray:{deployment}")]


def test_the_ingress_process_holds_no_torch(running: Running) -> None:
    listeners, embedders = replica_pids("Ingress"), replica_pids("Embedder")
    assert (len(listeners), len(embedders)) == (2, 2)
    assert "libtorch" in Path(f"/proc/{embedders[0]}/maps").read_text(), "else the next line shows nothing"
    assert not any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in listeners)


@pytest.mark.parametrize("victims", [1, 2])
def test_replicas_killed_under_load_fail_no_request(running: Running, victims: int) -> None:
    texts = [text * 60 for text in some_texts(40, seed=8)]  # long enough for a request to be running at any instant
    expected = running.encoder.encode(texts)
    pids = replica_pids("Embedder")
    assert pids
    counter = itertools.count()
    killed_at: list[int] = []

    async def ask(client: openai.AsyncOpenAI, until: int) -> None:
        while (number := next(counter)) < until:
            if number == 25:
                for pid in pids[:victims]:
                    psutil.Process(pid).send_signal(signal.SIGKILL)
                killed_at.append(number)
            answer = await client.embeddings.create(input=texts, model=running.job.name)
            assert_same([item.embedding for item in answer.data], expected)

    async def ask_all() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.server.url}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
            await asyncio.gather(*(ask(client, until=80) for _ in range(8)))

    asyncio.run(ask_all())
    assert killed_at == [25]
    assert not set(pids[:victims]) & set(replica_pids("Embedder"))


def test_a_smaller_pool_and_changed_settings_fail_no_request(running: Running) -> None:
    """Each request comes on a connection of its own and is asked once, while replicas and then listeners are replaced."""
    texts = some_texts(8, seed=9)
    expected, body = running.encoder.encode(texts), {"input": texts, "model": running.job.name}
    over, answers = threading.Event(), list[int]()

    def ask() -> None:
        while not over.is_set():
            with running.http() as client:
                answer = client.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            assert_same([item["embedding"] for item in answer.json()["data"]], expected)
            answers.append(answer.status_code)

    def change(**settings: object) -> None:
        changed = running.job.serve.model_copy(update=settings)  # type: ignore[union-attr]
        running.server.update(running.job.model_copy(update={"serve": changed}))

    one = running.job.serve.replicas.model_copy(update={"min": 1, "max": 1})  # type: ignore[union-attr]
    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask) for _ in range(3)]
        try:
            listeners, replicas = set(replica_pids("Ingress")), set(replica_pids("Embedder"))
            change(replicas=one)
            until(lambda: len(replica_pids("Embedder")) == 1)
            left = set(replica_pids("Embedder"))
            assert left < replicas
            assert set(replica_pids("Ingress")) == listeners
            change(replicas=one, tokens_per_batch=500)
            until(lambda: not left & set(replica_pids("Embedder")))
            until(lambda: not listeners & set(replica_pids("Ingress")))
            change()
            until(lambda: len(replica_pids("Embedder")) == 2)
            until(lambda: len(answers) > 20)
        finally:
            over.set()
        for client in clients:
            client.result()


def until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_key_and_no_text_reaches_a_log_or_an_environment(running: Running) -> None:
    client = running.client()
    client.embeddings.create(input=SECRET_TEXT, model=running.job.name)
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(input=[SECRET_TEXT, ""], model=running.job.name)
    assert SECRET_TEXT not in str(refused.value)
    logs = [path for path in Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert any("Ingress" in path.name for path in logs)
    for path in logs:
        content = path.read_bytes()
        assert KEY.encode() not in content, path
        assert SECRET_TEXT.encode() not in content, path
    for pid in [*replica_pids("Ingress"), *replica_pids("Embedder")]:
        assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_second_server_in_the_cluster_is_refused(running: Running) -> None:
    with pytest.raises(ServeError, match="already runs"):
        start_server(running.job)
    port = int(running.server.url.rsplit(":", 1)[1])
    serve = running.job.serve.model_copy(update={"port": port})  # type: ignore[union-attr]
    with pytest.raises(ServeError, match=f"serve.port = {port} is in use"):
        preflight(running.job.model_copy(update={"serve": serve}))


def test_preflight_names_what_is_missing(tmp_path: Path, tiny_base: str) -> None:
    with pytest.raises(UllmeError, match="env:ULLME_TEST_NO_SUCH_VARIABLE cannot be read"):
        preflight(make_job(tmp_path, tiny_base, api_keys="env:ULLME_TEST_NO_SUCH_VARIABLE"))
    with pytest.raises(ModelError, match="is not a folder"):
        preflight(make_job(tmp_path, str(tmp_path / "nowhere")))
    with pytest.raises(ServeError, match="cannot listen there"):
        preflight(make_job(tmp_path, tiny_base, host="203.0.113.7", port=8123))
