"""What a run and a dry run tell: rates that stay true where little was done, actors at work, and what is counted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import ullme_ray.run
from ullme_ray.embed.dry_run import DryRun
from ullme_ray.embed.pipeline import _model_rate, _num_at_work
from ullme_ray.embed.report import last_rate, report_path
from ullme_ray.embed.steps import Forward
from ullme_ray.spec.job import JobSpec


def make_job(folder: Path, base: str = "x") -> JobSpec:
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / "a.jsonl").write_text('{"id": "a", "text": "b"}\n')
    embed = {"input": {"path": f"{folder}/in", "id": "id"}}
    return JobSpec.model_validate({"name": "docs", "storage": str(folder), "model": {"base": base}, "embed": embed})


def forward(actor: str, num_tokens: int, seconds: float) -> Forward:
    return Forward(num_tokens, num_tokens, seconds, 0.0, 0.0, actor, None)


def test_the_rate_is_that_of_the_actors_while_they_embedded() -> None:
    work = [forward("a", 1000, 10.0), forward("b", 500, 5.0), forward("b", 500, 5.0)]
    assert _model_rate(work, 8) == 200.0
    copied = [forward("a", 0, 0.1), forward("c", 0, 0.1)]
    assert _model_rate([*work, *copied], 8) == 200.0, "what was copied took the model no time"
    assert _model_rate([*work, forward("in place of b", 1000, 10.0)], 2) == 200.0
    assert _model_rate(copied, 8) is None
    assert _model_rate([], 8) is None


@pytest.mark.parametrize(
    ("told", "rate"),
    [
        ({"tokens_per_s": 0.0, "model_tokens_per_s": 200.0}, 200.0),
        ({"tokens_per_s": 3.0, "model_tokens_per_s": 200.0}, 200.0),
        ({"tokens_per_s": 3.0}, 3.0),
        ({"tokens_per_s": 0.0, "model_tokens_per_s": None}, None),
        (None, None),
    ],
)
def test_the_last_rate_outlives_runs_that_embed_nothing(tmp_path: Path, told: dict[str, float], rate: float | None) -> None:
    """Also from the report of a version that did not keep it."""
    job = make_job(tmp_path)
    if told is not None:
        Path(report_path(job)).parent.mkdir()
        Path(report_path(job)).write_text(json.dumps(told))
    assert last_rate(job) == rate


def test_actors_with_long_units_count_as_at_work() -> None:
    ten_minutes = {f"a-{number}": (100.0 * number, 600.0) for number in range(8)}
    assert _num_at_work(ten_minutes, 800.0) == 8
    assert _num_at_work(ten_minutes, 800.0 + 3600.0) == 0
    assert _num_at_work({"quick": (0.0, 1.0), "gone": (-70.0, 1.0)}, 10.0) == 1


def test_a_dry_run_says_how_plain_texts_are_counted() -> None:
    counts = {"files": 50, "files_new": 0, "files_changed": 30, "files_unchanged": 20, "files_removed": 0}
    work = {"units": 2, "units_to_read": 1, "rows": 50, "rows_to_read": 30, "rows_to_embed_estimate": 1}
    rest = {"tokens_estimate": 9, "seconds_estimate": None}
    told = "a text counts as new or changed with its whole group"
    assert told in DryRun(**counts, grouped=True, **work, **rest).to_text()
    assert told not in DryRun(**counts, grouped=False, **work, **rest).to_text()


def test_a_dry_run_leaves_the_job_file_as_it_is(tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ullme_ray.run, "start_ray", lambda *_, **__: contextlib.nullcontext())
    job, kept = make_job(tmp_path, tiny_base), tmp_path / "docs" / "job.yaml"
    with ullme_ray.run.at_work(job, ("embed",), verbose=False, recorded_in_ledger=False):
        assert not kept.exists()
    with ullme_ray.run.at_work(job, ("embed",), verbose=False):
        assert "name: docs" in kept.read_text()
