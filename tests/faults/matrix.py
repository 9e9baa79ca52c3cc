"""The fault matrix of `ullme-ray embed`: `python tests/faults/matrix.py [--kinds "driver,S3 cut"] [--instants 20] [--at 0.5]`.

Runs the real command on a real S3 server (SeaweedFS) through a proxy, strikes it at random instants, gives it again until it
ends well, and compares the table with that of a quiet run, row by row and vector by vector, dead letters included. Meanwhile a
reader polls the table every 50 ms. Prints a Markdown table, and below it whatever was not as it should be, and every kind that
hit no running job; exits 1 then.

An instant is a seeded share of the parts that the job puts (for a read task: of the units it reads), and a moment after that
part; one that finds the run over is drawn anew. Faults that a run survives strike it up to five times; a run that a fault ends
is given again and struck again. Each trial is a line of `--results`: the same command goes on after the lines that are there,
and `--minutes` ends it in good time.

All jobs join one Ray cluster of two nodes, and their processes are forked from one that has done the imports; what runs in them
is what users run. Cold starts are in test_faults_short.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinds import FAULTS
from trials import Tally, quiet_runs, try_instants
from workbench import Workbench

_LAST_SHARE = 1.1  # instants beyond 1 are after the last part: around the commit
_MOST_TRIES = 4  # redraws of an instant, in all, before a kind is given up
_HEAD = (
    "kind | instants tried | hit mid-run | rows lost | duplicated | unreadable parts | torn reads (of polls) "
    "| units again | beyond one per actor | runs | minutes"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(FAULTS), help=f"comma-separated: {', '.join(FAULTS)}")
    parser.add_argument("--instants", type=int, default=20, help="that hit a running job, for each kind")
    parser.add_argument("--at", help="these shares of the parts instead of random ones, one trial for each: 0.1,0.5,0.9")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--units", type=int, default=20, help="new units of the corpus, beside those it had before")
    parser.add_argument("--actors", type=int, default=2, help="largest pool of the job")
    parser.add_argument("--results", type=Path, default=Path("fault_matrix.jsonl"), help="one line for each trial")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so long")
    parser.add_argument("--table", action="store_true", help="only print what the results hold")
    given = parser.parse_args()
    kinds = [name.strip() for name in given.kinds.split(",")]
    if strangers := [name for name in kinds if name not in FAULTS]:
        parser.error(f"--kinds: {', '.join(strangers)} is none of {', '.join(FAULTS)}")
    shares = [float(share) for share in given.at.split(",")] if given.at else []

    if not given.table:
        with (
            tempfile.TemporaryDirectory(prefix="fm-") as folder,
            Workbench(Path(folder), given.seed, units=given.units, actors=given.actors, with_cluster=True) as bench,
        ):
            _fill(bench, given, kinds, shares)
    tallies = _tallies(given.results, bool(shares))
    print(f"\n{os.cpu_count()} cores, {platform.machine()}\n\n| {_HEAD} |\n|{'---|' * (_HEAD.count('|') + 1)}")
    for name in kinds:
        print(_row(name, tallies[name]))
    notes = [f"- {name}: {note}" for name in kinds for note in tallies[name].notes]
    notes += [f"- {name}: no running job was hit, so nothing is known of it" for name in kinds if not tallies[name].hit]
    print("\n" + ("\n".join(notes) or "Nothing lost, duplicated, unreadable, torn, left running or unclear."))
    sys.exit(not all(tallies[name].clean for name in kinds))


def _fill(bench: Workbench, given: argparse.Namespace, kinds: list[str], shares: list[float]) -> None:
    """Kind after kind, one trial each, until all have their instants or the time is over."""
    until = time.monotonic() + 60.0 * given.minutes
    quiet = quiet_runs(bench)
    found = quiet.result
    print(
        f"quiet run: {found.copies.total():,} rows, {quiet.units.total()} units, {found.dead.total()} dead letters; "
        f"{bench.actors} actors; seed {given.seed}",
        flush=True,
    )
    left = list(kinds)
    while left and time.monotonic() < until:
        for name in list(left):
            fault, tally = FAULTS[name], _tallies(given.results, bool(shares))[name]
            wanted = len(shares) or given.instants
            if tally.hit >= wanted or tally.tried >= wanted * _MOST_TRIES or time.monotonic() >= until:
                left.remove(name)
                continue
            if reason := fault.unavailable(bench):
                print(f"{name}: skipped, {reason}", flush=True)
                left.remove(name)
                continue
            chance = random.Random(f"{given.seed} {name} {tally.trials}")
            count = min(fault.per_run, wanted - tally.hit)
            drawn = [shares[tally.hit]] if shares else [chance.random() * _LAST_SHARE for _ in range(count)]
            done = try_instants(bench, fault, quiet, drawn, chance)  # one that breaks off ends all, and is not kept
            line = {"kind": name, "seed": given.seed, "at": bool(shares), "shares": drawn, "when": time.time(), **asdict(done)}
            with given.results.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(
                f"{name}: {done.hit} of {len(drawn)} hit in {done.seconds} s" + "".join(f"; {n}" for n in done.notes),
                flush=True,
            )


def _tallies(results: Path, at: bool) -> dict[str, Tally]:
    """The sums of all trials so far at random instants, or at given ones."""
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    lines: list[dict[str, Any]] = []
    if results.exists():
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        if line["at"] == at:
            tallies[line["kind"]] += Tally(**{name: line[name] for name in asdict(Tally())})
    return tallies


def _row(name: str, tally: Tally) -> str:
    cells = [
        name,
        tally.tried,
        tally.hit,
        tally.lost,
        tally.duplicated,
        tally.unreadable,
        f"{tally.torn} of {tally.polls}",
        "-" if FAULTS[name].overlaps else tally.again,
        "-" if FAULTS[name].overlaps else tally.beyond,
        tally.runs,
        f"{tally.seconds / 60:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
