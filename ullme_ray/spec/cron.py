"""Cron schedules: five fields or @daily and its like, checked and computed. Costs no import beyond the standard library.

A step such as `*/15`, ranges, lists and the names of months and weekdays are known; seconds, `L`, `#` and `?` are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

_SHORT = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MONTHS = dict(jan=1, feb=2, mar=3, apr=4, may=5, jun=6, jul=7, aug=8, sep=9, oct=10, nov=11, dec=12)  # noqa: C408
_DAYS = dict(sun=0, mon=1, tue=2, wed=3, thu=4, fri=5, sat=6)  # noqa: C408
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),  # Kubernetes has no 7 for Sunday
)


@dataclass(frozen=True)
class Cron:
    """The minutes at which something is due. As in cron, a restricted day of month OR a restricted day of week is enough."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 is Sunday
    any_day: bool
    any_weekday: bool

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Raises ValueError: what it should be, and what it is not."""
        fields = _SHORT.get(text.strip(), text).split()
        if len(fields) != len(_FIELDS):
            raise ValueError(f"5 fields (minute hour day-of-month month day-of-week) or @daily, not {len(fields)}")
        sets = [_values(field, *kind) for field, kind in zip(fields, _FIELDS, strict=True)]
        return cls(sets[0], sets[1], sets[2], sets[3], sets[4], fields[2].startswith("*"), fields[4].startswith("*"))

    def _is_due_on(self, day: datetime) -> bool:
        in_month, in_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        either = in_month and in_week if self.any_day or self.any_weekday else in_month or in_week
        return day.month in self.months and either

    def between(self, start: datetime, end: datetime, zone: str) -> Iterator[datetime]:
        """The due minutes after `start` and not after `end` (both aware), in the zone's wall clock, oldest first."""
        local = start.astimezone(ZoneInfo(zone))
        day = local.replace(hour=0, minute=0, second=0, microsecond=0)
        while day <= end:
            if self._is_due_on(day):
                for hour in sorted(self.hours):
                    for minute in sorted(self.minutes):
                        due = day.replace(hour=hour, minute=minute)
                        if start < due <= end:
                            yield due
            day = (day.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=ZoneInfo(zone))


def _values(field: str, name: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for item in field.lower().split(","):
        span, slash, step_text = item.partition("/")
        first, dash, last = span.partition("-")
        try:
            step = int(step_text) if slash else 1
            if span == "*":
                begin, end = low, high
            else:
                begin = names[first] if first in names else int(first)
                end = (names[last] if last in names else int(last)) if dash else (high if slash else begin)
        except ValueError:
            raise ValueError(f"a {name} as number, range, list or step, not {item!r}") from None
        if not (low <= begin <= end <= high and step >= 1):
            raise ValueError(f"a {name} from {low} to {high}, not {item!r}")
        found.update(range(begin, end + 1, step))
    return frozenset(found)
