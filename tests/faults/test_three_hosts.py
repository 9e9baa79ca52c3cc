"""Three hosts with networks of their own: training, serving and embedding over them, and a cable pulled in mid-work.

Ray runs on hosts 1 and 2 (host 1 is the head and has the driver), the object store on host 3; they share nothing but the
network. What training leaves is held against one rank in this process, vectors against the exported model on host 3.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3Server

from ullme_ray.spec import JobSpec

sys.path.insert(0, str(Path(__file__).parents[1]))  # for hosts

from hosts import RAY_PORT, Hosts, interrupt, reason_to_skip

REASON = reason_to_skip()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ROWS, ROWS_PER_UNIT, STEPS = 4000, 16, 40
CPUS = 3  # of a host, as Ray counts: a rank, or two embedding processes and one task that reads or writes
RUN_TIMEOUT_S = 600.0
WORDS = ["bucket", "object", "policy", "access", "private", "public", "list", "key", "table", "query", "value", "request"]
PREPARE = """
import sys, time
from ullme_ray import storage
for attempt in range(200):
    try:
        storage.filesystem("s3://").mkdir("hosts")
        break
    except Exception:
        time.sleep(0.3)
for path in sys.argv[1:]:
    with open(path) as file:
        storage.write_text("s3://hosts/" + path.rpartition("/")[2], file.read())
"""
READ_TABLE = """
import json, sys
from ullme_ray.table import open_table
rows = open_table(sys.argv[1]).to_pyarrow_table(columns=["id", "embedding"])
print(json.dumps([rows["id"].to_pylist(), rows["embedding"].to_pylist()]))
"""
READ_TEXT = "import sys; from ullme_ray import storage; print(storage.read_text(sys.argv[1]))"
ENCODE = """
import json
from ullme_ray import storage
from ullme_ray.model import open_encoder
from ullme_ray.spec import JobSpec
model = {"base": "s3://hosts/runs/cut-training/model", "max_tokens": 32}
rows = [json.loads(line) for line in storage.read_text("s3://hosts/corpus.jsonl").splitlines()]
vectors = open_encoder(JobSpec.model_validate({"name": "x", "model": model})).encode([row["text"] for row in rows])
print(json.dumps([[row["id"] for row in rows], vectors.tolist()]))
"""
ASK = """
import json, sys, urllib.request
from ullme_ray import storage
rows = [json.loads(line) for line in storage.read_text("s3://hosts/corpus.jsonl").splitlines()[:20]]
body = json.dumps({"model": "served", "input": [row["text"] for row in rows], "input_type": "passage"}).encode()
request = urllib.request.Request(sys.argv[1] + "/v1/embeddings", body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=60) as answer:
    found = json.load(answer)["data"]
print(json.dumps({row["id"]: item["embedding"] for row, item in zip(rows, found)}))
"""


@dataclass
class Network:
    hosts: Hosts
    folder: Path
    seconds: dict[str, float]

    def write_job(self, name: str, **sections: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        cluster = {"address": f"{self.hosts[1].address}:{RAY_PORT}"}
        path.write_text(json.dumps({"name": name, "storage": "s3://hosts/runs", "cluster": cluster, **sections}))
        return path

    def python(self, code: str, *arguments: str) -> Any:
        """What a program on the store's host prints, as JSON or else as text."""
        text = self.hosts[3].run([sys.executable, "-c", code, *arguments], timeout_s=RUN_TIMEOUT_S)
        try:
            return json.loads(text)
        except ValueError:
            return text

    @contextlib.contextmanager
    def driver(self, stage: str, job: Path) -> Iterator[Driver]:
        """A command of ullme-ray on host 1."""
        told = self.folder / f"{job.stem}-{stage}.txt"
        process = self.hosts[1].start([sys.executable, "-m", "ullme_ray", stage, str(job)], told=told)
        try:
            yield Driver(process, told)
        finally:
            interrupt(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            interrupt(process, signal.SIGKILL)  # before nsenter goes, after which nobody finds it
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def timed(self, what: str, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - started
        with capsys.disabled():
            print(f"\nthree hosts: {what} {self.seconds[what]:.0f} s", end="", flush=True)

    def losses(self, name: str) -> list[float]:
        lines = str(self.hosts[3].run([sys.executable, "-c", READ_TEXT, f"s3://hosts/runs/{name}/metrics/train.jsonl"])).split(
            "\n"
        )
        records = [json.loads(line) for line in lines if line]
        assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "a step is missing or done twice"
        return [record["loss"] for record in records]

    def vectors(self, code: str, *arguments: str) -> tuple[list[str], np.ndarray]:
        """The ids and vectors that a program on the store's host prints, by id."""
        ids, vectors = self.python(code, *arguments)
        order = np.argsort(ids, kind="stable")
        return [ids[place] for place in order], np.array(vectors)[order]


@dataclass
class Driver:
    process: subprocess.Popen[bytes]
    told: Path

    @property
    def text(self) -> str:
        return self.told.read_text(errors="replace")

    def wait_for(self, happened: Callable[[str], object], what: str) -> None:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not happened(self.text):
            assert self.process.poll() is None, f"it ended before {what}: {self.text[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} within {RUN_TIMEOUT_S:g} s: {self.text[-3000:]}"
            time.sleep(0.05)

    def finish(self) -> str:
        """What it said; it must end well."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=RUN_TIMEOUT_S)
        code = self.process.poll()
        assert code is not None, f"it did not end within {RUN_TIMEOUT_S:g} s: {self.text[-3000:]}"
        assert code == 0, f"it ended with {code}: {self.text[-3000:]}"
        return self.text


def text(generator: random.Random, first: str, length: int) -> str:
    return " ".join([first, *generator.choices(WORDS, k=length)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, path = random.Random(1), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    drawn = [[text(generator, WORDS[(row + other) % 12], 6) for other in (0, 0, 5)] for row in range(40)]
    rows = [{"query": query, "positive": positive, "negatives": [negative]} for query, positive, negative in drawn]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def network(pairs: Path) -> Iterator[Network]:
    generator, started = random.Random(2), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="uh-", dir="/tmp") as name:  # short: the paths of Ray's sockets are limited
        folder = Path(name)
        rows = [{"id": f"row-{row}", "text": text(generator, WORDS[row % 12], 20)} for row in range(ROWS)]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with Hosts(folder) as hosts:
            (folder / "store").mkdir()
            store = S3Server(folder / "store", address=hosts[3].address, prefix=hosts[3].prefix)
            hosts.environment.update(store.environment())
            try:
                store.start()
                hosts.start_ray(1, num_cpus=CPUS)
                hosts.start_ray(2, num_cpus=CPUS)
                network = Network(hosts, folder, {})
                network.python(PREPARE, str(pairs), str(folder / "corpus.jsonl"))
                network.seconds["start"] = time.monotonic() - started
                yield network
            finally:
                store.kill()


MODEL = {"base": "scratch", "max_tokens": 32, "scratch": {"hidden_size": 64, "layers": 4, "heads": 4, "vocab_size": 300}}
TRAIN = {
    "objective": "grl",
    "global_batch_size": 8,
    "chunk_size": 1,
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "checkpoint_every_steps": 5,
    "deepspeed": {"zero_stage": 2},
    # A rank takes most CPUs of a host, so that there is one on each.
    "workers": {"num_workers": 2, "cpus_per_worker": 2, "min_workers": 1, "timeout_s": 20},
}
TRAINED = {"base": "s3://hosts/runs/cut-training/model", "max_tokens": 32}
EMBED = {
    "input": {"path": "s3://hosts/corpus.jsonl", "id": "id"},
    "actors": {"min": 2, "max": 2},
    "rows_per_unit": ROWS_PER_UNIT,
    "tokens_per_batch": 512,
}


def test_training_goes_on_when_a_host_is_cut_off(
    network: Network,
    train_here: Callable[[JobSpec], list[str]],
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Host 2 goes silent in mid-training: the run says which rank is lost and goes on with the other from the checkpoint."""
    here = {"name": "here", "storage": str(tmp_path), "model": MODEL, "train": {**TRAIN, "data": [{"path": str(pairs)}]}}
    train_here(JobSpec.model_validate(here))
    records = [json.loads(line) for line in (tmp_path / "here" / "metrics" / "train.jsonl").read_text().splitlines()]
    expected = [record["loss"] for record in records]

    job = network.write_job("cut-training", model=MODEL, train={**TRAIN, "data": [{"path": "s3://hosts/pairs.jsonl"}]})
    try:
        with network.timed("training, cable pulled", capsys), network.driver("train", job) as driver:
            driver.wait_for(lambda told: re.search(rf"train: \d+/{STEPS} steps", told), "its first step")
            time.sleep(1.0)
            network.hosts.cut(2)
            driver.wait_for(lambda told: "starts again" in told, "a restart")
            told = driver.finish()
    finally:
        network.hosts.heal(2)
    (line,) = [line for line in told.splitlines() if "starts again" in line]
    assert network.hosts[2].address in line
    assert "(1 of 3 restarts)" in line
    assert "global 8 = 2 ranks x 4 queries" in told
    assert "global 8 = 1 ranks x 8 queries" in told
    np.testing.assert_allclose(network.losses("cut-training"), expected, rtol=1e-4, atol=1e-5)
    with network.timed("host 2 back", capsys):
        network.hosts.start_ray(2, num_cpus=CPUS)  # a host that Ray took for dead stays out until it is started again


def test_both_hosts_serve_and_ctrl_c_ends_it(network: Network, capsys: pytest.CaptureFixture[str]) -> None:
    """A client on the third host gets the vectors that the exported model has."""
    # A replica takes most CPUs of a host, so that there is one on each.
    serve = {"host": network.hosts[1].address, "port": 8000, "replicas": {"min": 2, "max": 2}, "cpus_per_replica": 2}
    job = network.write_job("served", model=TRAINED, serve=serve)
    with network.timed("serving on both", capsys), network.driver("serve", job) as driver:
        driver.wait_for(lambda told: "serving at" in told, "its server answers")
        served = network.python(ASK, f"http://{network.hosts[1].address}:8000")
        interrupt(driver.process)
        assert "stopping the server" in driver.finish()
    ids, vectors = network.vectors(ENCODE)
    assert len(served) == 20
    for name, vector in served.items():
        assert float(np.dot(vector, vectors[ids.index(name)])) > 0.999999


def test_embedding_is_complete_when_a_host_is_cut_off(network: Network, capsys: pytest.CaptureFixture[str]) -> None:
    """Host 2 goes silent in mid-embedding, with an actor on it: no row is lost or doubled, and the vectors are the same."""
    job = network.write_job("cut-embedding", model=TRAINED, embed=EMBED)
    try:
        with network.timed("embedding, cable pulled", capsys), network.driver("embed", job) as driver:
            driver.wait_for(
                lambda told: re.search(rf"embed: [1-9][\d,]*/{ROWS:,} rows .*actors 2", told), "both actors at work"
            )
            network.hosts.cut(2)
            told_when_cut = driver.text
            told = driver.finish()
    finally:
        network.hosts.heal(2)
    assert f"{ROWS:,}/{ROWS:,} rows" not in told_when_cut, "it must be cut in mid-run for this test to mean anything"
    assert f"{ROWS:,} rows in 1 files = {ROWS:,} embedded" in told
    ids, vectors = network.vectors(ENCODE)
    found_ids, found = network.vectors(READ_TABLE, "s3://hosts/runs/cut-embedding/embeddings")
    assert found_ids == ids
    assert len(set(ids)) == ROWS
    assert np.abs(found - vectors).max() < 1e-6
