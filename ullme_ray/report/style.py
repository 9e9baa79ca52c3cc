"""How pictures and pages of a run look: one set of colours for light and dark, SVG that stands in a page, PNG beside it.

A drawing is a function on matplotlib axes that uses the light colours. In a page they become CSS variables, so that one SVG
serves both a light and a dark screen. Nothing here asks for anything over the network.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

# name of a CSS variable -> (colour on white, colour on dark)
COLOURS = {
    "page": ("#ffffff", "#14171c"),
    "ink": ("#1c2330", "#e8ebf0"),
    "soft": ("#6a7484", "#97a1b1"),
    "rule": ("#e3e7ed", "#2b313b"),
    "line1": ("#2563c9", "#7aa8ff"),
    "line2": ("#d1591d", "#ff9a62"),
    "line3": ("#16836f", "#4fd0b5"),
    "line4": ("#8a46b8", "#cf93f5"),
    "line5": ("#a8821a", "#e3c15a"),
    "line6": ("#b8336a", "#ff8fb8"),
    "line7": ("#4b6b2f", "#a5cf7f"),
}
LINES = [name for name in COLOURS if name.startswith("line")]
WIDTH, HEIGHT = 5.6, 2.7  # inches
RC: Any = {"font.size": 9.0, "text.parse_math": False}  # a label of the corpus may hold $

Drawing = Callable[[Any], None]  # draws on matplotlib axes

CSS = """
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem); max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: 0; }
p { margin: .2rem 0 1.6rem; color: var(--soft); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.4rem 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 1.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: right; font-weight: 400; }
th:first-child { text-align: left; }
thead th { color: var(--soft); }
"""


def colour(name: str) -> str:
    """The light colour of a name, for drawing."""
    return COLOURS[name][0]


def line_colour(position: int) -> str:
    return colour(LINES[position % len(LINES)])


def variables(shade: int) -> str:
    """The CSS variables of the light (0) or the dark (1) colours."""
    return " ".join(f"--{name}: {pair[shade]};" for name, pair in COLOURS.items())


def page(title: str, body: str, *, css: str = "") -> str:
    """A whole page that follows the reader's choice of light or dark."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
:root {{ {variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(1)} }} }}{CSS}{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_svg(draw: Drawing, label: str, *, size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    """A drawing as inline SVG, its colours replaced by the page's variables.

    Args:
        label: what a screen reader says; it must differ between the pictures of a page, for ids are made from it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**RC, "svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and every picture has the same names for them
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg


def to_png(draw: Drawing, title: str, *, size: tuple[float, float] = (WIDTH, HEIGHT)) -> bytes:
    """The same drawing as a PNG on white, with its title."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(size[0], size[1] + 0.3), dpi=140, facecolor=colour("page"), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        figure.suptitle(title, fontsize=10, fontweight="bold", color=colour("ink"), x=0.02, ha="left")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", facecolor=figure.get_facecolor())
    return stream.getvalue()


def plain(axes: Any, *, grid: str = "y") -> None:
    """Takes away all but what helps to read values."""
    axes.set_facecolor("none")
    axes.grid(axis=grid, color=colour("rule"), lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colour("soft"), which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colour("rule"))


def legend(axes: Any, columns: int) -> None:
    """Above the axes, at the right."""
    axes.legend(
        frameon=False,
        labelcolor=colour("ink"),
        ncols=columns,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderpad=0.2,
        handlelength=1.2,
        columnspacing=1.2,
    )
