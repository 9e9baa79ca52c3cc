"""A corpus many times the object store: `python tests/bench/store.py [--times 1 10] [--store-mib 80]`.

Each size is a job in a process of its own, with a Ray whose object store is so small. Rows carry a large column along to the
table, so that the blocks between reading, embedding and writing hold `--times` as much as the store, while a model of one layer
has little to do. Prints a Markdown table: what the blocks hold, time, the most that the driver, and Ray with all its workers,
held of their own, and what Ray wrote to disk because the store was full. Flat figures are what bounded memory looks like.

Cost: a minute or two on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from growth import Memory, text_of

ROW_BYTES = 64 * 2**10  # of the column carried along
ROWS_PER_UNIT = 64


def write_corpus(folder: Path, num_rows: int) -> None:
    folder.mkdir(parents=True)
    cargo = pa.array(["0123456789abcdef" * (ROW_BYTES // 16)])
    with pq.ParquetWriter(
        folder / "rows.parquet", pa.schema({"id": pa.int64(), "text": pa.string(), "cargo": pa.string()})
    ) as out:
        for start in range(0, num_rows, ROWS_PER_UNIT):
            rows = range(start, min(start + ROWS_PER_UNIT, num_rows))
            columns = {"id": list(rows), "text": [text_of(row, 0) for row in rows], "cargo": cargo.take([0] * len(rows))}
            out.write_table(pa.table(columns))


def make_job(folder: Path) -> dict[str, Any]:
    return {
        "name": "store",
        "storage": str(folder / "runs"),
        "model": {"base": str(folder / "model"), "max_tokens": 64},
        "embed": {
            "input": {"path": str(folder / "corpus"), "id": "id", "columns": ["cargo"]},
            "actors": {"min": 1, "max": 1},
            "rows_per_unit": ROWS_PER_UNIT,
        },
    }


def embed(job: dict[str, Any], store_mib: int) -> dict[str, Any]:
    """In this process: a Ray with that object store, and one run."""
    import ray
    from ray._private.internal_api import memory_summary

    from ullme_ray.embed import run_embed
    from ullme_ray.spec.job import JobSpec

    ray.init(address="local", num_cpus=4, object_store_memory=store_mib * 2**20, include_dashboard=False, log_to_driver=False)
    report = run_embed(JobSpec.model_validate(job), progress=False)
    spilled = re.search(r"Spilled (\d+) MiB", memory_summary(stats_only=True))
    return {"rows": report.table_rows, "seconds": report.seconds, "spilled_mib": int(spilled[1]) if spilled else 0}


def run(job: dict[str, Any], store_mib: int) -> dict[str, Any]:
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(job), "--store-mib", str(store_mib)],
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    memory = Memory(process.pid)
    output, _ = process.communicate()
    memory.stop()
    if process.returncode:
        raise SystemExit(output)
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**figures, "process_s": time.monotonic() - started, "driver": memory.driver, "workers": memory.workers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, nargs="+", default=[1, 10], help="sizes of the corpus, in object stores")
    parser.add_argument("--store-mib", type=int, default=80, help="size of the object store; Ray wants 75 at least")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(embed(json.loads(args.child), args.store_mib)))
        return

    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.spec.job import ScratchSpec

    head = ("blocks, MiB", "object stores", "rows", "seconds", "driver, MiB", "Ray's workers, MiB", "spilled to disk, MiB")
    print("| " + " | ".join(head) + " |", "|" + " ---: |" * len(head), sep="\n", flush=True)
    for times in args.times:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spec = ScratchSpec(hidden_size=32, layers=1, heads=2, vocab_size=512)
            build_scratch([text_of(row, 0) for row in range(500)], spec, max_tokens=64, seed=0, folder=str(folder / "model"))
            num_rows = int(times * args.store_mib * 2**20 / ROW_BYTES)
            write_corpus(folder / "corpus", num_rows)
            figures = run(make_job(folder), args.store_mib)
            assert figures["rows"] == num_rows, f"{num_rows} rows went in, {figures['rows']} came out"
            cells = (
                f"{num_rows * ROW_BYTES / 2**20:,.0f}",
                f"{times:g}",
                f"{num_rows:,}",
                f"{figures['seconds']:.1f}",
                f"{figures['driver'] / 2**20:,.0f}",
                f"{figures['workers'] / 2**20:,.0f}",
                f"{figures['spilled_mib']:,}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
