"""The jobs in jobs/, run as README says, and their report pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from browser import check_page, open_page

ROOT = Path(__file__).parents[1]


# The plots of a run that trained, was evaluated and embedded a corpus; others need a validation set or a serving benchmark.
PLOTS = {"loss", "terms-of-the-loss", "gradient-norm", "learning-rate", "tokens-per-second", "model-flop-utilisation-mfu"}
PLOTS |= {"retrieval-0", "similarity-base", "similarity-trained", "lengths", "padding", "rows-by-fate"}


def run_job(*arguments: str) -> str:
    return _command("run", *arguments)


def _command(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}  # beside the other tests, as in conftest.py
    result = subprocess.run(
        [sys.executable, "-m", "ullme_ray", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


def check_report(job: str, settings: list[str], folder: Path, scratch: Path) -> None:
    """Writes the page of a finished run as README says and opens it."""
    _command("report", job, *settings)
    found = open_page(folder / "report" / "index.html", scratch)
    check_page(found)
    assert set(found["figures"]) == PLOTS
    for name in PLOTS:
        assert (folder / "report" / f"{name}.png").stat().st_size > 1000, name
    assert found["map"]["points"] > 50
    assert found["tables"]["Retrieval"] >= 3  # base, trained, BM25
    assert found["tables"]["Generation"] == 2


def ndcg(folder: Path, model: str) -> float:
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    (result,) = [entry for entry in report["sets"][0]["models"] if entry["model"] == model]
    return float(result["measures"]["ndcg@10"])


def generation(folder: Path, model: str) -> dict[str, Any]:
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    (result,) = [entry for entry in report["generation"]["models"] if entry["model"] == model]
    return dict(result)
