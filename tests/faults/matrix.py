"""The fault matrix of `ullme-ray embed`: `python tests/faults/matrix.py [--kinds "driver,S3 cut"] [--instants 20] [--seed 1]`.

Runs the real command on a real S3 server (SeaweedFS) through a proxy, strikes it at random instants, gives it again until it
ends well, and compares the table with that of a quiet run, row by row and vector by vector, dead letters included. Meanwhile a
reader polls the table every 50 ms. Prints a Markdown table, and below it whatever was not as it should be; exits 1 then.

An instant is a seeded share of the quiet run's time, counted from the first unit that the pipeline reads. One that finds the
run over is redrawn. Faults that a run survives strike it up to four times; a run that a fault ends is given again and struck
again.

Cost: about a minute for a run on 2 cores; 20 instants of all kinds take some hours there.
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
import traceback
from dataclasses import asdict
from pathlib import Path

from kinds import FAULTS
from trials import Tally, quiet_runs, try_instants
from workbench import Workbench

_MOST_TRIES = 4  # redraws of an instant, in all, before a kind is given up
_HEAD = (
    "kind | instants tried | hit mid-run | rows lost | duplicated | unreadable parts | torn reads (of polls) "
    "| units again | beyond one per actor | runs | minutes"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(FAULTS), help=f"comma-separated: {', '.join(FAULTS)}")
    parser.add_argument("--instants", type=int, default=20, help="that hit a running job, for each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--units", type=int, default=40, help="new units of the corpus, beside those it had before")
    parser.add_argument("--actors", type=int, default=2, help="largest pool of the job")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    kinds = [name.strip() for name in given.kinds.split(",")]
    if strangers := [name for name in kinds if name not in FAULTS]:
        parser.error(f"--kinds: {', '.join(strangers)} is none of {', '.join(FAULTS)}")

    tallies: dict[str, Tally] = {}
    with (
        tempfile.TemporaryDirectory(prefix="fm-") as folder,
        Workbench(Path(folder), given.seed, units=given.units, actors=given.actors) as bench,
    ):
        quiet = quiet_runs(bench)
        found = quiet.result
        print(
            f"quiet run: {found.copies.total():,} rows, {quiet.units.total()} units, {found.dead.total()} dead letters; "
            f"pipeline {quiet.seconds:.1f} s, {bench.actors} actors; seed {given.seed}; "
            f"{os.cpu_count()} cores, {platform.machine()}\n\n"
            f"| {_HEAD} |\n|{'---|' * (_HEAD.count('|') + 1)}",
            flush=True,
        )
        for name in kinds:
            fault, chance = FAULTS[name], random.Random(f"{given.seed} {name}")
            if reason := fault.unavailable():
                print(f"| {name} | skipped: {reason} |", flush=True)
                continue
            tally = tallies[name] = Tally()
            began = time.monotonic()
            while tally.hit < given.instants and tally.tried < given.instants * _MOST_TRIES:
                try:
                    try_instants(bench, fault, quiet, min(fault.per_run, given.instants - tally.hit), chance, tally)
                except Exception:  # noqa: BLE001 - the other kinds are still worth trying
                    tally.notes.append(f"a trial broke off: {traceback.format_exc()}")
                    break
            print(_row(name, tally, time.monotonic() - began), flush=True)
    notes = [f"- {name}: {note}" for name, tally in tallies.items() for note in tally.notes]
    print("\n" + ("\n".join(notes) or "Nothing lost, duplicated, unreadable, torn, left running or unclear."))
    if given.json:
        given.json.write_text(json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=2) + "\n")
    sys.exit(not all(tally.clean for tally in tallies.values()))


def _row(name: str, tally: Tally, seconds: float) -> str:
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
        f"{seconds / 60:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
