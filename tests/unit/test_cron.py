"""Cron schedules: what is due when, also over changes of the clock, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ullme_ray.spec import parse_job
from ullme_ray.spec.cron import Cron


def due(cron: str, start: str, end: str, zone: str = "UTC") -> list[str]:
    begin, stop = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (start, end))
    return [at.strftime("%m-%d %H:%M") for at in Cron.parse(cron).between(begin, stop, zone)]


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 3 * * *", ["11-27 03:00", "11-28 03:00"]),
        ("@daily", ["11-27 00:00", "11-28 00:00"]),
        ("*/30 12 27 11 *", ["11-27 12:00", "11-27 12:30"]),
        ("15 6 * * fri", ["11-27 06:15"]),
        ("0 9 1,27 * *", ["11-27 09:00"]),
        ("0 9 1 * sat", ["11-28 09:00"]),  # a day of the month or a day of the week
        ("0 9 * * 0", []),
        ("5-10/5 0 * nov *", ["11-27 00:05", "11-27 00:10", "11-28 00:05", "11-28 00:10"]),
    ],
)
def test_what_is_due(cron: str, expected: list[str]) -> None:
    assert due(cron, "2026-11-26T23:59", "2026-11-28T10:00") == expected


def test_the_start_is_left_out_and_the_end_is_not() -> None:
    assert due("0 3 * * *", "2026-11-27T03:00", "2026-11-28T03:00") == ["11-28 03:00"]


def test_the_wall_clock_of_the_zone_counts() -> None:
    # Berlin is UTC+1 in winter and UTC+2 from 29 March 2026 on
    assert due("30 3 * * *", "2026-03-28T02:00", "2026-03-30T01:29", "Europe/Berlin") == ["03-28 03:30", "03-29 03:30"]
    assert due("30 3 * * *", "2026-03-28T02:00", "2026-03-30T01:30", "Europe/Berlin")[-1] == "03-30 03:30"


@pytest.mark.parametrize(
    "cron",
    [
        "",
        "0 3 * *",
        "0 3 * * * *",
        "60 3 * * *",
        "0 24 * * *",
        "0 3 0 * *",
        "0 3 * 13 *",
        "x 3 * * *",
        "0 5-3 * * *",
        "*/0 3 * * *",
        "0 9 * * 7",  # Sunday to cron, refused by Kubernetes
    ],
)
def test_what_is_no_schedule_is_refused(cron: str) -> None:
    with pytest.raises(ValueError, match="not"):
        Cron.parse(cron)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{cron: 0 3 * *}", "schedule.cron = '0 3 \\* \\*' should be 5 fields"),
        ('{cron: "@daily", timezone: Mars/Olympus}', "schedule.timezone = 'Mars/Olympus' should be a time zone"),
        ('{cron: "@daily", stages: [train]}', "schedule.stages has train, for which the job has no section"),
        ('{cron: "@daily", webhook: "https://hooks.example/x"}', "schedule.webhook is a secret and must be a reference"),
    ],
)
def test_a_schedule_in_a_job_file(line: str, match: str) -> None:
    job = f"name: a\nmodel: {{base: m/m}}\nembed: {{input: {{path: c.jsonl}}}}\nschedule: {line}\n"
    with pytest.raises(Exception, match=match):
        parse_job(job.encode())
