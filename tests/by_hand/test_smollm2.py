"""The job of SmolLM2 with its real weights, with fewer steps on fewer texts: five minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from smollm2 import make_smollm2

ROOT = Path(__file__).parents[2]


def run_job(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "ullme_ray", "run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


def ndcg(folder: Path, model: str) -> float:
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    (result,) = [entry for entry in report["sets"][0]["models"] if entry["model"] == model]
    return float(result["measures"]["ndcg@10"])


def test_smollm2_trains_from_its_real_weights(tmp_path: Path) -> None:
    make_smollm2(tmp_path / "base")
    # float32: many a CPU computes bfloat16 in software
    small = [
        "model.dtype=float32",
        "dataset.max_pairs=60",
        "dataset.heldout_queries=10",
        "train.max_steps=2",
        "train.global_batch_size=8",
    ]
    output = run_job("jobs/smollm2_grl.yaml", f"storage={tmp_path}", f"model.base={tmp_path}/base", *small)
    assert "same vectors everywhere" in output
    assert ndcg(tmp_path / "smollm2-grl", "trained") > 0
    assert (tmp_path / "smollm2-grl" / "adapter" / "adapter_model.safetensors").is_file()
