"""`ullme-ray submit` on a real Ray head with token authentication, as a person uses it: from another process, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
CANARY = "canary-51c0ffee"
WAIT_S = 600.0

EMBED = """
name: {name}
storage: {storage}
model: {{base: {base}, max_tokens: 64}}
embed: {{input: {{path: {corpus}}}}}
serve: {{port: 0, api_keys: env:CANARY_KEYS, keep_running: false}}
"""
TRAIN_AND_SERVE = """
name: trained
storage: {storage}
model: {{base: {base}, max_tokens: 64}}
train:
  data: [{{path: {pairs}}}]
  objective: cl
  global_batch_size: 4
  max_steps: {steps}
  checkpoint_every_steps: 5
serve: {{port: {port}}}
"""


@dataclass
class Head:
    """A Ray head of this test alone."""

    folder: Path
    url: str
    token: Path
    metrics_url: str
    environment: dict[str, str]

    def cli(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=WAIT_S, env=self.env(variables))

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "ullme_ray", *words, "--address", self.url]

    def env(self, variables: dict[str, str]) -> dict[str, str]:
        return self.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)} | variables


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="uh-", dir="/tmp"))  # short: Ray's sockets lie below, and their paths are limited
    token = folder / "token"
    token.write_text("a-token-of-this-test")
    (folder / "cwd").mkdir()
    gcs, dashboard, client, agent, metrics = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the entrypoint's `python` is this one
    environment["RAY_metrics_report_interval_ms"] = "1000"
    environment["RAY_worker_niceness"] = "0"
    own = Head(folder, f"http://127.0.0.1:{dashboard}", token, f"http://127.0.0.1:{metrics}/metrics", environment)
    ray = Path(sys.executable).with_name("ray")
    command = (
        f"{ray} start --head --block --num-cpus=4 --node-ip-address=127.0.0.1 --port={gcs} --dashboard-port={dashboard} "
        f"--ray-client-server-port={client} --dashboard-agent-listen-port={agent} --temp-dir={folder}/ray "
        f"--metrics-export-port={metrics} --object-store-memory={2**28}"
    )
    secrets = {"CANARY_KEYS": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command.split(), stdout=log, stderr=log, env=own.env(secrets), cwd=folder / "cwd", start_new_session=True
        )
    try:
        wait_for(
            lambda: process.poll() is None and own.cli("status", str(a_job(own, "none"))).stderr.startswith("error: no job")
        )
        yield own
    finally:
        end_session(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def end_session(process: subprocess.Popen[bytes]) -> None:
    """The head and all it started, found by their session or by a parent that belongs to it; nothing else."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_for(holds: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)


def a_job(head: Head, name: str, text: str = EMBED, **values: object) -> Path:
    path = head.folder / f"{name}.yaml"
    filled = {"name": name, "storage": head.folder / "runs", "base": "x", "corpus": head.folder / "corpus.jsonl"} | values
    path.write_text(text.format(**filled))
    return path


@pytest.fixture(scope="module")
def data(head: Head) -> Path:
    texts = [f"operation {number} deletes a bucket and returns value {number}" for number in range(40)]
    rows = [{"query": f"bucket {n}", "positive": text, "negative": texts[n - 1]} for n, text in enumerate(texts)]
    (head.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (head.folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return head.folder


def drivers(job: str) -> list[int]:
    """Process ids of the job's drivers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"ullme_ray" in words and b"run" in words and words[0].endswith(b"python"):
                variables = (entry / "environ").read_bytes()
                if b'"ullme_job": "%s"' % job.encode() in variables:
                    found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def test_a_wrong_and_a_missing_token_are_told(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another-token")
    job = a_job(head, "nobody")
    for variables in ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, {"RAY_AUTH_MODE": "disabled"}):
        done = head.cli("submit", str(job), **variables)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"error: the cluster at {head.url} refuses the token: set RAY_AUTH_MODE=token" in done.stderr
        assert "token-of-this-test" not in done.stderr


def test_a_job_is_followed_and_no_secret_is_left_anywhere(head: Head, data: Path, tiny_base: str) -> None:
    job = a_job(head, "embedded", base=tiny_base)
    done = head.cli("submit", str(job), "--stages", "embed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 rows in 1 files = 40 embedded" in done.stdout
    assert "submitted embedded-1" in done.stderr
    assert "embedded-1 succeeded" in done.stderr
    assert "embedded-1 SUCCEEDED" in head.cli("status", str(job)).stdout
    assert "40 embedded" in head.cli("logs", str(job)).stdout
    files = [path for path in head.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "job.yaml" and "runtime_resources" in str(path) for path in files)  # what travelled
    assert any(path.name == "job.yaml" and "runs" in path.parts for path in files)
    assert len(files) > 50
    assert [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []


def test_the_exit_code_is_the_jobs_own(head: Head, data: Path, tiny_base: str) -> None:
    done = head.cli("submit", str(a_job(head, "lost", base=tiny_base, corpus=head.folder / "gone.jsonl")))
    assert done.returncode == 1
    assert "gone.jsonl" in done.stdout
    assert "submitting it again" not in done.stderr  # which would help nothing


def test_plain_ray_job_submit_runs_a_job_file(head: Head, data: Path, tiny_base: str) -> None:
    folder = head.folder / "plain"
    folder.mkdir()
    shutil.move(a_job(head, "plain-job", base=tiny_base), folder / "job.yaml")
    ray = Path(sys.executable).with_name("ray")
    command = f"{ray} job submit --address {head.url} --working-dir {folder} -- python -m ullme_ray run job.yaml --stages embed"
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=WAIT_S, env=head.env({}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 embedded" in done.stdout


def test_killed_drivers_are_replaced_and_their_server_is_never_left_behind(head: Head, data: Path, tiny_base: str) -> None:
    (port,) = free_ports(1)
    values = {"base": tiny_base, "pairs": data / "pairs.jsonl", "steps": 400, "port": port}
    job = a_job(head, "trained", TRAIN_AND_SERVE, **values)
    following = subprocess.Popen(
        head.command("submit", str(job)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=head.env({})
    )
    checkpoints = head.folder / "runs" / "trained" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("*/checkpoint.json")))
    wait_for(lambda: "ray_ullme_train_step{" in httpx.get(head.metrics_url, trust_env=False).text)
    assert 'job="trained"' in httpx.get(head.metrics_url, trust_env=False).text
    kill_driver()  # while it trains

    def answers() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers)
    assert drivers("trained")
    kill_driver()  # while it serves: what it started must not stand in the way of the next
    wait_for(lambda: "trained-3 RUNNING" in head.cli("status", str(job)).stdout)
    wait_for(lambda: head.cli("logs", str(job)).stdout.count("serving at"))
    assert head.cli("stop", str(job)).stdout == "stopping trained-3\n"
    output, _ = following.communicate(timeout=WAIT_S)
    assert following.returncode == 130, output
    assert "resumes after step" in output
    assert output.count("was killed; submitting it again") == 2
    wait_for(lambda: not answers(), 60)  # neither a driver nor its server is left


def kill_driver() -> None:
    (pid,) = drivers("trained")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in drivers("trained"), 30)
