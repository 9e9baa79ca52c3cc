"""The drawings of a report beside the training curves: numbers in, a picture with a name and a title out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ullme_ray.report.inputs import Measured
from ullme_ray.report.style import HEIGHT, WIDTH, Drawing, colour, legend, line_colour, plain, to_png, to_svg

_BINS = 40


@dataclass(frozen=True)
class Picture:
    """One figure of the page, and a PNG of that name beside it."""

    name: str  # also the id of its figure in the page
    title: str
    draw: Drawing
    note: str = ""
    height: float = HEIGHT  # inches

    def svg(self) -> str:
        return to_svg(self.draw, self.title, size=(WIDTH, self.height))

    def png(self) -> bytes:
        return to_png(self.draw, self.title, size=(WIDTH, self.height))


def histogram(name: str, title: str, values: Mapping[str, np.ndarray], *, unit: str, note: str = "") -> Picture:
    """Shares of values (label -> 1-D array), all over the same bins."""
    everything = np.concatenate(list(values.values()))
    low, high = float(everything.min()), float(everything.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)

    def draw(axes: Any) -> None:
        for position, (label, numbers) in enumerate(values.items()):
            weights = np.full(len(numbers), 1.0 / len(numbers))
            shown = line_colour(position)
            axes.hist(numbers, edges, weights=weights, color=shown, alpha=0.35, label=label)
            axes.hist(numbers, edges, weights=weights, color=shown, histtype="step", lw=1.2)
        axes.yaxis.set_major_formatter(_percent())
        axes.set_xlabel(unit, color=colour("soft"))
        plain(axes)
        if len(values) > 1:
            legend(axes, len(values))

    return Picture(name, title, draw, note)


def measures(name: str, title: str, rows: Sequence[Measured], measure: str) -> Picture:
    """One point per model with its interval."""

    def draw(axes: Any) -> None:
        places = list(range(len(rows)))[::-1]
        for place, row, position in zip(places, rows, range(len(rows))):
            value, bounds = row.measures[measure], row.intervals.get(measure)
            if bounds is not None:
                axes.plot(bounds, (place, place), color=line_colour(position), lw=2.2, alpha=0.5, solid_capstyle="round")
            axes.plot([value], [place], marker="o", ms=6, color=line_colour(position))
            axes.annotate(
                f"{value:.3f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center", color=colour("ink")
            )
        axes.set_yticks(places, [row.model for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.2)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(measure, color=colour("soft"))
        plain(axes, grid="x")
        axes.tick_params(axis="y", colors=colour("ink"))

    return Picture(name, title, draw, height=max(1.4, 0.6 + 0.45 * len(rows)))


def shares(name: str, title: str, parts: Mapping[str, int]) -> Picture:
    """One bar, cut by what became of the rows."""
    shown = {label: count for label, count in parts.items() if count}

    def draw(axes: Any) -> None:
        start = 0
        for position, (label, count) in enumerate(shown.items()):
            axes.barh([0], [count], left=start, height=0.5, color=line_colour(position), label=f"{label} {count:,}")
            start += count
        axes.set_yticks([])
        axes.set_xlim(0, start)
        axes.set_xlabel("rows", color=colour("soft"))
        plain(axes, grid="x")
        legend(axes, len(shown))

    return Picture(name, title, draw, height=1.2)


def scatter(name: str, title: str, points: np.ndarray, groups: Sequence[int], labels: Sequence[str], note: str) -> Picture:
    """The map (N, 2) as a PNG has it; the page draws its own, with hover text."""

    def draw(axes: Any) -> None:
        for group, label in enumerate(labels or ("",)):
            rows = np.array(groups) == group
            shown = f" {label}"  # a label that is empty or begins with _ would be left out of the legend
            axes.scatter(points[rows, 0], points[rows, 1], s=5, color=line_colour(group), alpha=0.7, linewidths=0, label=shown)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal")
        plain(axes)
        if labels:
            legend(axes, 4)

    return Picture(name, title, draw, note, height=4.6)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
