"""The verdict of the fault matrix: a kind that was skipped, or never hit a running job, is no proof of anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FAULTS = Path(__file__).parents[1] / "faults"
CLEAN = {"tried": 2, "hit": 2, "lost": 0, "duplicated": 0, "unreadable": 0, "torn": 0, "polls": 9, "again": 0, "beyond": 0}
CLEAN |= {"runs": 1, "trials": 1, "seconds": 1.0, "notes": []}


def verdict(folder: Path, **changed: object) -> tuple[int, str]:
    """Of an actor killed twice without harm, and of the disk filled as the results of `changed` tell."""
    trials = [{"kind": "actor", "at": False, **CLEAN}]
    trials += [{"kind": "disk full", "at": False, **CLEAN, **changed}] if changed else []
    results = folder / "results.jsonl"
    results.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    command = [sys.executable, str(FAULTS / "matrix.py"), "--table", "--kinds", "actor,disk full", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "| actor | 2 | 2 |" in done.stdout, done.stderr
    return done.returncode, done.stdout


def test_a_kind_that_hit_nothing_is_named_and_fails_the_matrix(tmp_path: Path) -> None:
    for nothing in ({}, {"hit": 0}):
        code, told = verdict(tmp_path, **nothing)
        assert code == 1
        assert "- disk full: no running job was hit" in told
        assert "Nothing lost" not in told
    code, told = verdict(tmp_path, hit=1)
    assert code == 0
    assert "Nothing lost" in told
    assert verdict(tmp_path, lost=1)[0] == 1
