"""The jobs in jobs/, run as README says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
