"""Clients of both APIs, unchanged, against a real server: each gets the vectors of the export, which the table holds too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from fake_backend import MAX_TOKENS
from huggingface_hub import InferenceClient
from nasty_requests import MAX_BODY_BYTES, MAX_INPUTS, nasty_requests
from sentence_transformers import SentenceTransformer

from ullme_ray.embed import run_embed
from ullme_ray.model.export import export_encoder
from ullme_ray.serve import Server, start_server
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.table import open_table
from ullme_ray.vectors import VectorFormat

KEY = "planted-key-91ab"
SECRET_TEXT = "planted sentence about herons"
TEXTS = ["the bucket policy", "access private object " * 9, "query", "returns a value. " * 70, "deletes the key"]


@dataclass(frozen=True)
class Running:
    server: Server
    job: JobSpec
    export: SentenceTransformer  # the served folder, as any user would load it

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=60, trust_env=False)

    def exported(self, prompt: str = "passage") -> np.ndarray:
        return np.asarray(self.export.encode(TEXTS, prompt_name=prompt, show_progress_bar=False))  # (N, D)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, ray_local: None) -> Iterator[Running]:
    from transformers import AutoModel, AutoTokenizer

    tmp = tmp_path_factory.mktemp("clients")
    (tmp / "keys").write_text(KEY)
    (tmp / "in.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    job = {
        "name": "tiny-search",
        "storage": f"{tmp}/runs",
        "model": {
            "base": f"{tmp}/export",
            "max_tokens": MAX_TOKENS,
            "prompts": {"query": "make a query: ", "passage": "a key "},
        },
        "embed": {"input": {"path": f"{tmp}/in.jsonl", "id": "id", "text": ["text"]}},
        "serve": {
            "port": 0,
            "api_keys": f"file:{tmp}/keys",
            "max_inputs": MAX_INPUTS,
            "max_body_bytes": MAX_BODY_BYTES,
            "replicas": {"min": 1, "max": 1},
        },
    }
    parsed = parse_job(json.dumps(job).encode())
    backbone, tokenizer = AutoModel.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    (tmp / "export").mkdir()
    export_encoder(backbone, tokenizer, parsed, f"{tmp}/export", training={"steps": 0})
    run_embed(parsed)
    with start_server(parsed) as server:
        yield Running(server, parsed, SentenceTransformer(f"{tmp}/export", device="cpu"))


def assert_same(vectors: Any, expected: np.ndarray) -> None:
    given = np.asarray(vectors, dtype=np.float64)
    assert given.shape == expected.shape
    assert np.linalg.norm(given, axis=1) == pytest.approx(1, abs=1e-5)
    assert (given * expected).sum(axis=1).min() >= 0.999999


def test_both_apis_the_table_and_the_export_agree(running: Running) -> None:
    expected = running.exported()
    with running.http() as http:
        openai = http.post("/v1/embeddings", json={"model": running.job.name, "input": TEXTS}).json()
        assert_same([row["embedding"] for row in openai["data"]], expected)
        assert_same(http.post("/embed", json={"inputs": TEXTS[::-1]}).json()[::-1], expected)
        one_by_one = [http.post("/embed", json={"inputs": text}).json()[0] for text in TEXTS]
        assert_same(one_by_one, expected)
        scores = http.post("/similarity", json={"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS}}).json()
        assert scores == pytest.approx((expected @ expected[0]).tolist(), abs=1e-5)
        raw = np.asarray(http.post("/embed", json={"inputs": TEXTS, "normalize": False}).json())
        assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 1e-3
        assert_same(raw / np.linalg.norm(raw, axis=1, keepdims=True), expected)
    rows = open_table(RunFolder.of(running.job).resolve("run:embeddings")).to_pyarrow_table().sort_by("id")
    assert_same(np.stack(rows["embedding"].to_pylist()), expected)


def test_states_tokens_and_text_come_from_the_served_model(running: Running) -> None:
    tokenizer = running.export.tokenizer
    with running.http() as http:
        (states,) = http.post("/embed_all", json={"inputs": TEXTS[0]}).json()
        prompt_length = len(tokenizer("a key ")["input_ids"])
        assert_same(
            [np.mean(states[prompt_length:], axis=0) / np.linalg.norm(np.mean(states[prompt_length:], axis=0))],
            running.exported()[:1],
        )
        (tokens,) = http.post("/tokenize", json={"inputs": TEXTS[0]}).json()
        ids = [token["id"] for token in tokens]
        assert ids == tokenizer("a key " + TEXTS[0])["input_ids"]
        assert len(ids) == len(states)
        assert http.post("/decode", json={"ids": ids}).json() == ["a key " + TEXTS[0]]
        info = http.get("/info").json()
        assert info["model_sha"] == info["fingerprint"]
        assert info["max_input_length"] == MAX_TOKENS


def test_number_types_are_those_of_the_vectors(running: Running) -> None:
    with running.http() as http:
        answer = http.post("/v1/embeddings", json={"model": running.job.name, "input": TEXTS, "output_dtype": "ubinary"}).json()
    packed = np.array([row["embedding"] for row in answer["data"]], np.uint8)
    same_bits = np.unpackbits(packed) == np.unpackbits(VectorFormat("ubinary").encode(running.exported()))
    assert same_bits.mean() > 0.99  # a number next to zero may fall on either side


def test_langchain_gets_the_exports_vectors(running: Running) -> None:
    from langchain_openai import OpenAIEmbeddings

    client = OpenAIEmbeddings(
        model=running.job.name,
        base_url=f"{running.server.url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        check_embedding_ctx_length=False,  # else it sends ids of OpenAI's own tokenizer
    )
    assert_same(client.embed_documents(TEXTS), running.exported())
    as_query = OpenAIEmbeddings(
        model=running.job.name,
        base_url=f"{running.server.url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
        model_kwargs={"extra_body": {"input_type": "query"}},
    )
    assert_same([as_query.embed_query(TEXTS[0])], running.exported("query")[:1])


def test_llama_index_gets_the_exports_vectors(running: Running) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    client = OpenAIEmbedding(model_name=running.job.name, api_base=f"{running.server.url}/v1", api_key=KEY, embed_batch_size=2)
    assert_same(client.get_text_embedding_batch(TEXTS[:3]), running.exported()[:3])
    assert_same([client.get_query_embedding(TEXTS[0])], running.exported()[:1])


def test_hugging_face_gets_the_exports_vectors(running: Running) -> None:
    client = InferenceClient(f"{running.server.url}/embed", token=KEY)
    assert_same(client.feature_extraction(TEXTS[1]), running.exported()[1:2])
    as_query = client.feature_extraction(
        TEXTS[0], prompt_name="query", normalize=True, truncate=True, truncation_direction="right"
    )
    assert_same(as_query, running.exported("query")[:1])
    scores = InferenceClient(f"{running.server.url}/similarity", token=KEY).sentence_similarity(TEXTS[0], TEXTS[1:3])
    assert scores == pytest.approx((running.exported()[1:3] @ running.exported()[0]).tolist(), abs=1e-5)


def test_nasty_requests_are_refused_and_change_nothing(running: Running) -> None:
    probe = {"inputs": TEXTS}
    with running.http() as http:
        before = http.post("/embed", json=probe).json()
        for name, method, path, content, headers in nasty_requests(running.job.name):
            try:
                answer = http.request(method, path, content=content, headers=headers)
            except httpx.RemoteProtocolError:
                assert len(content) > MAX_BODY_BYTES, name  # refused before all of it was sent
                continue
            assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text[:200])
            assert "error" in answer.json(), name
        assert_same(http.post("/embed", json=probe).json(), np.array(before))


def test_metrics_page_and_log_tell_of_the_replicas_but_no_secret(running: Running) -> None:
    with running.http() as http:
        answer = http.post("/embed", json={"inputs": [SECRET_TEXT, "x"]}, headers={"x-request-id": "seen-1"})
        assert answer.headers["x-request-id"] == "seen-1"
        metrics = http.get("/metrics").text
        for name in (
            "te_request_count",
            "te_request_success",
            "te_request_duration_bucket",
            "te_embed_tokens",
            "te_queue_size",
        ):
            assert f"\n{name}" in metrics
        assert f'te_batch_count{{model="{running.job.name}"}}' in metrics
        shown = [metrics, http.get("/load").text, http.get("/").text]
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    logs = {path: path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}
    entries = [
        json.loads(line)
        for path, content in logs.items()
        if path.match("serve/access-*.jsonl")
        for line in content.splitlines()
    ]
    (entry,) = [entry for entry in entries if entry["request_id"] == "seen-1"]
    assert (entry["route"], entry["status"], entry["inputs"], entry["model"]) == ("/embed", 200, 2, running.job.name)
    for content in [*shown, *logs.values()]:
        assert KEY not in content
        assert SECRET_TEXT not in content
