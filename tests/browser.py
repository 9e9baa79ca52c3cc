"""A report page as a real browser sees it; needs Chromium (`apt-get install chromium`)."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")

# Runs in the page once it is loaded, and leaves what it found in an attribute for --dump-dom to print.
MEASURE = """
<script>
addEventListener("load", () => {
  const size = (element) => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
  const svg = document.querySelector("#map svg"), box = svg.getBoundingClientRect();
  const dot = svg.querySelector("circle").getBoundingClientRect();
  const at = {clientX: dot.x + dot.width / 2, clientY: dot.y + dot.height / 2, bubbles: true};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.getElementById("tip");
  const found = {
    figures: Object.fromEntries([...document.querySelectorAll("figure")].map((figure) =>
      [figure.id, {size: size(figure.querySelector("svg")), shapes: figure.querySelectorAll("path, use").length}])),
    map: {size: size(svg), points: svg.querySelectorAll("circle").length, tip: tip.hidden ? null : tip.textContent},
    tables: Object.fromEntries([...document.querySelectorAll("h2")].map((heading) => {
      let rows = 0;
      for (let next = heading.nextElementSibling; next && next.tagName !== "H2"; next = next.nextElementSibling)
        rows += [...next.querySelectorAll("tbody tr")].filter((row) => Math.min(...size(row)) > 0).length;
      return [heading.textContent, rows];
    })),
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("figure svg text")).fill,
  };
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  found.tipAfter = tip.hidden;
  document.body.style.width = "320px";  /* with its padding, a small phone */
  const outside = [...document.querySelectorAll("figure, svg, h1, p, dl, .tiles, #map, .missing")].filter(
    (element) => element.getBoundingClientRect().right > document.body.getBoundingClientRect().right + 1);
  found.outside = outside.map((element) => element.outerHTML.slice(0, 80));
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


def open_page(page: Path, folder: Path, *options: str) -> dict[str, Any]:
    """What the browser sees of a page; names cannot be resolved in it, so a request could not succeed either."""
    copy = page.with_name("measured.html")
    copy.write_text(page.read_text() + MEASURE)
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder}/profile", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"]
    done = subprocess.run(
        [*command, *options, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, f"the page's script did not run to its end:\n{done.stderr[-2000:]}"
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def check_page(found: dict[str, Any]) -> None:
    """What holds of every page: each plot is drawn and has a size, nothing is requested, nothing sticks out of a phone."""
    for name, figure in found["figures"].items():
        width, height = figure["size"]
        assert width > 200, name
        assert height > 40, name
        assert figure["shapes"] > 5, name
    assert min(found["map"]["size"]) > 150
    assert found["tipAfter"] is True
    assert found["requests"] == []
    assert found["outside"] == []
