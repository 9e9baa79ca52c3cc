"""The quickstart does what README says, with fewer steps on fewer texts. SmolLM2: tests/by_hand/test_smollm2.py."""

from __future__ import annotations

from pathlib import Path

from example_jobs import ndcg, run_job


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
