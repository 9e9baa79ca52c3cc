"""A run's folder with small real files, as the stages leave them, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

from stored_table import make_vectors, write_table

from ullme_ray.spec import JobSpec
from ullme_ray.vectors import VectorFormat

ROWS = 60
TEXT = "</script><img src=x onerror=alert(1)> how tables are read"


def make_run(folder: Path) -> JobSpec:
    """Training, an evaluation of three models, a table of 60 rows and its embed report; no model and no serving benchmark."""
    job = JobSpec.model_validate(
        {
            "name": "docs",
            "storage": str(folder),
            "model": {"base": "some/model"},
            "train": {"data": [{"path": "x.jsonl"}], "max_steps": 12},
            "evaluate": {"local": [{"path": "held-out"}]},
            "embed": {"input": {"path": "corpus.jsonl", "id": "id", "columns": ["text", "kind"]}},
        }
    )
    run = folder / "docs"
    (run / "metrics").mkdir(parents=True)
    (run / "job.yaml").write_text("name: docs\n")
    records = [
        {
            "step": step,
            "loss": 3.0 / step,
            "contrastive_loss": 2.0 / step,
            "generation_loss": 0.6,
            "alignment_loss": 0.3 / step,
            "tokens_per_s": 900.0 + step,
            "mfu": 0.3,
            **({"validation_ndcg": 0.02 * step} if step % 4 == 0 else {}),
        }
        for step in range(1, 13)
    ]
    (run / "metrics" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    models = [
        {"model": "base", "measures": {"ndcg@10": 0.2}, "intervals": {"ndcg@10": [0.1, 0.3]}},
        {"model": "trained", "measures": {"ndcg@10": 0.4}, "intervals": {"ndcg@10": [0.3, 0.5]}},
        {"model": "bm25", "measures": {"ndcg@10": 0.5}, "intervals": {}},
    ]
    pair = {"better": "trained", "worse": "base", "difference": 0.2, "interval": [0.1, 0.3], "p_adjusted": 0.002}
    held_out = {"path": "held-out", "num_queries": 20, "num_passages": 60, "models": models, "comparisons": [pair]}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "report.json").write_text(json.dumps({"job": "docs", "sets": [held_out]}))

    columns = {
        "id": [f"row-{i:03}" for i in range(ROWS)],
        "text": [TEXT] * ROWS,
        "kind": [("guide", "reference", "note")[i % 3] for i in range(ROWS)],
    }
    write_table(run / "embeddings", VectorFormat(), make_vectors(ROWS), columns)
    embedded = {"rows": ROWS + 2, "rows_embedded": ROWS, "rows_copied": 0, "rows_reused": 0, "rows_dead": 2}
    embedded |= {"tokens": 420, "padding_share": 0.0, "tokens_per_s": 1234.5, "mfu": None, "table": str(run / "embeddings")}
    (run / "embed_report.json").write_text(json.dumps(embedded))
    return job
