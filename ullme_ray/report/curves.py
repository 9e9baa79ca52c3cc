"""The curves of a training run, from its records: metrics/curves.png and metrics/curves.html, drawn when training ends.

The page stands alone: no script, no request, dark or light as the reader's screen. The whole report draws the same panels.
Costs a few seconds, however long the run was.
"""

from __future__ import annotations

import html
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ullme_ray import storage
from ullme_ray.report.style import RC, colour, legend, line_colour, page, plain, to_svg
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

_SMOOTH_FROM = 40  # points; below it the raw line is clear enough
_WINDOW = 0.04  # of the run: width of the running mean drawn over the raw line


def step_of(line: str) -> float:
    """The step a line of train.jsonl is about; for a line that a crash cut off, after all steps, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def read_records(folder: str) -> list[dict[str, Any]]:
    """The records of a metrics folder in the order of their steps; lines that a crash cut off are left out."""
    path = storage.join(folder, "train.jsonl")
    lines = storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


@dataclass(frozen=True)
class Panel:
    """One picture: a title and the (label, measure) lines in it."""

    title: str
    lines: tuple[tuple[str, str], ...]
    form: str = "{:.4f}"  # of a value in the table
    log: bool = False
    from_zero: bool = False
    dots: bool = False  # few points, far apart


def panels_of(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """The pictures that these records have numbers for."""
    names = dict.fromkeys(name for record in records for name in record)
    parts = tuple((name.removesuffix("_loss"), name) for name in names if name.endswith("_loss"))
    parts = tuple((label, name) for label, name in parts if any(value for _, value in points_of(records, name)))
    validation = tuple((_readable(name), name) for name in names if name.startswith("validation_"))
    norms = [value for _, value in points_of(records, "grad_norm")]
    wide = bool(norms) and min(norms) > 0 and max(norms) > 30 * min(norms)
    wanted = [
        Panel("loss", (("loss", "loss"),)),
        Panel("terms of the loss", parts),
        Panel("validation " + ", ".join(label for label, _ in validation), validation, dots=True),
        Panel("gradient norm", (("gradient norm", "grad_norm"),), log=wide),
        Panel("learning rate", (("learning rate", "learning_rate"),), form="{:.2e}"),
        Panel("tokens per second", (("tokens per second", "tokens_per_s"),), form="{:,.0f}", from_zero=True),
        Panel("model FLOP utilisation (MFU)", (("MFU", "mfu"),), form="{:.1%}", from_zero=True),
    ]
    return [panel for panel in wanted if any(points_of(records, name) for _, name in panel.lines)]


def points_of(records: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) where the records have a finite number of that name."""
    found = [(int(r["step"]), r[name]) for r in records if isinstance(r.get(name), int | float)]
    return [(step, float(value)) for step, value in found if math.isfinite(value)]


def write_curves(job: JobSpec) -> None:
    """Draws the records of a run into its metrics folder; nothing where there are none.

    Raises:
        StorageError: the folder cannot be read or written.
    """
    folder = RunFolder.of(job).metrics
    records = read_records(folder)
    if not panels_of(records):
        return
    storage.write_bytes(storage.join(folder, "curves.png"), draw_png(records, title=job.name))
    storage.write_text(storage.join(folder, "curves.html"), draw_html(records, job))


def draw_png(records: Sequence[dict[str, Any]], *, title: str) -> bytes:
    """All panels on one sheet."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(records)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(5.6 * columns, 2.7 * rows + 0.5), dpi=140, facecolor=colour("page"))
        FigureCanvasAgg(figure)
        figure.suptitle(headline(title, records), color=colour("ink"), fontsize=12, fontweight="bold", x=0.01, ha="left")
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
        for position, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, position + 1)
            draw_panel(axes, panel, records)
            axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=colour("ink"))
        stream = io.BytesIO()
        figure.savefig(stream, format="png", facecolor=figure.get_facecolor())
    return stream.getvalue()


def draw_html(records: Sequence[dict[str, Any]], job: JobSpec) -> str:
    """The same panels as one page, with a table of the values."""
    panels = panels_of(records)
    cards = [f"<figure><figcaption>{html.escape(p.title)}</figcaption>{panel_svg(p, records)}</figure>" for p in panels]
    body = [
        f"<h1>{html.escape(headline(job.name, records))}</h1>",
        f"<p>{html.escape(facts(job, records))}</p>",
        '<main class="grid">',
        *cards,
        "</main>",
        values_table(panels, records),
    ]
    return page(job.name, "\n".join(body))


def panel_svg(panel: Panel, records: Sequence[dict[str, Any]]) -> str:
    """One panel for a page."""
    return to_svg(lambda axes: draw_panel(axes, panel, records), panel.title)


def draw_panel(axes: Any, panel: Panel, records: Sequence[dict[str, Any]]) -> None:
    """The lines of a panel: pale as measured, strong as a running mean."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    for position, (label, name) in enumerate(panel.lines):
        points = points_of(records, name)
        if not points:
            continue
        steps, values = zip(*points)
        shown = line_colour(position)
        if panel.dots or len(points) == 1:
            axes.plot(steps, values, color=shown, lw=1.6, marker="o", ms=4, label=label)
        elif len(points) < _SMOOTH_FROM or name == "learning_rate":
            axes.plot(steps, values, color=shown, lw=1.6, label=label)
        else:
            axes.plot(steps, values, color=shown, lw=0.8, alpha=0.3)
            axes.plot(steps, running_mean(values, max(3, round(_WINDOW * len(values)))), color=shown, lw=1.8, label=label)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # its own would be set as maths
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.form.endswith("%}"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.form == "{:,.0f}":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    elif panel.form.endswith("e}"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    if panel.from_zero:
        axes.set_ylim(0.0, 1.08 * axes.dataLim.ymax or 1.0)
    first, last = records[0]["step"], records[-1]["step"]  # the same in every panel, so that they can be compared
    axes.set_xlim(first - 0.01 * (last - first) - 0.5, last + 0.01 * (last - first) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=colour("soft"))
    plain(axes)
    if len(panel.lines) > 1:
        legend(axes, len(panel.lines))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to `window` values around each one; fewer at the ends, so that nothing is shifted."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def values_table(panels: Sequence[Panel], records: Sequence[dict[str, Any]]) -> str:
    """The values of every line as an HTML table."""
    rows = "\n".join(_rows(panels, records))
    head = "".join(f"<th>{name}</th>" for name in ("", "first", "last", "least", "median", "most"))
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _rows(panels: Sequence[Panel], records: Sequence[dict[str, Any]]) -> Iterable[str]:
    for panel in panels:
        for label, name in panel.lines:
            values = [value for _, value in points_of(records, name)]
            if values:
                cells = [
                    panel.form.format(v) for v in (values[0], values[-1], min(values), statistics.median(values), max(values))
                ]
                yield f"<tr><th>{html.escape(label)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def headline(title: str, records: Sequence[dict[str, Any]]) -> str:
    loss = points_of(records, "loss")
    return f"{title}: {records[-1]['step']:,} steps" + (f", loss {loss[0][1]:.3f} to {loss[-1][1]:.3f}" if loss else "")


def facts(job: JobSpec, records: Sequence[dict[str, Any]]) -> str:
    train = job.train
    assert train is not None
    memory = [value for _, value in points_of(records, "memory_bytes")]
    known = [
        f"{job.model.base}, objective {train.objective.preset}",
        f"{train.global_batch_size} queries a step on {train.workers.num_workers} ranks",
        *([f"at most {max(memory) / 2**30:.1f} GiB on rank 0"] if memory else []),
    ]
    return "; ".join(known)


def _readable(name: str) -> str:
    return name.removeprefix("validation_").replace("ndcg", "nDCG").replace("_", " ")
