"""Encoders and latent attention through the whole of training on one rank: ZeRO stages, checkpoint, export, other readers."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from grl_reference import WORDS
from tiny_encoders import save_encoder

from ullme_ray.model import open_encoder
from ullme_ray.parity import min_cosine
from ullme_ray.spec import JobSpec, RunFolder

LATENT = {"pooling": "latent_attention", "latent_attention": {"latents": 6, "heads": 4}}
LORA = {"lora": {"rank": 4, "alpha": 8}}
# name: (base, more of the model section, ZeRO stage)
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "xlm-roberta": ("xlm-roberta", {}, 0),
    "bert-lora": ("bert", LORA, 2),
    "modernbert-bf16": ("modernbert", {"dtype": "bfloat16"}, 1),
    "mt5": ("mt5", {}, 3),
    "mt5-latent-lora": ("mt5", LATENT | LORA, 3),
    "decoder-latent": ("decoder", LATENT, 3),
    "decoder-latent-lora-bf16": ("decoder", LATENT | LORA | {"dtype": "bfloat16"}, 0),
}
TEXTS = ["make a bucket private", "list", "the access policy of a bucket, the key and the object " * 4]


def make_job(name: str, folder: Path, bases: dict[str, str]) -> JobSpec:
    base, model, stage = CASES[name]
    prompts = {"query": "Find:\n", "passage": "Text:\n"}
    return JobSpec.model_validate(
        {
            "name": name,
            "storage": str(folder / "runs"),
            "model": {"base": bases[base], "max_tokens": 64, "prompts": prompts, **model},
            "train": {
                "objective": "cl",
                "data": [{"path": str(folder / "pairs.jsonl")}],
                "global_batch_size": 8,
                "chunk_size": 3,
                "max_steps": 3,
                "learning_rate": 1e-2,
                "gradient_checkpointing": True,
                "deepspeed": {"zero_stage": stage},
            },
        }
    )


def train_all(rank: int, port: int, jobs: list[JobSpec], result_file: str) -> None:
    import torch.distributed as dist

    from ullme_ray.train.loop import train_on_rank

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=1)
    records: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
    for job in jobs:
        train_on_rank(job, records[job.name].append, lambda step, doing: None)
    Path(result_file).write_text(json.dumps(records))
    dist.destroy_process_group()


def test_encoders_and_latent_attention_train_and_export(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    families = {base for base, _, _ in CASES.values() if base != "decoder"}
    bases = {"decoder": tiny_base} | {family: save_encoder(family, str(tmp_path / family)) for family in families}
    with (tmp_path / "pairs.jsonl").open("w") as stream:
        for i, word in enumerate(WORDS * 2):
            row = {"query": f"{word} {i}", "positive": f"the {word} of number {i}", "negative": f"no {i}"}
            stream.write(json.dumps(row) + "\n")
    jobs = [make_job(name, tmp_path, bases) for name in CASES]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = tmp_path / "records.json"
    mp.spawn(train_all, args=(port, jobs, str(result)), nprocs=1)
    records = json.loads(result.read_text())
    for job in jobs:
        steps = [record for record in records[job.name] if "loss" in record]
        assert [record["step"] for record in steps] == [1, 2, 3], job.name
        assert all(record["grad_norm"] > 0 for record in steps), job.name
        trained = open_encoder(job, device="cpu")
        before = open_encoder(job, which="base", device="cpu")
        theirs = SentenceTransformer(RunFolder.of(job).export, device="cpu", trust_remote_code="latent" in job.name)
        for prompt in ("query", "passage"):
            ours = trained.encode(TEXTS, prompt)  # type: ignore[arg-type]
            floor = 0.999999 if job.model.dtype == "float32" else 0.999
            assert min_cosine(ours, theirs.encode(TEXTS, prompt_name=prompt)) >= floor, job.name
            assert min_cosine(ours, before.encode(TEXTS, prompt)) < 0.999, job.name  # type: ignore[arg-type]
        if job.model.pooling == "latent_attention":
            moved = [float(p.float().abs().max()) for n, p in trained.head.named_parameters() if "out.weight" in n]
            assert len(moved) == 2
            assert min(moved) > 0, "the layer's output matrices start at zero and must have been trained"
