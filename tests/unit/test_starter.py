"""The pod of a rendered CronJob, against an HTTP server that answers as the Kubernetes API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ullme_ray.deploy.starter import Kubernetes, of_job, start_and_wait
from ullme_ray.errors import UllmeError

TEMPLATE = {"kind": "RayJob", "metadata": {"name": "nightly", "namespace": "other"}, "spec": {}}
MANIFEST = of_job(TEMPLATE, "nightly-29400123", "uid-1", "ullme")
NAME = "nightly-29400123-r"
PATH = "/apis/ray.io/v1/namespaces/ullme/rayjobs"
TOKEN = "token-of-the-pod"


class Api:
    """RayJobs that go through the given states, one per look."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: list[dict[str, Any]] = []
        self.refuse: int | None = None
        self.outages: list[int] = []

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, Any]:
        if token != f"Bearer {TOKEN}":
            return 401, {}
        if self.outages:
            return self.outages.pop(), {}
        if self.refuse is not None:
            return self.refuse, {"message": "admission webhook says no"}
        if method == "POST":
            assert path == PATH
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {}
            self.jobs[name] = body
            return 201, body
        name = path.removeprefix(f"{PATH}/")
        if name not in self.jobs or not self.states:
            return 404, {}
        return 200, {**self.jobs[name], "status": self.states.pop(0) if len(self.states) > 1 else self.states[0]}


@pytest.fixture
def api() -> Iterator[tuple[Api, str]]:
    kubernetes = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            code, content = kubernetes.answer(self.command, self.path, self.headers["Authorization"], body)
            raw = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kubernetes, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(url: str, folder: Path, *, token: str = TOKEN) -> int:
    (folder / "token").write_text(token + "\n")
    cluster = Kubernetes(url, "ullme", folder / "token", None)
    return start_and_wait(cluster, MANIFEST, poll_s=0.01)


def test_it_waits_for_the_end_of_the_run_it_created(api: tuple[Api, str], tmp_path: Path, capsys: Any) -> None:
    kubernetes, url = api
    states = [{}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}]
    kubernetes.states = [*states, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    kubernetes.outages = [503, 429]
    assert run(url, tmp_path) == 0
    assert list(kubernetes.jobs) == [NAME]
    assert kubernetes.jobs[NAME]["metadata"]["namespace"] == "ullme"  # the pod's own, not that of the text
    (owner,) = kubernetes.jobs[NAME]["metadata"]["ownerReferences"]
    assert owner["name"] != NAME  # under which KubeRay makes a Job of its own
    assert "Running RUNNING" in capsys.readouterr().out


@pytest.mark.parametrize(
    "end",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"},
        {"jobDeploymentStatus": "ValidationFailed"},
    ],
)
def test_it_fails_with_the_run(end: dict[str, Any], api: tuple[Api, str], tmp_path: Path) -> None:
    kubernetes, url = api
    kubernetes.states = [end]
    assert run(url, tmp_path) == 1


def test_a_second_starter_waits_for_the_run_of_the_first(api: tuple[Api, str], tmp_path: Path, capsys: Any) -> None:
    kubernetes, url = api
    kubernetes.jobs[NAME] = MANIFEST
    kubernetes.states = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    assert run(url, tmp_path) == 0
    assert "exists already" in capsys.readouterr().out


def test_the_run_of_an_earlier_job_is_not_taken_for_its_own(api: tuple[Api, str], tmp_path: Path) -> None:
    kubernetes, url = api
    kubernetes.jobs[NAME] = of_job(TEMPLATE, "nightly-29400123", "uid-0", "ullme")
    kubernetes.states = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    with pytest.raises(UllmeError, match="earlier Job"):
        run(url, tmp_path)


def test_a_run_that_vanished_is_a_failure(api: tuple[Api, str], tmp_path: Path) -> None:
    assert run(api[1], tmp_path) == 1


@pytest.mark.parametrize(("token", "refuse", "match"), [("wrong", None, "401"), (TOKEN, 422, "admission webhook says no")])
def test_what_kubernetes_refuses_is_told(
    token: str, refuse: int | None, match: str, api: tuple[Api, str], tmp_path: Path
) -> None:
    kubernetes, url = api
    kubernetes.refuse = refuse
    with pytest.raises(UllmeError, match=match):
        run(url, tmp_path, token=token)
