"""The job of SmolLM2 with its real weights, with fewer steps on fewer texts, and its report page."""

from __future__ import annotations

from pathlib import Path

from example_jobs import check_report, generation, ndcg, run_job
from smollm2 import make_smollm2


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
    settings = [f"storage={tmp_path}", f"model.base={tmp_path}/base", *small]
    output = run_job("jobs/smollm2_grl.yaml", *settings)
    assert "same vectors everywhere" in output
    assert ndcg(tmp_path / "smollm2-grl", "trained") > 0
    assert (tmp_path / "smollm2-grl" / "adapter" / "adapter_model.safetensors").is_file()
    assert generation(tmp_path / "smollm2-grl", "trained")["perplexity"] > 1
    check_report("jobs/smollm2_grl.yaml", settings, tmp_path / "smollm2-grl", tmp_path / "browser")
