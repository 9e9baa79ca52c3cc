"""How embedding grows with the corpus: `python tests/bench/growth.py [--rows 10000 100000 1000000] [--folder FOLDER]`.

For each size: a first run, the same again without changes, and one with 1 % of the rows changed in every file, each as a
process of its own with the real command. Prints a Markdown table: time in all, of planning and of the commit, and the most
memory that the driver, and Ray with all its workers, held of their own; object store left out. The model is a random one of one
layer, so that what is measured is everything else.

Cost: a million rows take some minutes and about 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROWS_PER_FILE = 50_000
WORDS = ["bucket", "object", "policy", "access", "table", "query", "value", "region", "key", "version", "stream", "role"]


def text_of(row: int, night: int) -> str:
    """Five to twenty words; on the second night every hundredth row reads otherwise."""
    choice = random.Random(row)
    words = " ".join(choice.choice(WORDS) for _ in range(choice.randint(5, 20)))
    return f"{row} {words}" + (" changed" if night and row % 100 == 0 else "")


def write_corpus(folder: Path, num_rows: int, night: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        with (folder / f"{number:05}.jsonl").open("w", encoding="utf-8") as stream:
            for row in range(start, min(start + ROWS_PER_FILE, num_rows)):
                stream.write(json.dumps({"id": f"d{row}", "text": text_of(row, night)}) + "\n")


def make_job(folder: Path) -> Path:
    job = {
        "name": "growth",
        "storage": str(folder / "runs"),
        "model": {"base": str(folder / "model"), "max_tokens": 64},
        "embed": {"input": {"path": str(folder / "corpus"), "id": "id"}, "actors": {"min": 1, "max": 1}},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


class Memory:
    """Watches a process and all below it: the most that each kind held of its own."""

    def __init__(self, pid: int) -> None:
        self.driver = self.workers = 0
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            own = []
            for process in processes:
                try:
                    info = process.memory_info()
                    own.append(info.rss - info.shared)
                except psutil.NoSuchProcess:
                    own.append(0)
            self.driver = max(self.driver, own[0])
            self.workers = max(self.workers, sum(own[1:]))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def run(job: Path) -> dict[str, Any]:
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "ullme_ray", "embed", str(job), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    memory = Memory(process.pid)
    output, _ = process.communicate()
    memory.stop()
    if process.returncode:
        raise SystemExit(output)
    report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**report, "process_s": time.monotonic() - started, "driver": memory.driver, "workers": memory.workers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="where corpora and tables go; absent: a temporary folder")
    parser.add_argument("--json", help="also write all figures to this file")
    args = parser.parse_args()

    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.spec.job import ScratchSpec

    columns = (
        "rows",
        "run",
        "seconds",
        "planning",
        "commit",
        "rows/s",
        "embedded",
        "copied",
        "driver, MiB",
        "Ray's workers, MiB",
    )
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    print(*lines, sep="\n", flush=True)
    figures = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for num_rows in args.rows:
            folder = Path(temporary) / str(num_rows)
            spec = ScratchSpec(hidden_size=32, layers=1, heads=2, vocab_size=512)
            build_scratch([text_of(row, 0) for row in range(500)], spec, max_tokens=64, seed=0, folder=str(folder / "model"))
            write_corpus(folder / "corpus", num_rows, 0)
            job = make_job(folder)
            for name in ("first", "no change", "1 % changed"):
                if name == "1 % changed":
                    write_corpus(folder / "corpus", num_rows, 1)
                report = run(job)
                figures.append({"run": name, **report})
                cells = (
                    f"{num_rows:,}",
                    name,
                    f"{report['seconds']:.1f}",
                    f"{report['plan_seconds']:.2f}",
                    f"{report['commit_seconds']:.2f}",
                    f"{num_rows / report['seconds']:,.0f}",
                    f"{report['rows_embedded']:,}",
                    f"{report['rows_copied']:,}",
                    f"{report['driver'] / 2**20:,.0f}",
                    f"{report['workers'] / 2**20:,.0f}",
                )
                print("| " + " | ".join(cells) + " |", flush=True)
            shutil.rmtree(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
