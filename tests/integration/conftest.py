"""Fixtures of the integration tests: a real S3 server (SeaweedFS) and a real Ray on this machine, each started once.

`ray_local` asks for `s3` first, since Ray's workers inherit the environment that Ray was started with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running store; `bucket` makes a bucket and gives its address."""

    endpoint: str
    log: Path

    def bucket(self, name: str) -> str:
        from ullme_ray import storage

        store = storage.filesystem("s3://")
        if not store.exists(name):
            store.mkdir(name)
        return f"s3://{name}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on loopback; this process's AWS_* variables point at it as long as it runs."""
    folder = tmp_path_factory.mktemp("s3")
    key, secret = "test-access-key", "test-secret-key"
    identity = {
        "name": "rw",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, port = _free_ports(4)
    weed = Path(sys.executable).with_name("weed")  # of this environment, which need not be on PATH
    command = (
        f"{weed} -logtostderr=true server -dir={folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master} "
        f"-volume.port={volume} -filer.port={filer} -master.telemetry=false -master.volumeSizeLimitMB=64 -volume.max=1000 "
        f"-filer -s3 -s3.port={port} -s3.config={folder}/identities.json -s3.port.iceberg=0 -s3.port.lance=0"
    )
    log = folder / "weed.log"
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    with log.open("wb") as stream, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(command.split(), stdout=stream, stderr=stream, start_new_session=True)
        try:
            for name, value in environment.items():
                patch.setenv(name, value)
            _wait_until_ready(server, environment["AWS_ENDPOINT_URL"], log)
            yield S3Server(environment["AWS_ENDPOINT_URL"], log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with port + 10000, where SeaweedFS puts gRPC; below the range the system hands out."""
    found: list[int] = []
    candidate = 12000 + os.getpid() % 4000
    while len(found) < count:
        candidate += 7
        with contextlib.suppress(OSError), socket.socket() as plain, socket.socket() as grpc:
            plain.bind(("127.0.0.1", candidate))
            grpc.bind(("127.0.0.1", candidate + 10000))
            found.append(candidate)
    return found


def _wait_until_ready(server: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """An unsigned GET / is answered with 403 once the store can tell identities apart."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert server.poll() is None, f"SeaweedFS ended at once: {log.read_text(errors='replace')[-2000:]}"
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
        except urllib.error.HTTPError as answer:
            if answer.code == 403:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"SeaweedFS did not answer within {START_TIMEOUT_S} s: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def ray_local(s3: S3Server) -> Iterator[None]:
    """A local Ray with 4 logical CPUs, whatever the machine has; never joins a cluster that happens to run here."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    yield
    ray.shutdown()
