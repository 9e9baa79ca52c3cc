"""Several models, adapters, scaling to zero, a new model published under load, a listener killed: on a real Ray Serve."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import peft
import psutil
import pytest
import torch
from ray import serve

from ullme_ray.model import Encoder, open_encoder
from ullme_ray.model.backbone import load_backbone
from ullme_ray.model.export import export_encoder
from ullme_ray.model.tokenizing import load_tokenizer
from ullme_ray.serve import Server, start_server
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.spec.job import ModelSpec

TEXTS = [f"bucket policy number {n} gives access to the table" for n in range(12)]


def publish(job: JobSpec, base: str, *, shift: float) -> None:
    """An export of the base with its weights moved, as a run publishes it: `modules.json` goes first and comes last."""
    export = Path(RunFolder.of(job).export)
    backbone: Any = load_backbone(base, job.model)
    for parameter in backbone.parameters():
        parameter.data.mul_(1 + shift)
    new = export.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    export_encoder(backbone, load_tokenizer(base), job, str(new), training={})
    (export / "modules.json").unlink(missing_ok=True)
    for path in sorted(p for p in new.rglob("*") if p.is_file() and p.name != "modules.json"):
        target = export / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(shutil.copy(path, f"{target}.tmp")).replace(target)  # whole or not at all, as storage writes it
    shutil.copy(new / "modules.json", export)


@dataclass(frozen=True)
class Running:
    server: Server
    job: JobSpec
    encoder: Encoder

    def asynchronous(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.server.url}/v1", api_key="none", timeout=60, **options)

    def embed(self, model: str, texts: list[str] = TEXTS) -> np.ndarray:
        client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=120)
        return np.array([item.embedding for item in client.embeddings.create(input=texts, model=model).data])


def replicas_of(deployment: str) -> int:
    return sum(serve.status().applications["ullme_ray"].deployments[deployment].replica_states.values())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, ray_local: None) -> Iterator[Running]:
    tmp = tmp_path_factory.mktemp("models")
    backbone = load_backbone(tiny_base, ModelSpec(base=tiny_base))
    wrapped: Any = peft.get_peft_model(backbone, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(str(tmp / "legal"))
    tree = {
        "name": "own",
        "storage": str(tmp / "runs"),
        "model": {"base": tiny_base, "max_tokens": 128},
        "train": {"data": [{"path": "x.jsonl"}], "objective": "cl", "global_batch_size": 2, "max_steps": 1},
        "serve": {
            "port": 0,
            "reload_s": 0.5,
            "adapters": [{"name": "own-legal", "path": str(tmp / "legal")}],
            "models": [{"name": "org/plain", "base": tiny_base, "replicas": {"min": 0, "max": 1, "idle_s": 1}}],
        },
    }
    job = parse_job(json.dumps(tree).encode())
    publish(job, tiny_base, shift=0.0)
    encoder = open_encoder(job, device="cpu")
    with start_server(job) as server:
        yield Running(server, job, encoder)


def test_each_name_has_its_own_vectors(running: Running) -> None:
    own, legal, plain = (running.embed(name) for name in ("own", "own-legal", "org/plain"))
    np.testing.assert_allclose(own, running.encoder.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(plain, own, atol=1e-5)
    assert np.abs(own - legal).max() > 0.01
    with httpx.Client(base_url=running.server.url, trust_env=False) as http:
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["own", "own-legal", "org/plain"]


def test_an_idle_model_ends_and_the_next_request_starts_it_again(running: Running) -> None:
    before = running.embed("org/plain")
    deadline = time.monotonic() + 60
    while replicas_of("Embedder-1"):
        assert time.monotonic() < deadline, "the idle model still runs"
        time.sleep(0.5)
    assert replicas_of("Embedder") == 1
    np.testing.assert_array_equal(running.embed("own").shape, before.shape)
    np.testing.assert_allclose(running.embed("org/plain"), before, atol=1e-6)


def test_a_new_model_is_taken_up_under_load_without_a_failed_request(running: Running, tiny_base: str) -> None:
    async def test() -> int:
        async def load(client: openai.AsyncOpenAI) -> int:
            """Asks until the new model has answered for a while; every answer is wholly of one model."""
            asked, by_new = 0, 0
            while by_new < 20:
                answer = await client.embeddings.create(input=TEXTS, model="own")
                vectors = np.array([item.embedding for item in answer.data])
                is_old, is_new = (bool(np.abs(vectors - wanted).max() < 1e-4) for wanted in (old, new))
                assert is_old != is_new
                by_new += is_new
                asked += 1
            return asked

        old = running.encoder.encode(TEXTS)
        job = running.job.model_copy(update={"storage": f"{running.job.storage}-aside"})
        await asyncio.to_thread(publish, job, tiny_base, shift=0.3)
        new = open_encoder(job, device="cpu").encode(TEXTS)
        async with running.asynchronous(max_retries=0) as client:
            asking = [asyncio.create_task(load(client)) for _ in range(4)]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(publish, running.job, tiny_base, shift=0.3)
            return sum(await asyncio.wait_for(asyncio.gather(*asking), 90))

    assert asyncio.run(test()) >= 80


def test_a_killed_listener_is_replaced_before_a_client_gives_up(running: Running) -> None:
    """Raw connections to it are cut; the openai client repeats by itself and must see nothing."""
    port = int(running.server.url.rsplit(":", 1)[1])

    def holder() -> int:
        listening = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"]
        (connection,) = listening
        assert connection.pid is not None
        return connection.pid

    async def test() -> None:
        async def load(client: openai.AsyncOpenAI) -> None:
            for _ in range(60):
                await client.embeddings.create(input=TEXTS[:2], model="own-legal")

        async with running.asynchronous() as client:  # with its own two retries
            asking = [asyncio.create_task(load(client)) for _ in range(4)]
            await asyncio.sleep(0.3)
            psutil.Process(first).kill()
            await asyncio.gather(*asking)

    first = holder()
    asyncio.run(test())
    assert holder() != first
