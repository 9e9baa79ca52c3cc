"""The quickstart does what README says, with fewer steps on fewer texts. SmolLM2: tests/by_hand/test_smollm2.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import needs_chromium
from example_jobs import check_report, generation, ndcg, run_job

JOB = "jobs/quickstart.yaml"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """What was set over the job file, and what the run printed."""
    storage = tmp_path_factory.mktemp("runs")
    settings = [f"storage={storage}", "train.max_steps=50", "dataset.max_pairs=2500", "dataset.heldout_queries=150"]
    return settings, run_job(JOB, *settings)


def folder_of(settings: list[str]) -> Path:
    return Path(settings[0].removeprefix("storage="), "quickstart")


def test_quickstart_learns_embeds_serves_and_answers(quickstart: tuple[list[str], str]) -> None:
    settings, output = quickstart
    folder = folder_of(settings)
    assert ndcg(folder, "trained") >= 1.5 * ndcg(folder, "base")
    before, after = (generation(folder, model) for model in ("base", "trained"))  # so few steps move little
    assert before["perplexity"] != after["perplexity"]
    assert before["kendall_tau"] != after["kendall_tau"]
    assert "Q: how do I make a bucket private" in output
    assert "same vectors everywhere" in output
    for name in ("job.yaml", "data", "model", "checkpoints", "metrics", "evaluation", "embeddings"):
        assert str(folder / name) in output
        assert (folder / name).exists()


@needs_chromium
def test_every_plot_of_the_quickstart_is_seen_in_a_browser(quickstart: tuple[list[str], str], tmp_path: Path) -> None:
    settings, _ = quickstart
    check_report(JOB, settings, folder_of(settings), tmp_path)
