"""One trial: the command, faults at seeded instants, the command again until it ends well, and what is left compared."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
from findings import Result, compare, unreadable_files
from kinds import Fault
from workbench import (
    RUN_TIMEOUT_S,
    Reader,
    Run,
    Trial,
    Workbench,
    end_processes,
    processes_of,
    state_of_table,
)

MAX_RUNS = 8  # until one ends well, beside those that a fault ended
LEFTOVERS_S = 30.0


@dataclass(frozen=True)
class Quiet:
    """What a run without faults gives, and how long its pipeline takes."""

    result: Result
    states: list[list[Any]]  # that readers may see: before, after
    units: Counter[str]
    seconds: float


@dataclass
class Tally:
    """What became of all instants of a kind."""

    tried: int = 0
    hit: int = 0
    lost: int = 0
    duplicated: int = 0
    unreadable: int = 0
    torn: int = 0
    polls: int = 0
    again: int = 0
    beyond: int = 0
    runs: int = 0
    trials: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.unreadable or self.torn or self.beyond or self.notes)


def quiet_runs(bench: Workbench) -> Quiet:
    """Version 0 of the table, from the earlier corpus, and then what a run on the present one makes of it.

    Raises:
        RuntimeError: one of the two runs failed, or the trace missed units.
    """
    bench.write_first_corpus()
    first = bench.new_trial()
    _finish_quietly(first)
    before = state_of_table(first.table)
    bench.keep_as_version_0(first)
    bench.write_corpus()
    second = bench.new_trial()
    run = _finish_quietly(second)
    began = run.wait_for_first_event()
    embedded = second.embedded()
    if began is None or not bench.units <= embedded.total() == len(embedded):
        raise RuntimeError(f"the trace saw {len(embedded)} units in {embedded.total()} calls, of {bench.units} or more")
    last = [entry.time for entry in bench.proxy.log if entry.path.endswith("embed_report.json") and entry.method == "PUT"][-1]
    return Quiet(second.result(), [before, state_of_table(second.table)], embedded, last - began)


def _finish_quietly(trial: Trial) -> Run:
    run = trial.start()
    run.process.wait(RUN_TIMEOUT_S)
    if run.process.returncode != 0:
        raise RuntimeError(f"a run without faults failed: {run.end_of_output()}")
    return run


def try_instants(bench: Workbench, fault: Fault, quiet: Quiet, count: int, chance: random.Random, tally: Tally) -> None:
    """One trial with up to `count` instants; `tally` gets what came of it."""
    began = time.monotonic()
    trial = bench.new_trial()
    reader = Reader(bench.store_environment())
    reader.watch(trial.table, quiet.states)
    tally.trials += 1
    hits_before = tally.hit
    try:
        options = fault.open(bench, trial)
        try:
            if fault.ends_run:
                _chain(bench, fault, quiet, count, chance, tally, trial, options)
            else:
                _one_run(bench, fault, quiet, count, chance, tally, trial, options)
            failed = _run_until_well(fault, trial, options, tally)
        finally:
            bench.proxy.spoil(None)
            _check_nothing_runs(trial, tally)
            fault.close(bench)
        seen = reader.summary()
    finally:
        reader.close()
    tally.runs += len(trial.runs)
    _check(bench, fault, trial, quiet, seen, tally, crashes=(tally.hit - hits_before) * fault.is_crash + failed)
    tally.seconds += time.monotonic() - began


def _one_run(
    bench: Workbench, fault: Fault, quiet: Quiet, count: int, chance: random.Random, tally: Tally, trial: Trial, options: Any
) -> None:
    instants = sorted(chance.random() * quiet.seconds for _ in range(count))
    run = trial.start(**options)
    first = run.wait_for_first_event()
    for instant in instants:
        if first is None or not _wait_until(run, first + instant):
            break
        _strike(bench, fault, trial, run, chance, tally)
    _wait(run, tally)


def _chain(
    bench: Workbench, fault: Fault, quiet: Quiet, count: int, chance: random.Random, tally: Tally, trial: Trial, options: Any
) -> None:
    """Every run but the last is ended at an instant of the time that its missing units will take."""
    for _ in range(count):
        left = 1 - len(trial.parts_put()) / quiet.units.total()
        run = trial.start(**options)
        first = run.wait_for_first_event()
        if first is None or not _wait_until(run, first + chance.random() * quiet.seconds * max(left, 0.1)):
            tally.tried += 1
            break
        _strike(bench, fault, trial, run, chance, tally)
        _wait(run, tally)


def _strike(bench: Workbench, fault: Fault, trial: Trial, run: Run, chance: random.Random, tally: Tally) -> None:
    tally.tried += 1
    tally.hit += fault.strike(bench, trial, run, chance)


def _wait_until(run: Run, instant: float) -> bool:
    """False when the run was over before."""
    while (left := instant - time.monotonic()) > 0 and not run.over:
        time.sleep(min(left, 0.02))
    return not run.over


def _wait(run: Run, tally: Tally) -> None:
    try:
        run.process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        tally.notes.append(f"hung for {RUN_TIMEOUT_S:.0f} s: {run.end_of_output()}")
        end_processes([*run.tree(), psutil.Process(run.process.pid)])
        run.process.wait()


def _run_until_well(fault: Fault, trial: Trial, options: Any, tally: Tally) -> int:
    """Gives the command again until it exits 0; returns how many runs failed that no fault was meant to end."""
    for run in trial.runs:
        _wait(run, tally)
    failed = 0
    for _ in range(MAX_RUNS):
        last = trial.runs[-1]
        if last.process.returncode == 0 and not fault.overlaps:
            break
        if fault.overlaps and all(run.process.returncode == 0 for run in trial.runs):
            break
        if not fault.ends_run:
            failed += 1
            told = last.end_of_output()
            if "Traceback" in told or "error:" not in told:
                tally.notes.append(f"ended with {last.process.returncode} and no clear error: {told}")
        fault.between_runs()
        _wait(trial.start(**options), tally)
    else:
        tally.notes.append(f"no run of {len(trial.runs)} ended well: {trial.runs[-1].end_of_output()}")
    return failed


def _check_nothing_runs(trial: Trial, tally: Tally) -> None:
    """No run leaves processes behind, however it ended."""
    deadline = time.monotonic() + LEFTOVERS_S
    sessions = {run.process.pid for run in trial.runs}
    while (left := processes_of(sessions)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        tally.notes.append(f"{len(left)} processes outlive their run by {LEFTOVERS_S:.0f} s, such as {left[0].name()}")
        end_processes(left)


def _check(
    bench: Workbench, fault: Fault, trial: Trial, quiet: Quiet, seen: dict[str, Any], tally: Tally, *, crashes: int
) -> None:
    where = f"{fault.name}, {trial.root}"
    findings = compare(trial.result(), quiet.result)
    broken = unreadable_files(trial.table)
    tally.lost += findings.lost
    tally.duplicated += findings.duplicated
    tally.unreadable += len(broken)
    tally.torn += len(seen["torn"])
    tally.polls += seen["polls"]
    tally.notes += [f"{where}: {note}" for note in [*findings.notes, *broken, *seen["torn"][:3]]]
    if seen["seen"][-1:] != [len(quiet.states) - 1]:
        tally.notes.append(f"{where}: the reader saw the states {seen['seen']}, and not the last one at last")
    if seen["unanswered"] and not fault.unanswered:
        tally.notes.append(f"{where}: {seen['unanswered']} polls were not answered")
    report = trial.report()
    if report["rows"] != sum(report[f"rows_{what}"] for what in ("embedded", "copied", "reused", "dead")):
        tally.notes.append(f"{where}: the report's rows do not add up: {report}")
    embedded = trial.embedded()
    if embedded.keys() != quiet.units.keys():
        tally.notes.append(f"{where}: {len(embedded.keys() ^ quiet.units.keys())} units are not those of the quiet run")
    again = embedded.total() - len(embedded)
    if not fault.overlaps:
        tally.again += again
        tally.beyond += max(0, again - bench.actors * crashes)
