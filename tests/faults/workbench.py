"""The job under test, run as users run it, and the checks of what it leaves: a real store, a proxy before it, a trace.

Drivers start cold with a Ray of their own, or join a cluster that outlives the trials (`with_cluster`).

A trial has a table folder of its own over the same corpus. Its table begins at version 0, made from an earlier state of the
corpus, so that readers have something to read all the while; the run under test changes, adds and removes rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from ruamel.yaml import YAML

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for s3_server

from findings import Result, result_of  # noqa: E402
from nodes import TwoNodes  # noqa: E402
from nursery import Driver  # noqa: E402
from processes import end_processes, environment_set, processes_of  # noqa: E402
from proxy import Proxy  # noqa: E402
from reader import read_table, state_of  # noqa: E402
from s3_server import S3Server  # noqa: E402

from ullme_ray import storage  # noqa: E402
from ullme_ray.model.scratch import build_scratch  # noqa: E402
from ullme_ray.spec.job import ScratchSpec  # noqa: E402

JOB_NAME = "docs"
ROWS_PER_UNIT = 8
RUN_TIMEOUT_S = 300.0
_WORDS = "bucket object policy access private public key table query value request list delete create returns"


@dataclass
class Run:
    """One run of the command."""

    process: subprocess.Popen[bytes] | Driver
    trace: Path
    begin: int  # bytes of the trace that earlier runs wrote
    told: Path

    def events(self, event: str) -> list[dict[str, Any]]:
        return events_of(self.trace, self.begin, event)

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def wait_for_first_event(self) -> float | None:
        """When the pipeline began, or None for a run that ended before."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not (found := self.events("read")) and not self.over and time.monotonic() < deadline:
            time.sleep(0.02)
        return float(found[0]["time"]) if found else None

    def tree(self) -> list[psutil.Process]:
        """The processes that it started itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def end(self) -> None:
        """Kills it, with what it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            end_processes([*self.tree(), psutil.Process(self.process.pid)])
        self.process.wait()

    def end_of_output(self) -> str:
        return self.told.read_text(errors="replace")[-1500:]


class Workbench:
    """A store with the corpus; a context manager that leaves no process behind."""

    def __init__(self, folder: Path, seed: int, *, units: int = 40, actors: int = 2, with_cluster: bool = False) -> None:
        self.folder = folder
        self.with_cluster = with_cluster
        self.nodes: TwoNodes | None = None
        self.store = S3Server(_made(folder / "store"))
        self.proxy = Proxy(self.store.port, seed)
        self.base = str(folder / "base")
        self.units = units
        self.actors = actors
        self.reader = Reader(self.store_environment())
        self._stack = contextlib.ExitStack()
        self._trials: list[Trial] = []
        self._snapshot: dict[str, bytes] = {}
        self.corpus = ""

    def __enter__(self) -> Workbench:
        with contextlib.ExitStack() as stack:
            stack.callback(self.store.kill)
            self.store.start()
            build_scratch(
                [_WORDS] * 4,
                ScratchSpec(hidden_size=32, layers=2, heads=4, vocab_size=300),
                max_tokens=256,
                seed=7,
                folder=self.base,
            )
            self.store.wait_until_ready()
            stack.enter_context(environment_set(self.store.environment()))
            stack.enter_context(self.proxy)
            self.reader.start()
            stack.callback(self.reader.close)
            if self.with_cluster:
                self.nodes = stack.enter_context(TwoNodes(self.folder, self.job_environment(self.folder / "trace.jsonl")))
            self.corpus = f"{self.store.bucket('corpus')}/in"
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        end_processes(processes_of({run.process.pid for trial in self._trials for run in trial.runs}))
        self._stack.close()

    # -- corpus --------------------------------------------------------------------------------------------------------------

    def write_first_corpus(self) -> None:
        """The state of version 0."""
        self._write("a.jsonl", _rows("a", ROWS_PER_UNIT * 3))
        self._write("gone.jsonl", _rows("gone", ROWS_PER_UNIT))

    def write_corpus(self) -> None:
        """The state that the runs under test find: a file changed in one row, one gone, two new, with bad rows."""
        changed = _rows("a", ROWS_PER_UNIT * 3)
        changed[5]["text"] = "quite another text"
        bad: list[dict[str, Any]] = [{"id": "bad-1", "text": None}, {"id": None, "text": "x"}, {"id": "bad-2", "text": 7}]
        rows = _rows("b", ROWS_PER_UNIT * self.units)
        half = len(rows) // 2
        self._write("a.jsonl", changed)
        self._write("b.jsonl", rows[:half] + bad)
        self._write("deep/c.jsonl", rows[half:])
        storage.remove(f"{self.corpus}/gone.jsonl")

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        storage.write_bytes(f"{self.corpus}/{name}", "".join(json.dumps(row) + "\n" for row in rows).encode())

    # -- trials --------------------------------------------------------------------------------------------------------------

    def keep_as_version_0(self, trial: Trial) -> None:
        """Trials from now on begin with what this one left."""
        paths = [info.path for info in storage.list_files(trial.root)] + [
            info.path for info in storage.list_files(f"{trial.table}/_delta_log")
        ]
        self._snapshot = {path.removeprefix(trial.root): storage.read_bytes(path) for path in sorted(set(paths))}
        assert any("_delta_log" in name for name in self._snapshot)

    def new_trial(self) -> Trial:
        name = f"trial-{len(self._trials) + 1}"
        trial = Trial(self, f"s3://corpus/{name}", _made(self.folder / name))
        for path, data in self._snapshot.items():
            storage.write_bytes(trial.root + path, data)
        self._trials.append(trial)
        return trial

    def job(self, root: str, address: str | None) -> dict[str, Any]:
        return {
            "name": JOB_NAME,
            "storage": root,
            "model": {"base": self.base, "max_tokens": 256},
            "embed": {
                "input": {"path": self.corpus, "id": "id", "text": ["text"]},
                "rows_per_unit": ROWS_PER_UNIT,
                "tokens_per_batch": 512,  # given, for actors are born often here and would look for it each time
                "actors": {"min": 1, "max": self.actors},
            },
            **({"cluster": {"address": address}} if address else {}),
        }

    @staticmethod
    def state_of_ids(ids: Iterable[str]) -> list[Any]:
        """The state of a table with these ids, one row each."""
        keys = list(ids)
        return state_of(pa.table({"id": keys, "chunk": [0] * len(keys)}))

    def store_environment(self) -> dict[str, str]:
        """Of a reader beside the job: the store itself."""
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return {**os.environ, **self.store.environment(), "PYTHONPATH": path}

    def job_environment(self, trace: Path) -> dict[str, str]:
        """Of the job's processes, those of a cluster included: the proxy for the store, and the trace."""
        path = os.pathsep.join([str(HERE / "tracing"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        ours = {"PYTHONPATH": path.rstrip(os.pathsep), "FAULTS_TRACE": str(trace), "OMP_NUM_THREADS": "1"}
        # What else runs on this machine shall not add faults of its own, nor keep Ray's workers from the CPU.
        ours |= {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0"}
        return {**kept, **self.store.environment(self.proxy.endpoint), **ours}


class Trial:
    """One table folder, and the runs that bring it to its end."""

    def __init__(self, bench: Workbench, root: str, folder: Path) -> None:
        self.root = root
        self.table = f"{root}/{JOB_NAME}/embeddings"
        self.runs: list[Run] = []
        self._bench = bench
        self._folder = folder
        self._requests_before = len(bench.proxy.log)

    def start(self) -> Run:
        """Starts the command in a session of its own, as a terminal or a scheduler does."""
        bench, nodes, number = self._bench, self._bench.nodes, len(self.runs)
        path = self._folder / "job.yaml"
        with path.open("w") as stream:
            YAML(typ="safe", pure=True).dump(bench.job(self.root, nodes.address if nodes else None), stream)
        trace = bench.folder / "trace.jsonl" if nodes else self._folder / f"trace-{number}.jsonl"
        told, begin = self._folder / f"told-{number}.txt", trace.stat().st_size if trace.exists() else 0
        command, environment = ["ullme_ray", "embed", str(path)], bench.job_environment(trace)
        process: subprocess.Popen[bytes] | Driver
        with told.open("wb") as stream:
            if nodes:
                process = nodes.nursery.driver(command, environment, str(self._folder), stream.fileno())
            else:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=self._folder,
                    env=environment,
                    start_new_session=True,
                    stdout=stream,
                    stderr=stream,
                )
        run = Run(process, trace, begin, told)
        self.runs.append(run)
        return run

    def workers(self) -> list[int]:
        """Pids of Ray's workers that may be at work for this trial."""
        if self._bench.nodes:
            return self._bench.nodes.nursery.workers()
        return [process.pid for run in self.runs for process in run.tree()]

    def report(self) -> dict[str, Any]:
        return dict(json.loads(storage.read_text(f"{self.root}/{JOB_NAME}/embed_report.json")))

    def embedded(self) -> Counter[str]:
        """How often the model computed all of a unit, over all runs."""
        begins: dict[Path, int] = {}
        for run in self.runs:
            begins.setdefault(run.trace, run.begin)
        return Counter(event["unit"] for trace, begin in begins.items() for event in events_of(trace, begin, "embedded"))

    def parts_put(self) -> set[str]:
        """Names of the parts of this trial that the store took."""
        prefix = self.table.removeprefix("s3:/") + "/part-"
        log = self._bench.proxy.log[self._requests_before :]
        return {entry.path for entry in log if entry.method == "PUT" and entry.status == 200 and entry.path.startswith(prefix)}

    def result(self) -> Result:
        return result_of(self.table)


class Reader:
    """The polling reader in a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._watching = False

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "reader.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )

    def watch(self, table: str, states: list[list[Any]]) -> None:
        if self._watching:  # a trial broke off
            self.summary()
        self._send({"table": table, "states": states})
        self._watching = True

    def summary(self) -> dict[str, Any]:
        """Ends the watch."""
        self._send({})
        self._watching = False
        assert self._process is not None
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()


def events_of(trace: Path, begin: int, event: str) -> list[dict[str, Any]]:
    """What the trace holds of one kind from a place on."""
    if not trace.exists():
        return []
    with trace.open("rb") as stream:
        stream.seek(begin)
        lines = stream.read().decode().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def state_of_table(table: str) -> list[Any]:
    return state_of(read_table(table))


def _rows(prefix: str, count: int) -> list[dict[str, Any]]:
    """Texts of many lengths, all different."""
    words = _WORDS.split()
    return [
        {"id": f"{prefix}-{n}", "text": f"{prefix} {n} " + " ".join(words[(n + k) % len(words)] for k in range(3 + n * 7 % 40))}
        for n in range(count)
    ]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
