"""The gradient is one and the same on 1, 2 and 3 real gloo ranks, under ZeRO 0 to 3, for chunked and whole batches.

The control is plain DeepSpeed: with several backward calls and no boundary set by hand it is silently wrong under ZeRO 1 and 2.
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
from grl_reference import SEED, STEP, make_batch, make_module, objective, plain_gradient, relative_error

from ullme_ray.spec import JobSpec

ROWS = 12  # of the global batch, whatever the number of ranks
CASES = [  # preset, lora, chunk size
    ("grl", True, 2),
    ("grl", False, 5),
    ("cl", False, ROWS),
    ("sft", False, 3),
    ("dpo", True, 1),
]


def make_job(base: str, stage: int, world_size: int, dtype: str = "float32") -> JobSpec:
    train = {
        "data": [{"path": "x"}],
        "global_batch_size": ROWS,
        "workers": {"num_workers": world_size},
        "deepspeed": {"zero_stage": stage},
    }
    return JobSpec.model_validate({"name": "t", "model": {"base": base, "dtype": dtype}, "train": train})


def compare_on_rank(rank: int, world_size: int, port: int, base: str, expected_file: str, result_file: str) -> None:
    import torch.distributed as dist

    from ullme_ray.train.deepspeed import DeepSpeedEngine
    from ullme_ray.train.step import backward_step

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    expected = torch.load(expected_file)
    per_rank = ROWS // world_size
    batch = make_batch(base, ROWS, first=rank * per_rank, stop=(rank + 1) * per_rank)
    errors: list[Any] = []
    for stage in range(4):
        for position, (preset, lora, chunk_size) in enumerate(CASES):
            module = make_module(base, lora=lora)
            engine = DeepSpeedEngine(module, make_job(base, stage, world_size), world_size)
            backward_step(engine, batch, objective(preset), chunk_size=chunk_size, step=STEP, seed=SEED)
            errors.append(["ours", stage, preset, chunk_size, relative_error(engine.full_gradients(), expected[position])])
        module = make_module(base, lora=False).to(torch.bfloat16)
        engine = DeepSpeedEngine(module, make_job(base, stage, world_size, "bfloat16"), world_size)
        backward_step(engine, batch, objective("grl"), chunk_size=2, step=STEP, seed=SEED)
        errors.append(["bfloat16", stage, "grl", 2, relative_error(engine.full_gradients(), expected[1])])
    if world_size == 2:

        class Unaware(DeepSpeedEngine):
            def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
                self._engine.backward(loss)

        for stage in (1, 2):
            module = make_module(base, lora=False)
            engine = Unaware(module, make_job(base, stage, world_size), world_size)
            backward_step(engine, batch, objective("grl"), chunk_size=3, step=STEP, seed=SEED)
            errors.append(["control", stage, "grl", 3, relative_error(engine.full_gradients(), expected[1])])
    if rank == 0:
        Path(result_file).write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def expected_file(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    batch = make_batch(tiny_base, ROWS)
    gradients = [plain_gradient(make_module(tiny_base, lora=lora), batch, objective(preset)) for preset, lora, _ in CASES]
    path = tmp_path_factory.mktemp("expected") / "gradients.pt"
    torch.save(gradients, path)
    return str(path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradient_equals_plain_training_under_every_zero_stage(
    tiny_base: str, expected_file: str, tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = tmp_path / "errors.json"
    mp.spawn(compare_on_rank, args=(world_size, port, tiny_base, expected_file, str(result)), nprocs=world_size)
    errors = json.loads(result.read_text())
    ours = [e for e in errors if e[0] == "ours"]
    assert len(ours) == 4 * len(CASES)
    assert [e for e in ours if e[-1] > 1e-5] == []
    bfloat16 = [e for e in errors if e[0] == "bfloat16"]
    assert len(bfloat16) == 4
    assert [e for e in bfloat16 if e[-1] > 2e-2] == []  # rounding; the controls below are far beyond it
    controls = [e for e in errors if e[0] == "control"]
    assert len(controls) == (2 if world_size == 2 else 0)
    assert all(e[-1] > 5e-2 for e in controls), controls
