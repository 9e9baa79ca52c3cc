"""A checkpoint holds all that a step depends on, for any number of ranks: ZeRO 0 to 3, fp32 and bf16, LoRA and full, on gloo.

Three steps in one go on two ranks, and two steps, a checkpoint, and the third step on one, two or three ranks under the next
ZeRO stage, give the same weights: bit by bit where ranks and stage stay. The control takes the third step without the
checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_ranks
from grl_reference import SEED, make_batch, objective

from ullme_ray.spec import JobSpec

ROWS = 6
CASES = [("float32", "separate"), ("float32", "full"), ("bfloat16", "shared"), ("bfloat16", "full")]


def cases_of(stage: int) -> list[tuple[str, str]]:
    """Two of the four, so that each comes under two stages."""
    return [CASES[stage % 2], CASES[2 + stage // 2]]


def make_job(base: str, folder: str, stage: int, dtype: str, kind: str) -> JobSpec:
    lora = None if kind == "full" else {"rank": 4, "alpha": 8, "dropout": 0.3, "adapters": kind}
    return JobSpec.model_validate(
        {
            "name": f"{dtype}-{kind}",
            "storage": folder,
            "model": {"base": base, "dtype": dtype, "max_tokens": 64, "lora": lora},
            "train": {
                "data": [{"path": "x"}],
                "global_batch_size": ROWS,
                "learning_rate": 1e-2,
                "max_grad_norm": 0.5,
                "deepspeed": {"zero_stage": stage},
            },
        }
    )


def steps_on_rank(rank: int, world_size: int, port: int, base: str, folder: str, phase: str) -> None:
    """`save`: three steps, a checkpoint after the second. `resume`: the third from the checkpoint. `control`: without it."""
    import torch.distributed as dist

    from ullme_ray.model.two_pass import build_two_pass
    from ullme_ray.train.checkpoint import TrainState, open_checkpoint, restore_state, restore_weights, save_checkpoint
    from ullme_ray.train.engine import Engine
    from ullme_ray.train.open_engine import open_engine
    from ullme_ray.train.step import train_step

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    per_rank = ROWS // world_size
    batch = make_batch(base, ROWS, first=rank * per_rank, stop=(rank + 1) * per_rank)
    batch = replace(batch, reference_logps=None)

    def keep(engine: Engine, job: JobSpec, stage: int, moment: str) -> None:
        weights = engine.trained_weights()
        if rank == 0:
            torch.save(weights, f"{folder}/{stage}/{job.name}.{moment}.pt")

    for stage in range(4):
        for dtype, kind in cases_of(stage):
            # The next stage reads what this one wrote, but for two ranks, which show that nothing at all is lost.
            job = make_job(base, f"{folder}/{stage}", stage if world_size == 2 else (stage + 1) % 4, dtype, kind)
            module = build_two_pass(base, job.model, reference="auto", seed=2)
            reader = open_checkpoint(job) if phase == "resume" else None
            if reader is not None:
                assert reader.progress == TrainState(step=2, validations=((2, 0.25),), data="rows")
                restore_weights(module, reader)
            engine = open_engine(module, job, world_size)
            if reader is not None:
                restore_state(engine, reader)
                keep(engine, job, stage, f"loaded{world_size}")
            for step in range(0 if phase == "save" else 2, 3):
                if phase == "save" and step == 2:
                    save_checkpoint(engine, job, TrainState(step=2, validations=((2, 0.25),), data="rows"))
                    keep(engine, job, stage, "saved")
                engine.set_learning_rate(1e-2)
                train_step(engine, batch, objective("grl"), chunk_size=2, step=step, seed=SEED)
            keep(engine, job, stage, f"{phase}{world_size}")
    dist.barrier()
    dist.destroy_process_group()


def test_a_run_goes_on_from_its_checkpoint_on_any_number_of_ranks(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_ranks(steps_on_rank, 2, tiny_base, str(tmp_path), "save")
    for world_size in (1, 2, 3):
        run_ranks(steps_on_rank, world_size, tiny_base, str(tmp_path), "resume")
    run_ranks(steps_on_rank, 2, tiny_base, str(tmp_path), "control")
    seen = 0
    for stage in range(4):
        for dtype, kind in cases_of(stage):

            def difference(one: str, other: str, stage: int = stage, dtype: str = dtype, kind: str = kind) -> float:
                a, b = (torch.load(f"{tmp_path}/{stage}/{dtype}-{kind}.{moment}.pt") for moment in (one, other))
                assert a.keys() == b.keys()
                norm = sum(float(w.pow(2).sum()) for w in a.values())
                return (sum(float((a[n] - b[n]).pow(2).sum()) for n in a) / norm) ** 0.5

            case = (stage, dtype, kind)
            for world_size in (1, 2, 3):  # master weights come back bit by bit, whoever reads them
                assert difference("saved", f"loaded{world_size}") == 0.0, (case, world_size)
            assert difference("save2", "resume2") == 0.0, case
            if dtype == "float32":  # bfloat16 rounds otherwise in batches of another shape
                assert difference("save2", "resume1") < 1e-5, case
                assert difference("save2", "resume3") < 1e-5, case
            assert difference("save2", "control2") > 1e-3, "the control must fail"
            seen += 1
    assert seen == 8
