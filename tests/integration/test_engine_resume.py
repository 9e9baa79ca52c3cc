"""A checkpoint holds all that a step depends on: under ZeRO 0 to 3, fp32 and bf16, LoRA and full, on 2 real gloo ranks.

Three steps in one go, and two steps, a checkpoint, a new engine and the third step, give the same weights bit by bit. The
control takes the third step without the checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from grl_reference import SEED, make_batch, objective
from torch import Tensor

from ullme_ray.spec import JobSpec

ROWS, WORLD_SIZE = 4, 2
CASES = [("float32", True), ("float32", False), ("bfloat16", True), ("bfloat16", False)]  # dtype, lora


def make_job(base: str, stage: int, dtype: str, lora: bool) -> JobSpec:
    model = {"base": base, "dtype": dtype, "max_tokens": 64, "lora": {"rank": 4, "alpha": 8, "dropout": 0.3} if lora else None}
    train = {
        "data": [{"path": "x"}],
        "global_batch_size": ROWS,
        "workers": {"num_workers": WORLD_SIZE},
        "deepspeed": {"zero_stage": stage},
    }
    return JobSpec.model_validate({"name": "t", "model": model, "train": train})


def resume_on_rank(rank: int, port: int, base: str, folder: str) -> None:
    import torch.distributed as dist

    from ullme_ray.model.two_pass import build_two_pass
    from ullme_ray.train.deepspeed import DeepSpeedEngine
    from ullme_ray.train.step import train_step

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    per_rank = ROWS // WORLD_SIZE
    batch = make_batch(base, ROWS, first=rank * per_rank, stop=(rank + 1) * per_rank)
    found: list[Any] = []

    def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys()
        return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)

    for stage in range(4):
        for dtype, lora in CASES:
            job = make_job(base, stage, dtype, lora)

            def new_engine(job: JobSpec = job) -> DeepSpeedEngine:
                engine = DeepSpeedEngine(build_two_pass(base, job.model, reference="auto", seed=2), job, WORLD_SIZE)
                engine.set_learning_rate(1e-2)
                return engine

            def steps(engine: DeepSpeedEngine, first: int, last: int) -> None:
                for step in range(first, last):
                    train_step(engine, batch, objective("grl"), chunk_size=1, step=step, seed=SEED)

            engine = new_engine()
            steps(engine, 0, 2)
            saved = f"{folder}/{stage}-{dtype}-{lora}"
            engine.save(saved)
            dist.barrier()
            after_two = engine.trained_weights()
            steps(engine, 2, 3)
            after_three = engine.trained_weights()

            resumed = new_engine()
            resumed.load(saved)
            resumed.set_learning_rate(1e-2)
            loaded = difference(resumed.trained_weights(), after_two)
            steps(resumed, 2, 3)
            fresh = new_engine()
            steps(fresh, 2, 3)
            found.append(
                {
                    "case": [stage, dtype, lora],
                    "moved": difference(after_three, after_two),
                    "loaded": loaded,
                    "resumed": difference(resumed.trained_weights(), after_three),
                    "control": difference(fresh.trained_weights(), after_three),
                }
            )
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_resumed_engine_takes_the_same_step(tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(resume_on_rank, args=(port, tiny_base, str(tmp_path)), nprocs=WORLD_SIZE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4 * len(CASES)
    assert [f for f in found if f["loaded"] != 0.0 or f["resumed"] != 0.0] == []
    assert [f for f in found if f["moved"] == 0.0 or f["control"] == 0.0] == [], "the control must fail"
