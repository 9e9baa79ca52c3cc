"""Faults against the server under load: what do its clients see? Prints a line for each kind of fault.

    python tests/faults/serve_matrix.py [--kinds replica,node,reload,update,scale,listener] [--requests 10000] [--rate 40]

Ray runs with three nodes on this machine, the listeners on the head, the replicas on the others. Half of the clients send plain
HTTP and never repeat anything; half are openai's client as it comes, with its two retries. They keep up a steady rate, together
`--requests` requests over all kinds, and longer where a kind has not had its `--faults` yet. A fault strikes as soon as the
cluster has mended the last one. Every answer is compared with the model's own vectors (those of the old or the new one where a
new one is published), so that a wrong answer counts as a failed request. Killing the listener cuts raw connections, which no
server can help: its line shows how many, and openai's client must see none.

Cost: most of it is the start of Python in new replicas, so it grows with --faults.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves new replicas beside whatever else this machine does

import httpx
import numpy as np
import openai
import psutil

from ullme_ray.model import open_encoder
from ullme_ray.model.backbone import load_backbone
from ullme_ray.model.export import export_encoder
from ullme_ray.model.scratch import build_scratch
from ullme_ray.model.tokenizing import load_tokenizer
from ullme_ray.runtime import quiet_libraries
from ullme_ray.serve.launch import APP_NAME, LISTENERS
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.spec.job import ScratchSpec
from ullme_ray.storage import put_folder

WORDS = ["bucket", "object", "policy", "access", "private", "public", "table", "query", "returns", "value", "request", "key"]
REPLICAS = 2
PAUSE_S = 2.0  # after a fault, for the cluster to notice
MENDED_S = 300.0
MODEL = "served"


@dataclass
class Seen:
    """What the clients of one kind of fault saw."""

    kind: str
    faults: int = 0
    raw: int = 0
    raw_failed: int = 0
    retrying: int = 0
    retrying_failed: int = 0
    wrong: int = 0
    longest_s: float = 0.0
    why: list[str] = field(default_factory=list)
    broken: BaseException | None = None  # what ended the faults or the clients

    def to_line(self) -> str:
        cells = (self.kind, self.faults, self.raw, self.raw_failed, self.retrying, self.retrying_failed, self.wrong)
        return f"| {' | '.join(map(str, cells))} | {self.longest_s:.1f} |"


HEADER = (
    "| fault | times | raw requests | failed | openai client's | failed | wrong vectors | longest s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def make_job(folder: Path) -> JobSpec:
    build_scratch(
        WORDS * 4,
        ScratchSpec(hidden_size=32, layers=2, heads=4, vocab_size=300),
        max_tokens=128,
        seed=7,
        folder=str(folder / "base"),
    )
    tree = {
        "name": MODEL,
        "storage": str(folder / "runs"),
        "model": {"base": str(folder / "base"), "max_tokens": 128},
        "train": {"data": [{"path": "x.jsonl"}], "objective": "cl", "global_batch_size": 2, "max_steps": 1},
        "serve": {"port": 0, "reload_s": 0.5, "replicas": {"min": REPLICAS, "max": REPLICAS}},
    }
    return parse_job(json.dumps(tree).encode())


def publish(job: JobSpec, folder: Path, version: int) -> None:
    """An export like any run's, whose weights depend on the version."""
    backbone: Any = load_backbone(str(folder / "base"), job.model)
    for parameter in backbone.parameters():
        parameter.data.mul_(1 + 0.1 * version)
    with tempfile.TemporaryDirectory() as new:
        export_encoder(backbone, load_tokenizer(str(folder / "base")), job, new, training={})
        put_folder(new, RunFolder.of(job).export, last="modules.json")


class Stand:
    """A cluster of three nodes, the server on it, and the vectors that are right at present."""

    def __init__(self, folder: Path) -> None:
        import ray
        from ray.cluster_utils import Cluster

        from ullme_ray.serve import start_server

        self.folder, self.job = folder, make_job(folder)
        shuffle = random.Random(3)
        self.texts = [" ".join(shuffle.choices(WORDS, k=shuffle.randrange(2, 60))) for _ in range(64)]
        self.right: list[np.ndarray] = []
        self._version = 0
        self.publish()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=REPLICAS + 1) for _ in range(2)]
        ray.init(address=self.cluster.address, logging_level="ERROR", log_to_driver=False)
        try:
            self.server = start_server(self.job)
        except BaseException:
            self._end_ray()
            raise

    def publish(self) -> None:
        """A new model; from now on its vectors are right too."""
        self._version += 1
        aside = self.job.model_copy(update={"storage": str(self.folder / "aside")})
        publish(aside, self.folder, self._version)
        self.right.append(open_encoder(aside, device="cpu").encode(self.texts))
        publish(self.job, self.folder, self._version)

    def close(self) -> None:
        self.server.stop()
        self._end_ray()

    def _end_ray(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


def pids(deployment: str) -> list[int]:
    """Of this program's own Ray, by the title that Ray gives its processes."""
    title = f"ray::ServeReplica:ullme_ray:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
    return found


def kill_replica(stand: Stand) -> None:
    psutil.Process(random.choice(pids("Embedder"))).kill()


def kill_node(stand: Stand) -> None:
    """A node goes with all its processes, without a word, and a new one joins."""
    stand.cluster.remove_node(stand.nodes.pop(0), allow_graceful=False)
    stand.nodes.append(stand.cluster.add_node(num_cpus=REPLICAS + 1))


def resize(stand: Stand, size: int) -> None:
    """Returns once the pool has so many replicas."""
    assert stand.job.serve is not None
    pool = stand.job.serve.replicas.model_copy(update={"min": size, "max": size})
    stand.server.update(stand.job.model_copy(update={"serve": stand.job.serve.model_copy(update={"replicas": pool})}))


def grow_and_shrink(stand: Stand) -> None:
    for size in (REPLICAS + 1, 1, REPLICAS):
        resize(stand, size)


def roll(stand: Stand) -> None:
    """Every replica is replaced by a new process, as for a changed job."""
    assert stand.job.serve is not None
    other = stand.job.serve.model_copy(update={"max_inputs": stand.job.serve.max_inputs + 1})
    stand.job = stand.job.model_copy(update={"serve": other})
    stand.server.update(stand.job)


def kill_listener(stand: Stand) -> None:
    port = int(stand.server.url.rsplit(":", 1)[1])
    holders = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"}
    for pid in holders - {None}:
        psutil.Process(pid).kill()


FAULTS: dict[str, Callable[[Stand], None]] = {
    "replica": kill_replica,
    "node": kill_node,
    "reload": Stand.publish,
    "update": roll,
    "scale": grow_and_shrink,
    "listener": kill_listener,
}


def wait_until_mended() -> None:
    """As many replicas and listeners run as shall."""
    from ray import serve

    deadline = time.monotonic() + MENDED_S
    while time.monotonic() < deadline:
        found = serve.status().applications[APP_NAME].deployments
        running = {name: deployment.replica_states.get("RUNNING", 0) for name, deployment in found.items()}
        if running == {"Embedder": REPLICAS, "Ingress": LISTENERS}:
            return
        time.sleep(0.3)
    raise RuntimeError(f"the cluster did not mend within {MENDED_S:.0f} s: {running}")


async def send(stand: Stand, seen: Seen, *, requests: int, num_faults: int, clients: int, rate: float) -> None:
    """Every client asks at its own ticks, or as soon as it is answered where that was later."""
    numbers = itertools.count()
    url = stand.server.url

    def goes_on() -> bool:
        return seen.broken is None and (next(numbers) < requests or seen.faults < num_faults)

    async def raw(client: httpx.AsyncClient, rows: list[int]) -> list[list[float]]:
        body = {"input": [stand.texts[row] for row in rows], "model": MODEL}
        answer = await client.post(f"{url}/v1/embeddings", json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {answer.text[:100]}")
        return [item["embedding"] for item in answer.json()["data"]]

    async def retrying(client: openai.AsyncOpenAI, rows: list[int]) -> list[list[float]]:
        answer = await client.embeddings.create(input=[stand.texts[row] for row in rows], model=MODEL)
        return [item.embedding for item in answer.data]

    async def loop(kind: str, ask: Any, client: Any, choose: random.Random) -> None:
        tick = time.perf_counter()
        while goes_on():
            tick += clients / rate
            await asyncio.sleep(tick - time.perf_counter())
            tick = max(tick, time.perf_counter())
            rows = choose.sample(range(len(stand.texts)), choose.choice((1, 1, 2, 8)))
            setattr(seen, kind, getattr(seen, kind) + 1)
            began = time.perf_counter()
            try:
                vectors = np.array(await ask(client, rows))
            except Exception as error:  # noqa: BLE001 - whatever a client sees is what is counted
                setattr(seen, f"{kind}_failed", getattr(seen, f"{kind}_failed") + 1)
                seen.why.append(f"{kind}: {type(error).__name__}: {str(error)[:150]}")
            else:
                seen.wrong += not any(np.abs(vectors - right[rows]).max() < 1e-4 for right in stand.right)
            seen.longest_s = max(seen.longest_s, time.perf_counter() - began)

    async with contextlib.AsyncExitStack() as stack:
        tasks = []
        for number in range(clients):
            choose = random.Random(number)
            if number % 2:
                client: Any = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
                tasks.append(loop("retrying", retrying, await stack.enter_async_context(client), choose))
            else:
                client = httpx.AsyncClient(timeout=120, trust_env=False)
                tasks.append(loop("raw", raw, await stack.enter_async_context(client), choose))
        await asyncio.gather(*tasks)


def strike(stand: Stand, seen: Seen, **load: Any) -> None:
    """Faults of one kind, one after another, as long as the clients run: in the main thread, where alone Ray starts a node."""
    over = threading.Event()

    def clients() -> None:
        try:
            asyncio.run(send(stand, seen, **load))
        except BaseException as caught:  # noqa: BLE001 - of a thread: shown by the main one
            seen.broken = caught
        over.set()

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        while not over.is_set():
            FAULTS[seen.kind](stand)
            over.wait(PAUSE_S)
            wait_until_mended()
            seen.faults += not over.is_set()  # one that outlasted the load is none
    except BaseException as caught:  # noqa: BLE001 - ends the clients first
        seen.broken = caught
    thread.join()
    if seen.broken is not None:
        raise seen.broken


def run(kinds: list[str], folder: Path, **load: Any) -> list[Seen]:
    """A line of the table for each kind, printed as it comes."""
    quiet_libraries()
    stand = Stand(folder)
    results = []
    print(HEADER, flush=True)
    try:
        for kind in kinds:
            seen = Seen(kind)
            strike(stand, seen, **load)
            print(seen.to_line(), flush=True)
            for why in sorted(set(seen.why))[:5]:
                print(f"  {why}", file=sys.stderr, flush=True)
            results.append(seen)
    finally:
        stand.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(FAULTS))
    parser.add_argument("--requests", type=int, default=10_000, help="at least, over all kinds")
    parser.add_argument("--faults", type=int, default=3, help="of each kind at least")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s of all clients")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    load = {"requests": -(-options.requests // len(kinds)), "num_faults": options.faults}
    folder = Path(tempfile.mkdtemp(prefix="serve-faults-"))
    try:
        results = run(kinds, folder, **load, clients=options.clients, rate=options.rate)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lost = sum(seen.retrying_failed + seen.wrong + (seen.raw_failed if seen.kind != "listener" else 0) for seen in results)
    print(f"{lost} of {sum(seen.raw + seen.retrying for seen in results)} requests failed that a server can help")
    return min(lost, 1)


if __name__ == "__main__":
    sys.exit(main())
