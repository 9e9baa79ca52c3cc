"""A run simulated from costs, against what a person can compute by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.errors import JobFileError
from ullme_ray.plan import plan_scale
from ullme_ray.plan.scale import Costs, simulate
from ullme_ray.spec.job import JobSpec

# 100 documents of 10 tokens at 100 tokens/s: 10 s a unit; everything else is as good as free.
EVEN = Costs(
    gpus=4, tokens_per_s=100, tokens_per_document=10, spread=0, start_s=0, write_mb_per_s=1e9, list_s=0, dispatch_per_s=1e9
)


def test_even_units_fill_the_gpus() -> None:
    plan = simulate(1600, 100, EVEN)
    assert (plan.units, plan.embed_s, plan.busy_share, plan.limit) == (16, pytest.approx(40), pytest.approx(1), "the GPUs")
    longer = simulate(1601, 100, EVEN)  # one unit more: a fifth round, with three processes idle
    assert (longer.units, longer.embed_s, longer.busy_share) == (17, pytest.approx(50), pytest.approx(170 / 200))
    assert simulate(100, 100, EVEN).embed_s == pytest.approx(10)


def test_the_slowest_part_is_the_limit() -> None:
    driver = simulate(1600, 100, replace(EVEN, dispatch_per_s=0.1))
    assert driver.limit == "the driver"
    assert driver.embed_s == pytest.approx(15 / 0.1 + 10)  # the last unit is handed out after 150 s
    assert "embed.rows_per_unit = 1024 " in driver.to_text()
    assert simulate(16_000, 1024, replace(EVEN, dispatch_per_s=0.1)).limit == "the GPUs"
    writing = simulate(1600, 100, replace(EVEN, bytes_per_document=1e6, write_mb_per_s=5))  # 100 MB a unit: 20 s
    assert (writing.limit, writing.embed_s) == ("writing", pytest.approx(80))


def test_what_the_driver_does_alone_is_counted() -> None:
    costs = replace(EVEN, plan_us=1e6, commit_us=2e6, list_s=3, start_s=5, documents_per_file=1, price_per_gpu_hour=9)
    plan = simulate(1600, 100, costs)
    assert (plan.plan_s, plan.commit_s, plan.list_s, plan.check_s) == (16, 32, 6, 3)  # 1,600 files: two listings of 1,000
    assert plan.seconds == pytest.approx(6 + 16 + 5 + 40 + 3 + 32)
    assert plan.own_share == pytest.approx((6 + 16 + 3 + 32) / plan.seconds)
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 4 * 9)
    assert "NOT under 1%" in plan.to_text()
    assert simulate(1600, 100, EVEN).cost is None


def test_units_that_differ_take_longer_than_even_ones() -> None:
    even, uneven = simulate(4000, 100, EVEN), simulate(4000, 100, replace(EVEN, spread=0.5))
    assert even.embed_s < uneven.embed_s < 1.5 * even.embed_s
    assert uneven == simulate(4000, 100, replace(EVEN, spread=0.5))  # the same every time


def job_in(folder: Path) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "big",
            "storage": str(folder),
            "model": {"base": "/x"},
            "embed": {"input": {"path": "/corpus"}, "actors": {"min": 1, "max": 2}},
        }
    )


def test_a_billion_documents_on_256_gpus(tmp_path: Path) -> None:
    """The driver's own work stays under 1 % of the run, and it hands units out faster than 256 GPUs embed them."""
    plan = plan_scale(job_in(tmp_path), 1e9, ["gpus=256"])
    assert plan.units == 244_141
    assert plan.own_share < 0.01
    assert plan.limit == "the GPUs"
    assert plan.embed_s == pytest.approx(1e9 * 256 / 20_000 / 256, rel=0.02)


def test_costs_come_from_the_command_line_then_the_last_run(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    report = {"rows_embedded": 90, "rows_copied": 10, "tokens": 1800, "bytes_written": 5000}
    report |= {"tokens_per_s": 100.0, "model_tokens_per_s": 500.0, "actors": 2}  # of eight that there might have been
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "embed_report.json").write_text(json.dumps(report))
    plan = plan_scale(job, 1e6)
    assert (plan.costs.tokens_per_document, plan.costs.tokens_per_s, plan.costs.bytes_per_document) == (20, 250, 50)
    assert plan.sources["tokens_per_s"] == "last run"
    given = plan_scale(job, 1e6, ["tokens_per_s=7", "spread=0"])
    assert (given.costs.tokens_per_s, given.sources["tokens_per_s"], given.costs.spread) == (7, "given", 0)
    report["rows_embedded"] = 0  # a run with nothing to do tells nothing
    (tmp_path / "big" / "embed_report.json").write_text(json.dumps(report))
    assert plan_scale(job, 1e6).sources == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gpu=4", "gpu is no cost; use one of gpus, tokens_per_s"),
        ("gpus", "gpus =  is not a number above 0"),
        ("gpus=0", "gpus = 0 is not a number above 0"),
        ("gpus=2.5", "gpus = 2.5 is not a whole number"),
        ("tokens_per_s=nan", "tokens_per_s = nan is not a number above 0"),
        ("=4", "=4 is no cost"),
    ],
)
def test_a_wrong_cost_is_refused(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        plan_scale(job_in(tmp_path), 1e6, [given])


def test_a_scale_of_nothing_is_refused(tmp_path: Path) -> None:
    for documents in (0.0, -5.0, float("nan"), float("inf")):
        with pytest.raises(JobFileError, match="documents = "):
            plan_scale(job_in(tmp_path), documents)
    without = job_in(tmp_path).model_copy(update={"embed": None})
    with pytest.raises(JobFileError, match="embed is missing"):
        plan_scale(without, 1e6)


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"name: big\nstorage: {tmp_path}\nmodel: {{base: /x}}\nembed: {{input: {{path: /corpus}}}}\n")
    command = ["plan", str(path), "--scale", "1e6", "--cost", "gpus=8", "--cost", "price_per_gpu_hour=2"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "1,000,000 documents, 256,000,000 tokens, 245 units on 8 GPUs" in shown.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert found["units"] == 245
    assert found["costs"]["gpus"] == 8
    refused = CliRunner().invoke(app, ["plan", str(path), "--scale", "1e6", "--cost", "x=1"])
    assert refused.exit_code == 2
