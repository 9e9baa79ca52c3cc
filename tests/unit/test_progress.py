"""Progress: plain lines without a terminal, a bar on one, and honest rates."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from ullme_ray import progress
from ullme_ray.progress import Progress, duration


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_plain_lines_come_every_few_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("embed", 100, unit="rows") as bar:
        for done in range(0, 101, 10):
            bar.update(done, loss=0.123456)
            clock.now += 1
    out, err = capsys.readouterr()
    assert out == ""  # stdout is for results
    assert err.splitlines() == [
        "embed: 0/100 rows (0 %), loss 0.1235",
        "embed: 50/100 rows (50 %), 10 rows/s, 5 s left, loss 0.1235",
        "embed: 100/100 rows (100 %), 10 rows/s, loss 0.1235",
    ]


def test_work_done_before_a_resume_does_not_count_as_fast(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 1000, unit="steps") as bar:
        bar.update(900)
        clock.now += 10
        bar.update(910)
    assert capsys.readouterr().err.splitlines()[-1] == "train: 910/1,000 steps (91 %), 1 steps/s, 1 min 30 s left"


def test_rate_follows_the_last_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", 10_000) as bar:
        bar.update(0)
        for done in range(1, 200):  # slow for 200 s, then 10 times as fast for 100 s
            clock.now += 1
            bar.update(done)
        for done in range(200, 1200, 10):
            clock.now += 1
            bar.update(done)
    assert ", 10 rows/s," in capsys.readouterr().err.splitlines()[-1]


def test_last_state_is_shown_when_work_breaks_off(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with Progress("x", 10) as bar:
            bar.update(1)
            clock.now += 0.1
            bar.update(2)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert capsys.readouterr().err.splitlines()[-1].startswith("x: 2/10 rows")


def test_nothing_to_do_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", 0) as bar:
        bar.update(0)
    assert "0/0 rows" in capsys.readouterr().err


def test_note_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 10) as bar:
        bar.note("resumes after step [5]")
    assert capsys.readouterr().err == "train: resumes after step [5]\n"


def test_bar_on_a_terminal() -> None:
    """A real pseudo-terminal: the bar is drawn, markup in figures does no harm, stdout stays empty."""
    code = """
from ullme_ray.progress import Progress
with Progress("train", 4, unit="steps") as bar:
    bar.note("global 32 = 2 ranks x 16 queries")
    for step in range(5):
        bar.update(step, loss=1.5, state="[bold]")
"""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    written = io.BytesIO()
    try:
        while chunk := os.read(leader, 65536):
            written.write(chunk)
    except OSError:  # Linux ends a closed pseudo-terminal with EIO
        pass
    finally:
        os.close(leader)
    assert process.stdout is not None
    assert process.stdout.read() == b""
    assert process.wait() == 0
    text = written.getvalue().decode()
    assert "train: global 32 = 2 ranks x 16 queries" in text
    assert "4/4 steps (100 %)" in text
    assert "loss 1.5" in text
    assert "[bold]" in text
    assert "━" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
