"""Which strategy makes the better embedder at equal steps: held-out nDCG@10 of cl, sft, dpo, grl and genc, three seeds each.

    python tests/smollm2.py FOLDER && python tests/bench/strategies.py FOLDER

Trains a pretrained decoder on the built-in data set, one process a run and `--at-once` of them together, and prints a table in
Markdown. The held-out sample (100 queries, 400 passages) differs with the seed, and so does the base's number. A run that is
done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ullme_ray.sample_data import ensure_dataset
from ullme_ray.spec import JobSpec

DATASET = {"name": "aws_api_docs", "max_pairs": 3000, "heldout_queries": 200}
STRATEGIES = ("cl", "sft", "dpo", "grl", "genc")


def make_job(base: str, folder: str, strategy: str, seed: int, steps: int) -> JobSpec:
    """All runs are alike but for objective and seed."""
    return JobSpec.model_validate(
        {
            "name": f"{strategy}-{seed}",
            "storage": folder,
            "seed": seed,
            "model": {
                "base": base,
                "max_tokens": 32,
                "dtype": "bfloat16",
                "prompts": {"query": "Given a question, retrieve passages that answer it.\n"},
                "lora": {"rank": 16, "alpha": 32},
            },
            "train": {
                "objective": strategy,
                "data": [{"path": f"{folder}/data/data/train.jsonl"}],
                "global_batch_size": 16,
                "chunk_size": 16,
                "max_steps": steps,
                "learning_rate": 1e-3,
                "deepspeed": {"zero_stage": 0},
                "max_generation_tokens": 80,
                "checkpoint_every_steps": steps,
                "validation": {
                    "path": f"{folder}/data/data/heldout",
                    "every_steps": steps,
                    "max_queries": 100,
                    "max_passages": 400,
                    "export": "last",
                },
            },
        }
    )


def records_of(job: JobSpec) -> list[dict[str, Any]]:
    path = Path(job.storage) / job.name / "metrics" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def ndcg_at(job: JobSpec, step: int) -> float | None:
    return next((r["validation_ndcg"] for r in records_of(job) if r["step"] == step and "validation_ndcg" in r), None)


def train(job: JobSpec, threads: int) -> None:
    """One run in a process of its own, without Ray: one rank needs none."""
    assert job.train is not None
    if ndcg_at(job, job.train.max_steps) is None:
        code = (
            "import sys; from ullme_ray.spec import JobSpec; from ullme_ray.train.loop import train_on_rank; "
            "train_on_rank(JobSpec.model_validate_json(sys.argv[1]), lambda record: None, lambda *_: None)"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [sys.executable, "-c", code, job.model_dump_json()], check=True, env=environment, stderr=subprocess.DEVNULL
        )
    print(f"{job.name}: {ndcg_at(job, job.train.max_steps):.4f}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder of the pretrained model")
    parser.add_argument("--folder", default="runs/strategies", help="where data and runs go")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    args = parser.parse_args()

    folder = str(Path(args.folder).resolve())
    base = str(Path(args.base).resolve())
    data = make_job(base, folder, "cl", 1, 1).model_dump() | {"name": "data", "dataset": DATASET}
    ensure_dataset(JobSpec.model_validate(data))
    jobs = {
        (strategy, seed): make_job(base, folder, strategy, seed, args.steps)
        for seed in range(1, args.seeds + 1)
        for strategy in STRATEGIES
    }
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(lambda job: train(job, args.threads), jobs.values()))
    print(table(jobs, args.steps))


def table(jobs: dict[tuple[str, int], JobSpec], steps: int) -> str:
    """Markdown: a line per strategy with nDCG@10 of each seed, their mean, and the mean gain over the untrained model."""
    seeds = sorted({seed for _, seed in jobs})
    lines = [
        "| strategy | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | gain |",
        "| --- |" + " ---: |" * (len(seeds) + 2),
    ]
    untrained = [ndcg_at(jobs["cl", seed], 0) or 0.0 for seed in seeds]
    for strategy in ("base", *STRATEGIES):
        found = untrained if strategy == "base" else [ndcg_at(jobs[strategy, seed], steps) or 0.0 for seed in seeds]
        mean = sum(found) / len(found)
        gain = mean - sum(untrained) / len(untrained)
        cells = [*(f"{value:.4f}" for value in found), f"{mean:.4f}", "" if strategy == "base" else f"{gain:+.4f}"]
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
