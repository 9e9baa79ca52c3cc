"""Two drivers on one training run: the second is refused while the first lives, and takes over once it is dead or silent."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ullme_ray.errors import TrainingError
from ullme_ray.spec import JobSpec, parse_job
from ullme_ray.train.lock import Holder, RunLock

HOLD = """
import sys, time
from ullme_ray.spec import parse_job
from ullme_ray.train.lock import RunLock
with RunLock(parse_job(sys.stdin.buffer.read()), print, beat_s=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return parse_job(text(tmp_path))


def text(folder: Path) -> bytes:
    return f"name: a\nstorage: {folder}\nmodel: {{base: m/m}}\ntrain: {{data: [{{path: x.jsonl}}]}}\n".encode()


def lock(job: JobSpec, notes: list[str] | None = None) -> RunLock:
    return RunLock(job, (notes if notes is not None else []).append, silent_s=1.5, beat_s=0.1)


def test_a_living_driver_keeps_another_out_and_a_killed_one_does_not(job: JobSpec, tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(text(tmp_path))
    first.stdin.close()
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(TrainingError, match=f"process {first.pid}.*wait for its end"), lock(job):
            pass
    finally:
        first.kill()
        first.wait()
    notes: list[str] = []
    with lock(job, notes):
        pass
    assert notes == []  # it was seen to be dead, and nothing was waited for
    assert not (tmp_path / "a" / "train.lock").exists()


def test_a_silent_driver_elsewhere_loses_the_lock(job: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    elsewhere = Holder("other", "node-7", "another machine", 1, "1")
    (tmp_path / "a" / "train.lock").write_text(json.dumps(elsewhere.__dict__))
    notes: list[str] = []
    with lock(job, notes):
        assert "node-7" in notes[0]
        held = json.loads((tmp_path / "a" / "train.lock").read_text())
        assert held["id"] != "other"


def test_one_whose_lock_was_taken_says_so_and_leaves_it(job: JobSpec, tmp_path: Path) -> None:
    notes: list[str] = []
    file = tmp_path / "a" / "train.lock"
    with lock(job, notes):
        file.write_text(json.dumps(Holder("other", "node-7", "another machine", 1, "1").__dict__))
        deadline = time.monotonic() + 20
        while not notes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "took" in notes[0]
    assert json.loads(file.read_text())["id"] == "other"


def test_a_damaged_lock_is_told(job: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.lock").write_text("{")
    with pytest.raises(TrainingError, match="is damaged"), lock(job):
        pass
