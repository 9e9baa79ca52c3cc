"""The pictures of a run: what the records hold is drawn, the page asks nobody for anything, odd values do no harm."""

from __future__ import annotations

import html.parser
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ullme_ray.report.curves import draw_html, draw_png, panels_of, running_mean, write_curves
from ullme_ray.spec import JobSpec
from ullme_ray.train.mailbox import shown_figures


def make_job(folder: Path) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "t", "storage": str(folder), "model": {"base": "a<b>&c"}, "train": {"data": [{"path": "x.jsonl"}]}}
    )


def record(step: int, **more: float) -> dict[str, Any]:
    losses = {"loss": 3.0 / step, "contrastive_loss": 2.0 / step, "generation_loss": 0.5, "alignment_loss": 0.0}
    return {"step": step, **losses, "grad_norm": 1.5, "learning_rate": 1e-4, "tokens_per_s": 1234.5, "mfu": 0.4, **more}


def titles(records: list[dict[str, Any]]) -> list[str]:
    return [panel.title for panel in panels_of(records)]


def test_every_measure_has_a_panel_and_one_that_is_absent_has_none() -> None:
    plain = [record(step) for step in range(1, 6)]
    found = titles(plain)
    assert found[0] == "loss"
    assert {"gradient norm", "learning rate", "tokens per second"} < set(found)
    assert not any(title.startswith("validation") for title in found)
    assert "validation nDCG" in titles([*plain, record(6, validation_ndcg=0.3)])
    (parts,) = [panel for panel in panels_of(plain) if panel.title.startswith("terms")]
    assert [name for _, name in parts.lines] == ["contrastive_loss", "generation_loss"]  # alignment is 0: no term of the job
    (more,) = [panel for panel in panels_of([record(1, distill_loss=0.2)]) if panel.title.startswith("terms")]
    assert "distill_loss" in [name for _, name in more.lines]


class Page(html.parser.HTMLParser):
    """What the page shows and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_every_panel(tmp_path: Path) -> None:
    records = [record(step, validation_ndcg=0.1 * step) for step in range(1, 6)]
    text = draw_html(records, make_job(tmp_path))
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == len(panels_of(records)) == 7
    assert "a<b>&c" in page.text  # escaped, so it is text
    assert "0.5000" in page.text  # the last nDCG stands in the table
    assert page.links  # the SVG's own parts ...
    assert all(link.startswith("#") for link in page.links)  # ... and nothing else
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "#2563c9" not in text.split("</style>", 1)[1]  # no fixed colour in the drawings: each is a variable of the page
    assert "var(--line1)" in text.split("</style>", 1)[1]


def ink(png: bytes) -> int:
    """Pixels of the first line's colour."""
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((abs(picture - np.array([0x25, 0x63, 0xC9])).sum(axis=2) < 12).sum())


def test_the_picture_shows_the_lines() -> None:
    records = [record(step) for step in range(1, 60)]
    png = draw_png(records, title="t")
    assert Image.open(io.BytesIO(png)).size[0] >= 1200
    more = draw_png([r | {"validation_ndcg": 0.01 * r["step"]} for r in records], title="t")
    assert ink(png) > 2000
    assert ink(more) > ink(png) + 500  # the control: one more panel is more ink


@pytest.mark.parametrize(
    "records",
    [
        [record(1)],
        [record(1), record(2, grad_norm=math.nan), record(3, loss=math.inf)],
        [{"step": 4, "loss": 1.0}, {"step": 4, "validation_ndcg": 0.5}, {"step": 5, "loss": 0.9, "name": "text"}],
        [record(step, grad_norm=10.0 ** (step % 4)) for step in range(1, 100)],
    ],
    ids=["one step", "not finite", "records of one step apart", "norms of many sizes"],
)
def test_odd_records_do_no_harm(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    assert draw_png(records, title="t").startswith(b"\x89PNG")
    assert "nan" not in draw_html(records, make_job(tmp_path)).split("<tbody>")[1]


def test_files_come_from_the_runs_records_and_not_without_any(tmp_path: Path) -> None:
    metrics = tmp_path / "t" / "metrics"
    metrics.mkdir(parents=True)
    write_curves(make_job(tmp_path))
    assert not list(metrics.iterdir())
    lines = [json.dumps(record(step)) for step in range(1, 4)]
    (metrics / "train.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))  # cut off by a crash
    write_curves(make_job(tmp_path))
    assert {path.name for path in metrics.iterdir()} == {"train.jsonl", "curves.png", "curves.html"}
    assert "3 steps" in (metrics / "curves.html").read_text()


def test_running_mean_is_centred() -> None:
    assert running_mean([1.0, 2.0, 6.0, 2.0], 3) == [1.5, 3.0, 10 / 3, 4.0]
    ramp = [float(i) for i in range(50)]
    assert running_mean(ramp, 5)[2:-2] == pytest.approx(ramp[2:-2])


def test_the_progress_line_fits_a_terminal() -> None:
    found = shown_figures(
        record(2, alignment_loss=0.4, validation_ndcg=0.4312, tokens_per_s=51234.5, mfu=0.412, memory_bytes=1)
    )
    assert ", ".join(f"{name} {value}" for name, value in found.items()) == (
        "loss 1.500, con 1.000, gen 0.500, align 0.400, ndcg 0.431, grad 1.5, lr 1.0e-04, tokens/s 51,234, MFU 41%"
    )
    assert "align" not in shown_figures(record(1))  # a term the job does not have
    assert shown_figures({"step": 3, "validation_ndcg": 0.5}) == {"ndcg": "0.500"}
