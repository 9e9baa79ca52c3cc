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
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from watched_job import make_job, print_row, run_watched, text_of

ROW_BYTES = 64 * 2**10  # of the column carried along
ROWS_PER_UNIT = 64
HEAD = ["blocks, MiB", "object stores", "rows", "seconds", "driver, MiB", "Ray's workers, MiB", "spilled to disk, MiB"]


def write_corpus(folder: Path, num_rows: int) -> None:
    folder.mkdir(parents=True)
    cargo = pa.array(["0123456789abcdef" * (ROW_BYTES // 16)])
    schema = pa.schema({"id": pa.int64(), "text": pa.string(), "cargo": pa.string()})
    with pq.ParquetWriter(folder / "rows.parquet", schema) as out:
        for start in range(0, num_rows, ROWS_PER_UNIT):
            rows = range(start, min(start + ROWS_PER_UNIT, num_rows))
            columns = {"id": list(rows), "text": [text_of(row) for row in rows], "cargo": cargo.take([0] * len(rows))}
            out.write_table(pa.table(columns))


def embed(job: dict[str, Any], store_mib: int) -> dict[str, Any]:
    """In this process: a Ray with that object store, and one run."""
    import ray
    from ray._private.internal_api import memory_summary

    from ullme_ray.embed import run_embed
    from ullme_ray.spec.job import JobSpec

    ray.init(address="local", num_cpus=4, object_store_memory=store_mib * 2**20, include_dashboard=False, log_to_driver=False)
    report = run_embed(JobSpec.model_validate(job), progress=False)
    spilled = re.search(r"Spilled (\d+) MiB", memory_summary(ray.get_runtime_context().gcs_address, stats_only=True))
    return {"rows": report.table_rows, "seconds": report.seconds, "spilled_mib": int(spilled[1]) if spilled else 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, nargs="+", default=[1, 10], help="sizes of the corpus, in object stores")
    parser.add_argument("--store-mib", type=int, default=80, help="size of the object store; Ray wants 75 at least")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(embed(json.loads(args.child), args.store_mib)))
        return

    print_row(HEAD)
    print_row(["---:"] * len(HEAD))
    for times in args.times:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = make_job(folder, {"columns": ["cargo"]}, rows_per_unit=ROWS_PER_UNIT)
            num_rows = int(times * args.store_mib * 2**20 / ROW_BYTES)
            write_corpus(folder / "corpus", num_rows)
            run = run_watched([__file__, "--child", json.dumps(job), "--store-mib", str(args.store_mib)])
            assert run["rows"] == num_rows, f"{num_rows} rows went in, {run['rows']} came out"
            memory = [round(run["driver_mib"]), round(run["workers_mib"]), run["spilled_mib"]]
            print_row([round(num_rows * ROW_BYTES / 2**20), f"{times:g}", num_rows, run["seconds"], *memory])


if __name__ == "__main__":
    main()
