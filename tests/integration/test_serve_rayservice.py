"""Serving as a RayService has it: the rendered configuration, behind Ray Serve's own proxy, in a Ray of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml

from ullme_ray.deploy.rayobjects import ray_service
from ullme_ray.model import open_encoder
from ullme_ray.spec import parse_job

# What KubeRay has Ray do with the configuration of a RayService. Ends when its standard input does.
DEPLOY = """
import importlib, json, sys
import ray
from ray import serve
config = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False)
serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
for app in config["applications"]:
    module, _, name = app["import_path"].partition(":")
    built = getattr(importlib.import_module(module), name)(app["args"])
    serve.run(built, name=app["name"], route_prefix=app["route_prefix"])
print("serving", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> Iterator[tuple[str, psutil.Process]]:
    """(address, the process below which all of Ray is)."""
    tmp = tmp_path_factory.mktemp("rayservice")
    tree = {
        "name": "tiny-search",
        "storage": str(tmp / "runs"),
        "model": {"base": tiny_base, "max_tokens": 128},
        "serve": {"host": "0.0.0.0", "replicas": {"min": 2, "max": 2}},
    }
    text = json.dumps(tree)
    (tmp / "job.yaml").write_text(text)
    manifest = ray_service(parse_job(text.encode()), text)
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    head = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {item["name"]: item["value"] for item in head["env"] if item["name"].startswith("RAY_SERVE")}
    assert variables, "the proxy's middleware is set up by a variable"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    for app in config["applications"]:
        app["args"]["job"] = str(tmp / "job.yaml")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    with (tmp / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", DEPLOY, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        told = iter(process.stdout.readline, "")
        assert any(line.strip() == "serving" for line in told), (tmp / "log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(120)


def test_it_answers_as_the_encoder_does_whatever_a_client_tells_the_proxy(
    service: tuple[str, psutil.Process], tiny_base: str
) -> None:
    url, _ = service
    texts = ["make a bucket private", "list objects", "a policy for access " * 20]
    job = parse_job(json.dumps({"name": "tiny-search", "model": {"base": tiny_base, "max_tokens": 128}, "serve": {}}).encode())
    expected = open_encoder(job, device="cpu").encode(texts)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.embeddings.create(input=texts, model="tiny-search")
    given = np.array([item.embedding for item in answer.data])
    assert (given * expected).sum(axis=1).min() >= 0.999999

    headers = {"x-request-timeout-seconds": "0.000001", "x-request-id": "mine-1", "serve-multiplexed-model-id": "x"}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        answered = http.post("/embed", json={"inputs": texts}, headers=headers)
        assert (answered.status_code, answered.headers["x-request-id"]) == (200, "mine-1")
        assert np.allclose(answered.json(), expected, atol=1e-5)
        assert http.post("/embed", content=b"no JSON").status_code == 400
        assert http.get("/health").status_code == 200


def test_killed_replicas_fail_no_request_behind_the_proxy(service: tuple[str, psutil.Process]) -> None:
    url, root = service
    texts = ["bucket policy access object " * 30] * 20  # long enough for a request to be running at any instant
    numbers = iter(range(40))

    def replicas() -> list[psutil.Process]:
        title = "ray::ServeReplica:ullme_ray:Embedder"
        return [child for child in root.children(recursive=True) if " ".join(child.cmdline()).startswith(title)]

    victims = replicas()
    assert len(victims) == 2

    async def ask(client: openai.AsyncOpenAI) -> None:
        for number in numbers:
            if number in (10, 25):
                victims[number > 10].send_signal(signal.SIGKILL)
            answer = await client.embeddings.create(input=texts, model="tiny-search")
            assert len(answer.data) == len(texts)

    async def ask_all() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            await asyncio.gather(*(ask(client) for _ in range(6)))

    asyncio.run(ask_all())
    deadline = time.monotonic() + 120.0
    while len(left := replicas()) < 2:
        assert time.monotonic() < deadline, "no replica took the place of a killed one"
        time.sleep(0.1)
    assert not {victim.pid for victim in victims} & {replica.pid for replica in left}
