"""The map of the corpus in the page: one SVG circle per row, and a few lines of script that show the text under the pointer.

Texts travel as JSON in the page and reach it as text nodes, so nothing that a corpus holds can become markup.
"""

from __future__ import annotations

import html
import json

import numpy as np

from ullme_ray.report.style import LINES
from ullme_ray.report.vectors import TableSample

_WIDTH, _HEIGHT, _MARGIN = 1000, 640, 16

CSS = """
#map { position: relative; }
#map svg { touch-action: pan-y; border: 1px solid var(--rule); border-radius: 6px; }
#map circle { opacity: .65; }
#map #ring { fill: none; stroke: var(--ink); stroke-width: 2; opacity: 1; }
#tip { position: absolute; max-width: min(22rem, 80%); padding: .4rem .6rem; border: 1px solid var(--rule); border-radius: 6px;
  background: var(--page); color: var(--ink); font-size: .85rem; pointer-events: none; overflow-wrap: anywhere; }
#tip b { display: block; font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0; color: var(--soft); font-size: .9rem; }
.key i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
"""

_SCRIPT = """
(() => {
  const svg = document.querySelector("#map svg"), tip = document.getElementById("tip"), ring = document.getElementById("ring");
  const rows = JSON.parse(document.getElementById("map-rows").textContent);
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = 30 ** 2;
    for (const row of rows) {
      const far = (row[0] - at.x) ** 2 + (row[1] - at.y) ** 2;
      if (far < least) { least = far; best = row; }
    }
    tip.hidden = best === null;
    ring.setAttribute("visibility", best === null ? "hidden" : "visible");
    if (best === null) return;
    ring.setAttribute("cx", best[0]);
    ring.setAttribute("cy", best[1]);
    const name = document.createElement("b");
    name.textContent = best[2];
    tip.replaceChildren(name, best[3]);
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const left = Math.min(best[0] * scale + 12, box.width - tip.offsetWidth);
    const below = best[1] * scale + 12;
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = (below + tip.offsetHeight > box.height ? Math.max(0, below - 24 - tip.offsetHeight) : below) + "px";
  };
  const hide = () => { tip.hidden = true; ring.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
})();
"""


def map_html(sample: TableSample, points: np.ndarray) -> str:
    """The map with its key, its texts and its script.

    Args:
        points: (N, 2), a row for each of the sample.
    """
    placed = _placed(points)  # (N, 2) in the SVG's own units
    circles = "".join(
        f'<circle cx="{x}" cy="{y}" r="4.5" fill="var(--{LINES[group % len(LINES)]})"/>'
        for (x, y), group in zip(placed, sample.groups)
    )
    rows = [[x, y, id_, text] for (x, y), id_, text in zip(placed, sample.ids, sample.texts)]
    content = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    key = "".join(
        f'<span><i style="background: var(--{LINES[group % len(LINES)]})"></i>{html.escape(label)}</span>'
        for group, label in enumerate(sample.group_labels)
    )
    head = f'<div class="key">{html.escape(sample.group_name)}: {key}</div>' if key else ""
    return (
        f'{head}<div id="map"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="map of the corpus">{circles}'
        f'<circle id="ring" r="8" visibility="hidden"/></svg><div id="tip" hidden></div></div>\n'
        f'<script type="application/json" id="map-rows">{content}</script>\n<script>{_SCRIPT}</script>'
    )


def _placed(points: np.ndarray) -> list[list[float]]:
    """Into the SVG's box, both axes alike, centred."""
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.array([_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN])
    scale = float((room / np.maximum(high - low, 1e-9)).min())
    centred = (points - (low + high) / 2) * scale + np.array([_WIDTH, _HEIGHT]) / 2
    return [[round(float(x), 1), round(float(y), 1)] for x, y in centred]
