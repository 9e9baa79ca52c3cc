"""The gradient is one and the same on 1, 2 and 3 real gloo ranks, under ZeRO 0 to 3, for chunked and whole batches.

Two ranks run every case under every stage; one and three ranks run every case once, under the stages in turn.

The control is plain DeepSpeed: with several backward calls and no boundary set by hand it is silently wrong under ZeRO 1 and 2.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import run_ranks
from grl_reference import CASES, SEED, STEP, case_module, make_batch, objective, plain_gradient, relative_error

from ullme_ray.model.backbone import DTYPES
from ullme_ray.spec import JobSpec

ROWS = 12  # of the global batch, whatever the number of ranks
CHUNK_SIZES = dict(zip(CASES, [ROWS, 1, 3, 5, 2, 1, 3, 2, 5, 4, 3, 2, 5], strict=True))  # all kinds, over the cases


def make_job(base: str, stage: int, world_size: int, dtype: str = "float32", **deepspeed: bool) -> JobSpec:
    train = {
        "data": [{"path": "x"}],
        "global_batch_size": ROWS,
        "workers": {"num_workers": world_size},
        "deepspeed": {"zero_stage": stage, **deepspeed},
    }
    return JobSpec.model_validate({"name": "t", "model": {"base": base, "dtype": dtype}, "train": train})


def compare_on_rank(rank: int, world_size: int, port: int, base: str, expected_file: str, result_file: str) -> None:
    import torch.distributed as dist

    from ullme_ray.train.deepspeed import DeepSpeedEngine
    from ullme_ray.train.open_engine import open_engine
    from ullme_ray.train.step import backward_step

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    expected = torch.load(expected_file)
    per_rank = ROWS // world_size
    batch = make_batch(base, ROWS, first=rank * per_rank, stop=(rank + 1) * per_rank)
    errors: list[Any] = []

    def compare(label: str, case: str, job: JobSpec, make_engine: Any = open_engine, chunk_size: int | None = None) -> None:
        module = case_module(base, case).to(DTYPES[job.model.dtype])
        engine = make_engine(module, job, world_size)
        spec = objective(case)
        own = batch if spec.reference == "precomputed" else replace(batch, reference_logps=None)
        backward_step(engine, own, spec, chunk_size=chunk_size or CHUNK_SIZES[case], step=STEP, seed=SEED)
        error = relative_error(engine.full_gradients(), expected[case])
        errors.append([label, job.train.deepspeed.zero_stage, case, error])

    for stage in range(4):
        for number, case in enumerate(CASES):
            if world_size == 2 or number % 4 == stage:
                compare("ours", case, make_job(base, stage, world_size))
        compare("bfloat16", "dpo-frozen-copy", make_job(base, stage, world_size, "bfloat16"), chunk_size=2)
    if world_size == 2:
        for stage in range(4):
            sent = []
            for chunk_size in (ROWS, 1):
                with counted_reductions() as numbers:
                    compare("reduced", "grl", make_job(base, stage, world_size), chunk_size=chunk_size)
                errors.pop()
                sent.append(sum(numbers))
            errors.append(["reduced", stage, "grl", sent[1] / sent[0]])
        for stage, offload in [(1, {"offload_optimizer": True}), (2, {"offload_optimizer": True})]:
            compare("ours", "grl", make_job(base, stage, world_size, **offload))
        compare("ours", "grl", make_job(base, 3, world_size, offload_optimizer=True, offload_parameters=True))

        class Unaware(DeepSpeedEngine):
            def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
                self._engine.backward(loss)

        for stage in (1, 2):
            with counted_reductions() as numbers:
                compare("control", "dpo-frozen-copy", make_job(base, stage, world_size), Unaware, chunk_size=1)
            with counted_reductions() as once:
                compare("ours", "dpo-frozen-copy", make_job(base, stage, world_size), chunk_size=1)
            errors.append(["reduced control", stage, "dpo-frozen-copy", sum(numbers) / sum(once)])
    if rank == 0:
        Path(result_file).write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """How many numbers each collective sums that runs inside."""
    import torch.distributed as dist

    numbers: list[int] = []
    names = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")
    plain = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            numbers.append(tensor.numel())
            return plain[name](tensor, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield numbers
    finally:
        for name in names:
            setattr(dist, name, plain[name])


@pytest.fixture(scope="module")
def expected_file(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    batch = make_batch(tiny_base, ROWS)
    gradients = {}
    for case in CASES:
        own = batch if objective(case).reference == "precomputed" else replace(batch, reference_logps=None)
        gradients[case] = plain_gradient(case_module(tiny_base, case), own, objective(case))
    path = tmp_path_factory.mktemp("expected") / "gradients.pt"
    torch.save(gradients, path)
    return str(path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradient_equals_plain_training_under_every_zero_stage(
    tiny_base: str, expected_file: str, tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = tmp_path / "errors.json"
    run_ranks(compare_on_rank, world_size, tiny_base, expected_file, str(result))
    errors = json.loads(result.read_text())
    ours = [e for e in errors if e[0] == "ours"]
    assert len(ours) == (4 * len(CASES) + 5 if world_size == 2 else len(CASES))
    assert [e for e in ours if e[-1] > 1e-5] == []
    bfloat16 = [e for e in errors if e[0] == "bfloat16"]
    assert len(bfloat16) == 4
    assert [e for e in bfloat16 if e[-1] > 2e-2] == []  # rounding; the controls below are far beyond it
    reduced = [e for e in errors if e[0] == "reduced"]
    assert len(reduced) == (4 if world_size == 2 else 0)
    assert [e for e in reduced if abs(e[-1] - 1) > 1e-3] == [], "one reduction a step, however many chunks"
    assert all(e[-1] > 2 for e in errors if e[0] == "reduced control")
    controls = [e for e in errors if e[0] == "control"]
    assert len(controls) == (2 if world_size == 2 else 0)
    assert all(e[-1] > 5e-2 for e in controls), controls
