"""A short fault matrix of the real command on a real store: a killed actor, bad answers, a stopped and a killed driver."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest
from findings import Result, compare, unreadable_files
from kinds import FAULTS
from processes import processes_of
from workbench import RUN_TIMEOUT_S, Reader, Run, Trial, Workbench

from ullme_ray import storage
from ullme_ray.model import open_encoder
from ullme_ray.spec.job import JobSpec

UNITS = 12
DEAD = {"bad-1", None, "bad-2"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with Workbench(tmp_path_factory.mktemp("faults"), seed=1, units=UNITS, actors=1) as bench:
        bench.write_corpus()
        yield bench


@pytest.fixture(scope="module")
def rows(bench: Workbench) -> dict[str, str]:
    """The good rows of the corpus: id -> text."""
    found = {}
    for info in storage.list_files(bench.corpus):
        for row in map(json.loads, storage.read_text(info.path).splitlines()):
            if isinstance(row["text"], str) and row["id"] is not None:
                found[row["id"]] = row["text"]
    assert len(found) > UNITS
    return found


def check(bench: Workbench, trial: Trial, rows: dict[str, str], reader: Reader) -> None:
    """The table holds every row once, with the vector that the model gives it by itself."""
    seen = reader.summary()
    assert seen["torn"] == []
    assert seen["unanswered"] == 0
    assert seen["seen"] in ([0, 1], [1])
    found = trial.result()
    encoder = open_encoder(JobSpec.model_validate(bench.job(trial.root, None)), device="cpu")
    vectors = {(key, 0): vector for key, vector in zip(rows, encoder.encode(list(rows.values())))}
    wanted = Result(vectors, Counter(vectors.keys()), found.dead)
    findings = compare(found, wanted)
    assert (findings.lost, findings.duplicated, findings.notes) == (0, 0, [])
    assert {key for _, _, key, _ in found.dead} == DEAD
    assert found.dead.total() == len(DEAD)
    assert unreadable_files(trial.table) == []
    control = {key: -vector if key == ("b-3", 0) else vector for key, vector in vectors.items() if key != ("b-5", 0)}
    bad = compare(found, Result(control, Counter(control.keys()), found.dead))
    assert (bad.lost, bad.duplicated) == (1, 1)


def wait_for_parts(trial: Trial, run: Run, count: int) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while len(trial.parts_put()) < count and not run.over and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not run.over, run.end_of_output()


@pytest.fixture
def watched(bench: Workbench, rows: dict[str, str]) -> Iterator[tuple[Trial, Reader]]:
    trial = bench.new_trial()
    bench.reader.watch(trial.table, [[0, ""], bench.state_of_ids(rows)])
    try:
        yield trial, bench.reader
    finally:
        bench.proxy.spoil(None)


def test_a_run_survives_a_killed_actor_errors_and_cut_uploads(
    bench: Workbench, rows: dict[str, str], watched: tuple[Trial, Reader]
) -> None:
    trial, reader = watched
    chance = random.Random(1)
    run = trial.start()
    for number, kind in enumerate(("actor", "S3 500/503", "S3 cut")):
        wait_for_parts(trial, run, 1 + 3 * number + chance.randrange(2))
        assert FAULTS[kind].strike(bench, trial, run, chance), f"{kind} found nothing to strike"
    assert run.process.wait(RUN_TIMEOUT_S) == 0, run.end_of_output()
    check(bench, trial, rows, reader)


def test_a_driver_stopped_then_killed_and_the_same_command_again_repeat_almost_nothing(
    bench: Workbench, rows: dict[str, str], watched: tuple[Trial, Reader]
) -> None:
    trial, reader = watched
    chance = random.Random(2)
    run = trial.start()
    wait_for_parts(trial, run, chance.randrange(2, UNITS // 2))
    assert FAULTS["SIGTERM"].strike(bench, trial, run, chance)
    assert run.process.wait(RUN_TIMEOUT_S) == 130, run.end_of_output()
    assert "the same command goes on where this one left off: ullme-ray embed " in run.end_of_output()
    assert "Traceback" not in run.end_of_output()
    left = wait_until_ended(run)
    assert left == [], "a stopped run leaves nothing behind"
    run = trial.start()
    wait_for_parts(trial, run, len(trial.parts_put()) + 1)
    assert FAULTS["driver"].strike(bench, trial, run, chance)
    run.process.wait(RUN_TIMEOUT_S)
    again = trial.start()
    assert again.process.wait(RUN_TIMEOUT_S) == 0, again.end_of_output()
    report = trial.report()
    assert report["units_embedded"] < report["units_total"]
    check(bench, trial, rows, reader)


def wait_until_ended(run: Run) -> list[psutil.Process]:
    """What of a run is still there after half a minute."""
    deadline = time.monotonic() + 30
    while (left := processes_of({run.process.pid})) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
