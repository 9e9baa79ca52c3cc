"""Progress of long work, on stderr: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from ullme_ray import logs

SECONDS_BETWEEN_LINES = 5.0
_RATE_WINDOW_S = 60.0


class Progress:
    """A context manager around one piece of work of known size.

    Args:
        title: what is being done, such as `train`.
        total: how many units make the whole.
        unit: what is counted, in the plural.
    """

    def __init__(self, title: str, total: int, unit: str = "rows") -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._meter = _Meter(total)
        self._bar: _Bar | None = None
        self._next_line_at = 0.0
        self._last_line = ""
        self._line = ""

    def __enter__(self) -> Progress:
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = _Bar(
                TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), console=console
            )
            self._task = self._bar.add_task(escape(self.title), total=self.total, status="")
            self._bar.start()
        return self

    def update(self, done: int, **figures: float | int | str) -> None:
        """Says how much is done in all (the first call may start above 0, after a resume), with figures to show beside it."""
        self._meter.add(done)
        status = self._meter.status(self.unit)
        beside = ", ".join(f"{name} {_number(value)}" for name, value in figures.items())
        self._line = f"{self.title}: {status}" + (f", {beside}" if beside else "")
        if self._bar is not None:
            self._bar.figures = beside
            self._bar.update(self._task, completed=done, status=escape(status))
            return
        now = time.monotonic()
        if now >= self._next_line_at or done >= self.total:
            self._next_line_at = now + SECONDS_BETWEEN_LINES
            self._print_line()

    def note(self, text: str) -> None:
        """Prints a line beside the bar without disturbing it."""
        if self._bar is not None:
            self._bar.console.print(f"{self.title}: {text}", markup=False, highlight=False)
        else:
            self._say(f"{self.title}: {text}")

    def _print_line(self) -> None:
        if self._line != self._last_line:
            self._last_line = self._line
            self._say(self._line)

    def _say(self, line: str) -> None:
        if logs.is_json():
            logs.LOGGER.info(line, extra={"stage": self.title})
        else:
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print_line()  # where it stopped, also when it broke off between two lines


class _Bar(RichProgress):
    """The bar, and below it a line with the figures, for both do not fit into one line of a terminal."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures, style="dim")


class _Meter:
    """Rate over the last minute, and what follows from it. Work done before the first call does not count as fast."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, done: int) -> None:
        now = time.monotonic()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > _RATE_WINDOW_S:
            self._samples.popleft()

    @property
    def per_s(self) -> float | None:
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def status(self, unit: str) -> str:
        done = self._samples[-1][1]
        share = f" ({100 * done // self.total} %)" if self.total else ""
        parts = [f"{done:,}/{self.total:,} {unit}{share}"]
        if (rate := self.per_s) is not None:
            parts.append(f"{_number(rate)} {unit}/s")
            if done < self.total:
                parts.append(f"{duration((self.total - done) / rate)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
