"""The report page in a real browser: every plot is there with a size, no request leaves, dark and phone width hold.

Skips where no Chromium is installed (`apt-get install chromium`).
"""

from __future__ import annotations

import re
from pathlib import Path

from browser import check_page, needs_chromium, open_page
from report_run import ROWS, TEXT, make_whole_run

from ullme_ray.report.page import write_report


@needs_chromium
def test_a_browser_finds_every_plot(tmp_path: Path, tiny_base: str) -> None:
    report = write_report(make_whole_run(tmp_path, tiny_base), num_queries=10)
    assert set(report.missing) == {"mteb NFCorpus"}  # the task that failed
    light = open_page(Path(report.page), tmp_path)
    assert set(light["figures"]) == set(report.pictures) - {"map-of-the-corpus"}
    wanted = {"loss", "terms-of-the-loss", "validation-ndcg", "gradient-norm", "learning-rate", "tokens-per-second"}
    wanted |= {"model-flop-utilisation-mfu", "retrieval-0", "similarity-base", "similarity-trained"}
    assert set(light["figures"]) == wanted | {"lengths", "padding", "rows-by-fate"}
    rows = {"Retrieval": 4, "Generation": 1, "MTEB": 1, "Similarities of held-out pairs": 2, "Serving": 2}
    assert {title: light["tables"][title] for title in rows} == rows
    check_page(light)
    assert light["map"]["points"] == ROWS + 1  # and the ring around the one that is pointed at
    assert re.fullmatch(r"row-\d{3}" + re.escape(TEXT), light["map"]["tip"])

    dark = open_page(Path(report.page), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["background"] == "rgb(255, 255, 255)"
    assert dark["background"] == "rgb(20, 23, 28)"
    assert dark["ink"] != light["ink"]
