"""The quickstart does what README says, with fewer steps on fewer texts. SmolLM2: tests/by_hand/test_smollm2.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_job(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}  # beside the other tests, as in conftest.py
    result = subprocess.run(
        [sys.executable, "-m", "ullme_ray", "run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


def ndcg(folder: Path, model: str) -> float:
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    (result,) = [entry for entry in report["sets"][0]["models"] if entry["model"] == model]
    return float(result["measures"]["ndcg@10"])


def test_quickstart_learns_embeds_serves_and_answers(tmp_path: Path) -> None:
    small = ["train.max_steps=50", "dataset.max_pairs=2500", "dataset.heldout_queries=150"]
    output = run_job("jobs/quickstart.yaml", f"storage={tmp_path}", *small)
    folder = tmp_path / "quickstart"
    assert ndcg(folder, "trained") >= 1.5 * ndcg(folder, "base")
    assert "Q: how do I make a bucket private" in output
    assert "same vectors everywhere" in output
    for name in ("job.yaml", "data", "model", "checkpoints", "metrics", "evaluation", "embeddings"):
        assert str(folder / name) in output
        assert (folder / name).exists()
