"""How embedding grows with the corpus: `python tests/bench/growth.py [--rows 10000 100000 1000000] [--folder FOLDER]`.

For each size: a first run, the same again without changes, and one with 1 % of the rows changed in every file, each as a
process of its own with the real command. Prints a Markdown table: time in all, of planning and of the commit, the most memory
that the driver, and Ray with all its workers, held of their own (object store left out), and the size of the table.

Cost: a million rows take some minutes and about 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from watched_job import make_job, print_row, run_watched, text_of

ROWS_PER_FILE = 50_000
HEAD = ["rows", "run", "seconds", "planning", "commit", "rows/s", "embedded", "copied"]
HEAD += ["driver, MiB", "Ray's workers, MiB", "table, MiB"]


def write_corpus(folder: Path, num_rows: int, *, changed: bool) -> None:
    """In the changed state every hundredth row reads otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        with (folder / f"{number:05}.jsonl").open("w", encoding="utf-8") as stream:
            for row in range(start, min(start + ROWS_PER_FILE, num_rows)):
                text = text_of(row) + (" changed" if changed and row % 100 == 0 else "")
                stream.write(json.dumps({"id": f"d{row}", "text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="where corpora and tables go; absent: a temporary folder")
    parser.add_argument("--json", help="also write all figures to this file")
    args = parser.parse_args()

    print_row(HEAD)
    print_row(["---:", "---", *["---:"] * (len(HEAD) - 2)])
    figures = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for num_rows in args.rows:
            folder = Path(temporary) / str(num_rows)
            folder.mkdir()
            job = folder / "job.yaml"
            job.write_text(json.dumps(make_job(folder, {})), encoding="utf-8")
            for name in ("first", "no change", "1 % changed"):
                if name != "no change":
                    write_corpus(folder / "corpus", num_rows, changed=name == "1 % changed")
                run = run_watched(["-m", "ullme_ray", "embed", str(job), "--json"])
                figures.append({"run": name, **run})
                assert run["table_rows"] == num_rows, f"{num_rows} rows went in, {run['table_rows']} came out"
                times = [run["seconds"], f"{run['plan_seconds']:.2f}", f"{run['commit_seconds']:.2f}"]
                counts = [round(num_rows / run["seconds"]), run["rows_embedded"], run["rows_copied"]]
                sizes = [round(run["driver_mib"]), round(run["workers_mib"]), round(run["table_bytes"] / 2**20)]
                print_row([num_rows, name, *times, *counts, *sizes])
            shutil.rmtree(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
