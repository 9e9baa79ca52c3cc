"""What a run of many units costs its driver, with no model and no vectors: planning, handing out units, the commit.

    python tests/bench/driver.py --units 1000000 --scheduled 5000

Real code of `ullme_ray.embed` throughout: the corpus is real Parquet files of one row per unit, the units run through the real
pipeline with steps that compute nothing, the parts are names in a real Delta log. What a unit costs is printed at the end as
options for `ullme-ray plan --scale`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FILE = 1000  # and units, as a unit is one row here
ROWS_PER_UNIT = 4096  # that a part stands for in the log


class Meter:
    """Time and CPU time of this process, and the most memory that its tree held, while in a `with` block."""

    def __enter__(self) -> Meter:
        self._me = psutil.Process()
        self.base_bytes = self._me.memory_info().rss
        self.peak_bytes = self.base_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._wall, self._cpu = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_s = time.monotonic() - self._wall, time.process_time() - self._cpu
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, self._me.memory_info().rss)

    def line(self, count: int, what: str) -> str:
        grown = self.peak_bytes - self.base_bytes
        return (
            f"{self.seconds:.1f} s ({self.cpu_s:.1f} s CPU), {1e6 * self.cpu_s / count:.1f} us CPU and "
            f"{max(0, grown) / count:,.0f} bytes of memory per {what}"
        )


def write_corpus(folder: Path, units: int) -> None:
    ids = pa.array([str(row) for row in range(ROWS_PER_FILE)])
    rows = pa.table({"id": ids, "text": ids})
    folder.mkdir(parents=True)
    pq.write_table(rows, folder / "0.parquet")
    for number in range(1, -(-units // ROWS_PER_FILE)):
        shutil.copy(folder / "0.parquet", folder / f"{number}.parquet")


def job_for(folder: Path, actors: int) -> Any:
    from ullme_ray.spec.job import JobSpec

    embed = {
        "input": {"path": str(folder / "corpus"), "id": "id"},
        "output": {"path": str(folder / "table")},
        "rows_per_unit": 1,
    }
    embed["actors"] = {"min": actors, "max": actors}
    return JobSpec.model_validate({"name": "driver", "storage": str(folder), "model": {"base": str(folder)}, "embed": embed})


# -- the steps that compute nothing; sent to Ray's processes by value, since this file is no module there ---------------------


def fake_read(row: dict[str, Any], context: Any, attempts: Any) -> dict[str, Any]:
    return row


class FakeActor:
    def __init__(self, context: Any, attempts: Any) -> None:
        self._context = context

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import pickle

        from ullme_ray.embed.parts import Part
        from ullme_ray.embed.steps import Forward, Outcome

        part = Part(self._context.settings.key_of(pickle.loads(row["unit"])), "0" * 16, 1, 1)
        forward = Forward(num_tokens=1, num_positions=1, seconds=0.0, flop=0.0, peak_flop=0.0, actor="fake", not_compiled=None)
        return {"unit": row["unit"], "work": pickle.dumps(Outcome(part, 1, 0, 0, 0, forward, 0))}


def measure(folder: Path, units: int, scheduled: int, actors: int) -> dict[str, float]:
    import ray

    from ullme_ray.embed import flow
    from ullme_ray.embed.commit import active_parts, commit
    from ullme_ray.embed.listing import list_input
    from ullme_ray.embed.parts import Part, PartSettings
    from ullme_ray.embed.run_plan import make_plan
    from ullme_ray.embed.steps import EmbedContext, Forward, Outcome
    from ullme_ray.table import open_table
    from ullme_ray.vectors import VectorFormat

    found: dict[str, float] = {}
    job = job_for(folder, actors)
    table = str(folder / "table")
    types = pa.schema([("id", pa.string())])
    settings = PartSettings(job.embed.input, types, "f" * 64, VectorFormat.of(job.embed.output))

    base_bytes = psutil.Process().memory_info().rss
    with Meter() as meter:
        files = list_input(job)
        plan = make_plan(files, table, settings, {}, job.embed)
    assert len(plan.missing) == units
    say(f"plan: {units:,} units of {len(files):,} files: {meter.line(units, 'unit')}")
    found["plan_us"] = 1e6 * meter.cpu_s / units

    if scheduled:
        context = EmbedContext(job, table, settings)
        watch, count = TreeWatch(), 0
        with watch:
            begun = time.monotonic()
            for _ in flow.run_units(plan.missing, context, flow.Steps(fake_read, FakeActor)):
                count += 1
                if count == 1:
                    first_s, first_cpu_s = time.monotonic() - begun, watch.cpu_s()["pipeline"]
                    watch.begin()
                if count > scheduled:
                    break  # it has handed out and taken back so many since the first one
            taken_s = time.monotonic() - begun - first_s
        cpu_s = watch.cpu_s()
        say(
            f"schedule: of {units:,} units the first was back after {first_s:.0f} s ({first_cpu_s:.0f} s CPU of the pipeline); "
            f"then {count - 1:,} in {taken_s:.0f} s, {(count - 1) / taken_s:,.0f} units/s with all of Ray on this machine"
        )
        say("  CPU ms per unit: " + ", ".join(f"{kind} {1e3 * used / (count - 1):.2f}" for kind, used in cpu_s.items()))
        say(f"  the process that runs the pipeline held {watch.most_bytes / 2**20:,.0f} MiB at its most")
        # Its one busy thread is what cannot be had twice; tasks, actors and their raylets are on as many machines as there are.
        found["plan_us"] += 1e6 * first_cpu_s / units
        found["dispatch_per_s"] = (count - 1) / cpu_s["pipeline"]
    ray.shutdown()

    forward = Forward(num_tokens=1, num_positions=1, seconds=0.0, flop=0.0, peak_flop=0.0, actor="fake", not_compiled=None)
    with Meter() as meter:  # what the driver keeps of every unit until it commits
        made = (Part(key, content(key), ROWS_PER_UNIT, ROWS_PER_UNIT * 1043) for key in plan.missing_keys)
        outcomes = [Outcome(part, ROWS_PER_UNIT, 0, 0, 0, replace(forward), 0) for part in made]
        parts = {outcome.part.key: outcome.part for outcome in outcomes}
    say(f"outcomes: {meter.line(units, 'unit')}")
    with Meter() as meter:
        commit(table, parts, settings.schema, job_name="driver", fingerprint="f")
    log = {path.name: path.stat().st_size for path in (Path(table) / "_delta_log").iterdir()}
    say(
        f"commit: {meter.line(units, 'part')}; log {', '.join(f'{name} {size / 2**20:,.1f} MiB' for name, size in log.items())}"
    )
    found["commit_us"] = 1e6 * meter.cpu_s / units
    found["log_bytes"] = sum(log.values()) / units
    found["driver_bytes"] = (peak_bytes() - base_bytes) / units
    say(f"this process at its most: {peak_bytes() / 2**20:,.0f} MiB, {base_bytes / 2**20:,.0f} MiB before it planned")
    with Meter() as meter:
        active = active_parts(open_table(table))
    assert active == parts
    say(f"read the table's log: {meter.line(units, 'part')}")
    wanted = dict(list(parts.items())[1:])
    with Meter() as meter:
        commit(table, wanted, settings.schema, job_name="driver", fingerprint="f")
    say(f"commit of one change to it: {meter.seconds:.1f} s")
    return found


def content(key: Any) -> str:
    return hashlib.sha256(str(key).encode()).hexdigest()[:16]


class TreeWatch:
    """CPU time of the processes below this one, by what they are, and the most memory of the one that runs the pipeline."""

    def __init__(self) -> None:
        self.most_bytes = 0
        self._first: dict[int, float] = {}
        self._last: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> TreeWatch:
        self.begin()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._last |= self._look()
        self._stop.set()
        self._thread.join()

    def begin(self) -> None:
        """Leaves out what was used until now."""
        self._last |= self._look()
        self._first = {pid: cpu_s for pid, (_, cpu_s) in self._last.items()}

    def cpu_s(self) -> dict[str, float]:
        """By kind of process, the most first; one that ended counts up to its last second."""
        found: dict[str, float] = {}
        for pid, (kind, cpu_s) in self._last.items():
            found[kind] = found.get(kind, 0.0) + cpu_s - self._first.get(pid, 0.0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._last |= self._look()

    def _look(self) -> dict[int, tuple[str, float]]:
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                words, times = " ".join(process.cmdline()), process.cpu_times()
                if FLOW in words:
                    self.most_bytes = max(self.most_bytes, process.memory_info().rss)
                known = self._last.get(process.pid, ("", 0.0))[0]
                kind = known if known == "pipeline" else kind_of(words)  # a process has the name of what it does just now
                found[process.pid] = (kind, times.user + times.system)
            except psutil.Error:
                continue
        return found


FLOW = "ray::_flow"


def kind_of(words: str) -> str:
    kinds = {FLOW: "pipeline", "raylet/raylet": "raylet", "gcs_server": "GCS", "ray::": "tasks and actors"}
    return next((kind for word, kind in kinds.items() if word in words), "others of Ray")


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=1_000_000, help="planned and committed")
    parser.add_argument("--scheduled", type=int, default=5000, help="of these, run through Ray Data; 0 leaves it out")
    parser.add_argument("--actors", type=int, default=8, help="of the pool; as many tasks read beside them")
    parser.add_argument("--folder", type=Path, help="for the corpus and the table; a temporary one by default")
    given = parser.parse_args()
    assert given.units % ROWS_PER_FILE == 0, f"--units must be a multiple of {ROWS_PER_FILE}"
    import ray

    from ullme_ray.runtime import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        write_corpus(Path(folder) / "corpus", given.units)
        ray.init(
            address="local", num_cpus=2 * given.actors, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        say(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}, Ray {ray.__version__}")
        found = measure(Path(folder), given.units, given.scheduled, given.actors)
    say("ullme-ray plan JOB.yaml --scale DOCUMENTS " + " ".join(f"--cost {name}={value:.4g}" for name, value in found.items()))
    say(json.dumps(found))


if __name__ == "__main__":
    main()
