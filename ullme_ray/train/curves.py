"""The curves of a run, from its records: metrics/curves.png and metrics/curves.html, drawn on the driver when training ends.

The page stands alone: no script, no request, dark or light as the reader's screen. One drawing serves both files: the page's
SVG takes its colours from CSS variables. Costs a few seconds, however long the run was.
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ullme_ray import storage
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.train.metrics import read_records

_SMOOTH_FROM = 40  # points; below it the raw line is clear enough
_WINDOW = 0.04  # of the run: width of the running mean drawn over the raw line

# name of a CSS variable -> (colour on white, colour on dark)
_COLOURS = {
    "page": ("#ffffff", "#14171c"),
    "ink": ("#1c2330", "#e8ebf0"),
    "soft": ("#6a7484", "#97a1b1"),
    "rule": ("#e3e7ed", "#2b313b"),
    "line1": ("#2563c9", "#7aa8ff"),
    "line2": ("#d1591d", "#ff9a62"),
    "line3": ("#16836f", "#4fd0b5"),
    "line4": ("#8a46b8", "#cf93f5"),
}
_LINES = [name for name in _COLOURS if name.startswith("line")]


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
    with matplotlib.rc_context({"font.size": 9.0}):
        figure = Figure(figsize=(5.6 * columns, 2.7 * rows + 0.5), dpi=140, facecolor=_COLOURS["page"][0])
        FigureCanvasAgg(figure)
        figure.suptitle(_headline(title, records), color=_COLOURS["ink"][0], fontsize=12, fontweight="bold", x=0.01, ha="left")
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
        for position, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, position + 1)
            _draw(axes, panel, records)
            axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_COLOURS["ink"][0])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", facecolor=figure.get_facecolor())
    return stream.getvalue()


def draw_html(records: Sequence[dict[str, Any]], job: JobSpec) -> str:
    """The same panels as one page, with a table of the values."""
    panels = panels_of(records)
    cards = [f"<figure><figcaption>{html.escape(p.title)}</figcaption>{_svg(p, records)}</figure>" for p in panels]
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in _COLOURS.items()) for i in (0, 1))
    return _PAGE.format(
        title=html.escape(job.name),
        headline=html.escape(_headline(job.name, records)),
        facts=html.escape(_facts(job, records)),
        light=light,
        dark=dark,
        cards="\n".join(cards),
        rows="\n".join(_table(panels, records)),
    )


def _svg(panel: Panel, records: Sequence[dict[str, Any]]) -> str:
    """One panel as inline SVG, its colours replaced by the page's variables."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9.0, "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.6, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        _draw(figure.add_subplot(), panel, records)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(panel.title)}"', 1)
    for name, (colour, _) in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _draw(axes: Any, panel: Panel, records: Sequence[dict[str, Any]]) -> None:
    """The lines of a panel: pale as measured, strong as a running mean."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

    ink, soft, rule = (_COLOURS[name][0] for name in ("ink", "soft", "rule"))
    for position, (label, name) in enumerate(panel.lines):
        points = points_of(records, name)
        if not points:
            continue
        steps, values = zip(*points)
        colour = _COLOURS[_LINES[position % len(_LINES)]][0]
        if panel.dots or len(points) == 1:
            axes.plot(steps, values, color=colour, lw=1.6, marker="o", ms=4, label=label)
        elif len(points) < _SMOOTH_FROM or name == "learning_rate":
            axes.plot(steps, values, color=colour, lw=1.6, label=label)
        else:
            axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
            axes.plot(steps, running_mean(values, max(3, round(_WINDOW * len(values)))), color=colour, lw=1.8, label=label)
    if panel.log:
        axes.set_yscale("log")
    elif panel.form.endswith("%}"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.form == "{:,.0f}":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    elif panel.form.endswith("e}"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    if panel.from_zero:
        axes.set_ylim(bottom=0.0)
    first, last = records[0]["step"], records[-1]["step"]  # the same in every panel, so that they can be compared
    axes.set_xlim(first - 0.01 * (last - first) - 0.5, last + 0.01 * (last - first) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=soft)
    axes.set_facecolor("none")
    axes.grid(axis="y", color=rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=soft, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(rule)
    if len(panel.lines) > 1:
        axes.legend(
            frameon=False,
            labelcolor=ink,
            ncols=len(panel.lines),
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderpad=0.2,
            handlelength=1.2,
            columnspacing=1.2,
        )


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to `window` values around each one; fewer at the ends, so that nothing is shifted."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def _table(panels: Sequence[Panel], records: Sequence[dict[str, Any]]) -> Iterable[str]:
    for panel in panels:
        for label, name in panel.lines:
            values = [value for _, value in points_of(records, name)]
            if values:
                cells = [
                    panel.form.format(v) for v in (values[0], values[-1], min(values), statistics.median(values), max(values))
                ]
                yield f"<tr><th>{html.escape(label)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _headline(title: str, records: Sequence[dict[str, Any]]) -> str:
    loss = points_of(records, "loss")
    return f"{title}: {records[-1]['step']:,} steps" + (f", loss {loss[0][1]:.3f} to {loss[-1][1]:.3f}" if loss else "")


def _facts(job: JobSpec, records: Sequence[dict[str, Any]]) -> str:
    train = job.train
    assert train is not None
    memory = [value for _, value in points_of(records, "memory_bytes")]
    facts = [
        f"{job.model.base}, objective {train.objective.preset}",
        f"{train.global_batch_size} queries a step on {train.workers.num_workers} ranks",
        *([f"at most {max(memory) / 2**30:.1f} GiB on rank 0"] if memory else []),
    ]
    return "; ".join(facts)


def _readable(name: str) -> str:
    return name.removeprefix("validation_").replace("ndcg", "nDCG").replace("_", " ")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem); max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0; }}
p {{ margin: .2rem 0 1.6rem; color: var(--soft); }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.4rem 2rem; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-family: inherit !important; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-top: 1.8rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: right; font-weight: 400; }}
th:first-child {{ text-align: left; }}
thead th {{ color: var(--soft); }}
</style>
</head>
<body>
<h1>{headline}</h1>
<p>{facts}</p>
<main>
{cards}
</main>
<div class="scroll"><table>
<thead><tr><th></th><th>first</th><th>last</th><th>least</th><th>median</th><th>most</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</body>
</html>
"""
