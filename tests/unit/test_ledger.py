"""The ledger: every run is in it however it ends, earlier runs are told of, and a failure reaches the webhook."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ullme_ray.errors import DataError
from ullme_ray.ledger import Run, describe_runs, record, recorded, runs
from ullme_ray.spec import JobSpec, parse_job

JOB = """
name: nights
storage: {storage}
model: {{base: m/m}}
embed: {{input: {{path: c.jsonl}}, price_per_hour: 36000}}
schedule: {{cron: "0 3 * * *", webhook: env:TEST_WEBHOOK}}
"""


@dataclass
class Report:
    rows: int
    rows_embedded: int
    rows_copied: int
    rows_reused: int
    rows_dead: int
    tokens: int
    examples: tuple[str, ...] = ("left out",)


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return parse_job(JOB.format(storage=tmp_path).encode())


def put(job: JobSpec, folder: Path, **values: Any) -> None:
    now = datetime.now(UTC).isoformat()
    run = {"id": "20260101T000000-abc", "stages": ["embed"], "started": now, "host": "node-7", "seen": now} | values
    (folder / "nights" / "ledger").mkdir(parents=True, exist_ok=True)
    (folder / "nights" / "ledger" / f"{run['id']}.json").write_text(json.dumps(run))


def test_a_run_is_kept_with_rows_tokens_and_cost(job: JobSpec) -> None:
    with recorded(job, ("embed",)) as run:
        assert [one.exit_code for one in runs(job)] == [None]  # seen while it goes on
        record("embed", Report(1000, 900, 50, 45, 5, 123_456))
        assert run.notes == []
    (kept,) = runs(job)
    assert kept.exit_code == 0
    assert kept.results["embed"]["tokens"] == 123_456
    assert "examples" not in kept.results["embed"]
    assert kept.cost is not None
    assert kept.cost > 0
    shown = describe_runs([kept])
    assert "1,000" in shown
    assert "900 embedded, 50 copied, 45 reused, 5 dead" in shown


@pytest.mark.parametrize(("error", "code"), [(DataError("no rows"), 1), (KeyboardInterrupt(), 130), (ValueError("bug"), 1)])
def test_a_run_that_breaks_off_is_kept_with_its_code(
    error: BaseException, code: int, job: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_WEBHOOK", raising=False)  # that it cannot be told is no reason for another error
    with pytest.raises(type(error)), recorded(job, ("embed",)):
        raise error
    (kept,) = runs(job)
    assert kept.exit_code == code
    assert kept.error is not None
    assert kept.error.startswith(type(error).__name__)


def test_overlapping_dead_and_missed_runs_are_told(job: JobSpec, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    put(job, tmp_path, id="1", exit_code=0, started=(now - timedelta(days=4)).isoformat())
    put(job, tmp_path, id="2", host="node-8")
    put(job, tmp_path, id="3", started=(now - timedelta(days=3)).isoformat(), seen=(now - timedelta(days=3)).isoformat())
    with recorded(job, ("embed",)) as run:
        pass
    running, died, missed = run.notes
    assert "run 2 on node-8 is still at work" in running
    assert "3 on node-7, ended without a word" in died
    assert missed.startswith("2 scheduled runs were missed since")
    states = [line.split()[-4 if "," in line else -1] for line in describe_runs(runs(job)).splitlines()]
    assert len(states) == 5


def test_a_run_of_other_stages_neither_makes_up_for_a_night_nor_says_so(job: JobSpec, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    put(job, tmp_path, id="1", exit_code=0, started=(now - timedelta(days=4)).isoformat())
    put(job, tmp_path, id="2", exit_code=0, stages=["evaluate"], started=now.isoformat())
    with recorded(job, ("evaluate",)) as run:
        assert run.notes == []
    with recorded(job, ("embed",)) as run:
        (missed,) = run.notes
    assert "3 scheduled runs were missed" in missed


def test_states() -> None:
    now = datetime.now(UTC)
    old = (now - timedelta(hours=1)).isoformat()
    assert Run("1", (), old, "h", old).state(now) == "died"
    assert Run("1", (), old, "h", now.isoformat()).state(now) == "running"
    assert Run("1", (), old, "h", old, exit_code=2).state(now) == "failed"
    assert Run("1", (), old, "h", old, exit_code=130).state(now) == "stopped"


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    job = parse_job(JOB.format(storage=tmp_path / "file").encode())
    with recorded(job, ("embed",)):
        ran = True
    assert ran
    assert "the ledger of this run cannot be written" in caplog.text


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook?key=canary-77", got
    server.shutdown()
    server.server_close()


def test_a_failure_is_posted_and_a_success_is_not(
    job: JobSpec, hook: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, got = hook
    monkeypatch.setenv("TEST_WEBHOOK", url)
    with recorded(job, ("embed",)):
        pass
    assert got == []
    with pytest.raises(DataError), recorded(job, ("embed",)) as run:
        raise DataError("no rows")
    (told,) = got
    assert (told["job"], told["run"], told["exit_code"], told["error"]) == ("nights", run.id, 1, "DataError: no rows")
    assert not [path for path in tmp_path.rglob("*.json") if "canary-77" in path.read_text()]


@pytest.mark.parametrize("url", ["http://169.254.169.254/canary-77", "file:///canary-77", "http://127.0.0.1:1/canary-77"])
def test_a_webhook_that_cannot_be_told_is_told_without_its_url(
    url: str, job: JobSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEST_WEBHOOK", url)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError), recorded(job, ("embed",)):
        raise DataError("no rows")
    assert "schedule.webhook could not be told" in caplog.text
    assert "canary-77" not in caplog.text


def test_json_logs_carry_job_run_and_what_a_line_adds(tmp_path: Path) -> None:
    program = """
import sys, logging
from ullme_ray.spec import parse_job
from ullme_ray.ledger import recorded
from ullme_ray.progress import Progress
with recorded(parse_job(sys.stdin.buffer.read()), ("embed",)):
    logging.getLogger("ullme_ray.embed.pipeline").info("unit done", extra={"unit": "part-1"})
    with Progress("embed", 10) as bar:
        bar.update(10)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=JOB.format(storage=tmp_path).encode(),
        capture_output=True,
        check=True,
        env={**os.environ, "ULLME_LOG_FORMAT": "json"},
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["job"] for line in lines} == {"nights"}
    assert len({line["run"] for line in lines}) == 1
    assert [line["unit"] for line in lines if line["message"] == "unit done"] == ["part-1"]
    assert any(line["message"].startswith("embed: 10/10") and line["stage"] == "embed" for line in lines)
    assert [line.get("exit_code") for line in lines if line["message"] == "run ends"] == [0]
