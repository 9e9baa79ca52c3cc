"""One trial: the command, faults at seeded instants, the command again until it ends well, and what is left compared."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import psutil
from findings import Result, compare, unreadable_files
from kinds import Fault
from processes import end_processes, processes_of, title_of
from workbench import RUN_TIMEOUT_S, Run, Trial, Workbench, state_of_table

MAX_RUNS = 8  # until one ends well, beside those that a fault ended
LEFTOVERS_S = 30.0
_OUR_WORK = re.compile(r"ray::.*(EmbedActor|read_step|_flow|_Counts)")
_JITTER_S = 0.4  # after the part at which an instant is due, so that instants fall between parts too


@dataclass(frozen=True)
class Quiet:
    """What a run without faults gives."""

    result: Result
    states: list[list[Any]]  # that readers may see: before, after
    units: Counter[str]
    parts: int  # that it puts


@dataclass
class Tally:
    """What became of the instants of some trials of one kind."""

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
        """Whether there were instants that hit, and none of them did harm."""
        return self.hit > 0 and not (self.lost or self.duplicated or self.unreadable or self.torn or self.beyond or self.notes)

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))


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
    _finish_quietly(second)
    embedded = second.embedded()
    if not bench.units <= embedded.total() == len(embedded):
        raise RuntimeError(f"the trace saw {len(embedded)} units in {embedded.total()} calls, of {bench.units} or more")
    return Quiet(second.result(), [before, state_of_table(second.table)], embedded, len(second.parts_put()))


def _finish_quietly(trial: Trial) -> Run:
    run = trial.start()
    run.process.wait(RUN_TIMEOUT_S)
    if run.process.returncode != 0:
        raise RuntimeError(f"a run without faults failed: {run.end_of_output()}")
    return run


def try_instants(bench: Workbench, fault: Fault, quiet: Quiet, shares: Sequence[float], chance: random.Random) -> Tally:
    """One trial with an instant at each share of the parts that are to be put; 1 and more means after the last of them."""
    began, tally = time.monotonic(), Tally(trials=1)
    trial = bench.new_trial()
    bench.reader.watch(trial.table, quiet.states)
    try:
        strike = _chain if fault.ends_run else _one_run
        strike(bench, fault, quiet, sorted(shares), chance, tally, trial)
        failed = _run_until_well(bench, fault, trial, tally)
    finally:
        bench.proxy.spoil(None)
        fault.between_runs(bench)
        _check_nothing_runs(trial, tally)
        seen = bench.reader.summary()
    tally.runs += len(trial.runs)
    _check(bench, fault, trial, quiet, seen, tally, crashes=tally.hit * fault.is_crash + failed)
    tally.seconds = round(time.monotonic() - began, 1)
    return tally


def _one_run(
    bench: Workbench, fault: Fault, quiet: Quiet, shares: list[float], chance: random.Random, tally: Tally, trial: Trial
) -> None:
    run = trial.start()
    for share in shares:
        if not _wait_until(fault, trial, run, share, quiet, chance):
            break
        _strike(bench, fault, trial, run, chance, tally)
    tally.tried = len(shares)
    _wait(run, tally)


def _chain(
    bench: Workbench, fault: Fault, quiet: Quiet, shares: list[float], chance: random.Random, tally: Tally, trial: Trial
) -> None:
    """Every run but the last is ended; the next one goes on from its parts."""
    for share in shares:
        run = trial.start()
        if _wait_until(fault, trial, run, share, quiet, chance):
            _strike(bench, fault, trial, run, chance, tally)
        tally.tried += 1
        _wait(run, tally)
        if run.process.returncode == 0:
            break
        if run.process.returncode != fault.exit_code:
            tally.notes.append(f"ended with {run.process.returncode} instead of {fault.exit_code}: {run.end_of_output()}")


def _strike(bench: Workbench, fault: Fault, trial: Trial, run: Run, chance: random.Random, tally: Tally) -> None:
    tally.hit += fault.strike(bench, trial, run, chance)


def _wait_until(fault: Fault, trial: Trial, run: Run, share: float, quiet: Quiet, chance: random.Random) -> bool:
    """Until the pipeline is at work and so much of the trial is done; False when the run was over before."""
    if run.wait_for_first_event() is None:
        return False
    wanted = int(share * (quiet.units.total() if fault.by_reads else quiet.parts))
    while (len(run.events("read")) if fault.by_reads else len(trial.parts_put())) < wanted and not run.over:
        time.sleep(0.01)
    due = time.monotonic() + (0.0 if fault.by_reads else chance.random() * _JITTER_S)  # a unit is read in a moment
    while time.monotonic() < due and not run.over:
        time.sleep(0.005)
    return not run.over


def _wait(run: Run, tally: Tally) -> None:
    try:
        run.process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        tally.notes.append(f"hung for {RUN_TIMEOUT_S:.0f} s: {run.end_of_output()}")
        run.end()


def _run_until_well(bench: Workbench, fault: Fault, trial: Trial, tally: Tally) -> int:
    """Gives the command again until it exits 0; returns how many runs failed that no fault was meant to end."""
    for run in trial.runs:
        _wait(run, tally)
    failed = 0
    if fault.overlaps:
        failed = sum(run.process.returncode != 0 for run in trial.runs)
        tally.notes += [f"one of two failed: {run.end_of_output()}" for run in trial.runs if run.process.returncode]
    for _ in range(MAX_RUNS):
        last = trial.runs[-1]
        if last.process.returncode == 0:
            break
        if not fault.ends_run and not fault.overlaps:
            failed += 1
            told = last.end_of_output()
            if "Traceback" in told or "error:" not in told:
                tally.notes.append(f"ended with {last.process.returncode} and no clear error: {told}")
        fault.between_runs(bench)
        _wait(trial.start(), tally)
    else:
        tally.notes.append(f"no run of {len(trial.runs)} ended well: {trial.runs[-1].end_of_output()}")
    return failed


def _check_nothing_runs(trial: Trial, tally: Tally) -> None:
    """No run leaves processes behind, nor workers at work, however it ended."""
    deadline = time.monotonic() + LEFTOVERS_S
    sessions = {run.process.pid for run in trial.runs}

    def left() -> list[psutil.Process]:
        titles = {pid: title_of(pid) for pid in trial.workers()}
        busy = [pid for pid, title in titles.items() if _OUR_WORK.search(title)]
        return processes_of(sessions) + [psutil.Process(pid) for pid in busy if psutil.pid_exists(pid)]

    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if found:
        titles = [title_of(process.pid).replace("\0", " ")[:80] for process in found[:3]]
        tally.notes.append(f"{len(found)} processes outlive their run by {LEFTOVERS_S:.0f} s, such as {titles}")
        end_processes(found)


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
