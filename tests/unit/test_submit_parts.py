"""Parts of `submit` that need no cluster: what travels, what an end means, an address where nobody answers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.deploy import submit
from ullme_ray.deploy.submit import Cluster, _Log, exit_code, packed, submit_job
from ullme_ray.errors import UllmeError
from ullme_ray.spec import load_job, parse_job

JOB = b"""
name: sent
storage: s3://bucket/x
model: {base: m/m, hub_token: env:HF_TOKEN}
embed: {input: {path: "corpus/*.jsonl"}}
serve: {api_keys: file:keys.txt}
"""


def test_what_travels_is_small_whole_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys.txt").write_text("canary-12ab")
    monkeypatch.setenv("HF_TOKEN", "canary-12ab")
    with packed(parse_job(JOB)) as folder:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        inside = load_job(Path(folder) / "job.yaml")
    assert not Path(folder).exists()
    assert [name for name, content in files.items() if b"canary-12ab" in content] == []
    assert sum(map(len, files.values())) < 2_000_000
    assert "ullme_ray/train/loop.py" in files
    assert "ullme_ray/starter.yaml" in files
    assert not [name for name in files if "__pycache__" in name]
    assert inside.cluster.address == "auto"
    assert inside.embed is not None
    assert inside.embed.input.path == f"{tmp_path}/corpus/*.jsonl"  # for there it starts in another folder


def ended(status: str, code: int | None = None) -> Any:
    state = SimpleNamespace(value=status, is_terminal=lambda: status not in ("RUNNING", "PENDING"))
    return SimpleNamespace(status=state, driver_exit_code=code, message="", submission_id="sent-1")


@pytest.mark.parametrize(
    ("details", "code"),
    [
        (ended("SUCCEEDED", 0), 0),
        (ended("FAILED", 1), 1),
        (ended("FAILED", 2), 2),
        (ended("STOPPED"), 130),
        (ended("FAILED", -9), None),
        (ended("FAILED", 137), None),
        (ended("FAILED", None), None),  # its node went
    ],
)
def test_what_an_end_means(details: Any, code: int | None) -> None:
    assert exit_code(details) == code


class Cut(Cluster):
    """A cluster whose answers are given; None where the way to it is cut."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def details(self, submission: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise UllmeError("cannot ask the cluster")
        return answer

    async def _tail(self, submission: str, log: Any) -> None:
        raise ConnectionError


def test_following_outlives_a_cut_way_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    assert Cut(ended("RUNNING"), None, None, ended("FAILED", -9)).follow("sent-1", print).driver_exit_code == -9
    monkeypatch.setattr(submit, "_OUTAGE_S", 0.05)
    with pytest.raises(UllmeError, match="cannot ask"):
        Cut(ended("RUNNING"), None).follow("sent-1", print)


class Played:
    """A cluster on which submissions end as given, one after the other."""

    address = "http://head"

    def __init__(self, *ends: Any, running: bool = False) -> None:
        self.ends, self.running, self.submitted = list(ends), running, 0

    def jobs(self, name: str) -> list[Any]:
        return [ended("RUNNING")] if self.running else []

    def submit(self, job: Any, stages: str | None) -> str:
        self.submitted += 1
        return f"sent-{self.submitted}"

    def follow(self, submission: str, write: Any) -> Any:
        write(f"log of {submission}\n")
        return self.ends.pop(0)


def play(cluster: Played, *, wait: bool = True, retries: int = 2) -> tuple[int, list[str], list[str]]:
    said: list[str] = []
    written: list[str] = []
    job = parse_job(JOB)
    code = submit_job(
        job,
        cluster,  # type: ignore[arg-type]
        stages=None,
        wait=wait,
        retries=retries,
        write=written.append,
        say=said.append,
        pause_s=0,
    )
    return code, said, written


def test_a_killed_driver_is_replaced_and_a_failed_one_is_not() -> None:
    cluster = Played(ended("FAILED", -9), ended("FAILED"), ended("SUCCEEDED", 0))
    code, said, written = play(cluster)
    assert (code, cluster.submitted) == (0, 3)
    assert written == ["log of sent-1\n", "log of sent-2\n", "log of sent-3\n"]
    assert said[1] == "sent-1 was killed; submitting it again, 1 tries left"
    failed = Played(ended("FAILED", 1))
    assert (play(failed)[0], failed.submitted) == (1, 1)
    killed = Played(ended("FAILED", -9), ended("FAILED", -9))
    assert (play(killed, retries=1)[0], killed.submitted) == (1, 2)


def test_one_that_runs_already_is_followed_and_without_waiting_nothing_is() -> None:
    running = Played(ended("SUCCEEDED", 0), running=True)
    code, said, _ = play(running)
    assert (code, running.submitted, said[0]) == (0, 0, "sent-1 is running already")
    assert play(Played(), wait=False) == (0, ["submitted sent-1 to http://head"], [])


def test_a_log_that_is_sent_again_from_its_beginning_is_written_once() -> None:
    written: list[str] = []
    log = _Log(written.append)
    for connection in (["one\n", "two\n"], ["one\ntwo\nth"], ["one\n", "two\nthree\n"], ["one\ntwo\nthree\n"]):
        log.begin()
        for text in connection:
            log.add(text)
    assert "".join(written) == "one\ntwo\nthree\n"


def test_an_address_where_nobody_answers_is_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(JOB)
    before = dict(os.environ)
    done = CliRunner().invoke(app, ["status", str(tmp_path / "job.yaml"), "--address", "127.0.0.1:9"])
    os.environ.clear()
    os.environ.update(before)
    assert done.exit_code == 1
    assert "cannot reach the cluster at http://127.0.0.1:9" in done.stderr
    assert "correct --address" in done.stderr
