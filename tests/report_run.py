"""A run's folder with small real files, as the stages leave them, for tests of the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from stored_table import make_vectors, write_table

from ullme_ray.spec import JobSpec
from ullme_ray.vectors import VectorFormat

ROWS = 60
TEXT = "</script><img src=x onerror=alert(1)> how tables are read"


def make_run(folder: Path, *, base: str = "some/model") -> JobSpec:
    """Training, an evaluation of three models, a table of 60 rows and its embed report; no model and no serving benchmark."""
    job = JobSpec.model_validate(
        {
            "name": "docs",
            "storage": str(folder),
            "model": {"base": base, "max_tokens": 64},
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
            "grad_norm": 1.0 + 1.0 / step,
            "learning_rate": 1e-4 * step,
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


def make_whole_run(folder: Path, base: str) -> JobSpec:
    """All that a page can show: also models with a held-out set to compare, generation checks, MTEB, a serving benchmark."""
    job = make_run(folder, base=base)
    run = folder / "docs"
    shutil.copytree(base, run / "model")
    (run / "model" / "modules.json").write_text("[]")
    write_held_out(folder / "held-out")
    report = json.loads((run / "evaluation" / "report.json").read_text())
    (run / "evaluation" / "report.json").write_text(json.dumps({**report, "generation": GENERATION, "mteb": MTEB}))
    rows = [{"clients": 8, "requests_per_s": 41.5, "p99_ms": 120}, {"clients": 64, "requests_per_s": 88.0, "p99_ms": 700}]
    (run / "serve_bench.json").write_text(json.dumps(rows))
    evaluate = {"local": [{"path": str(folder / "held-out")}]}
    return JobSpec.model_validate({**job.model_dump(), "evaluate": evaluate})


GENERATION = {
    "path": "rows.jsonl",
    "num_rows": 12,
    "num_passages": 60,
    "models": [
        {
            "model": "base",
            "note": "",
            "perplexity": 31.5,
            "perplexity_interval": [30.0, 33.0],
            "preference_accuracy": 0.625,
            "preference_interval": [0.5, 0.75],
            "kendall_tau": 0.125,
            "tau_interval": [0.0, 0.25],
        },
        {"model": "trained", "note": "the adapter that generates is not exported"},
    ],
}
MTEB = {
    "model": "ullme_ray/docs",
    "revision": "0123456789abcdef",
    "folder": "mteb",
    "tasks": [{"task": "STS12", "type": "STS", "measure": "cosine_spearman", "score": 0.7125, "seconds": 1.0, "file": "x"}],
    "failed": {"NFCorpus": "the task NFCorpus cannot be run"},
}


def write_held_out(folder: Path) -> None:
    """Six queries in BEIR layout. Two share a passage; each is first judged to be answered by none of the next one's."""
    (folder / "qrels").mkdir(parents=True)
    own = [0, 0, 1, 2, 3, 4]
    passages = [{"_id": f"p{n}", "text": f"makes the object {n} private"} for n in range(5)]
    queries = [{"_id": f"q{n}", "text": f"the bucket {n}"} for n in range(6)]
    judged = [f"q{n}\tp{passage}\t{score}" for n in range(6) for passage, score in (((own[n] + 1) % 5, 0), (own[n], 1))]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
