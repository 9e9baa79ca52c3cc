"""What only a GPU can show: attention without padding in bfloat16, memory that runs out, ZeRO on CUDA, QLoRA.

`pytest -v -s tests/gpu` on a machine with one GPU that nothing else uses; -s shows each case as it comes. Without a GPU
every test here is skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from grl_reference import CASES, SEED, STEP, case_module, make_batch, objective, plain_gradient, relative_error

from ullme_ray.model import Tokens
from ullme_ray.model.budget import TokenBudget
from ullme_ray.model.encoder import EncoderSettings, load_encoder
from ullme_ray.model.packed import Packing
from ullme_ray.spec import JobSpec
from ullme_ray.spec.job import ModelSpec, ScratchSpec, Unpadded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 128, 128, 7, 7, 64, 100)


@pytest.fixture(scope="module")
def medium_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder of 4 layers x 512, whose heads of 64 are what real ones have."""
    from ullme_ray.model.scratch import build_scratch

    folder = str(tmp_path_factory.mktemp("medium"))
    shape = ScratchSpec(hidden_size=512, layers=4, heads=8, vocab_size=400)
    build_scratch(["a bucket holds objects"] * 4, shape, max_tokens=512, seed=3, folder=folder)
    return folder


def encoder(base: str, dtype: str, device: str, unpadded: Unpadded = "auto") -> Any:
    model = ModelSpec.model_validate({"base": base, "max_tokens": 512, "dtype": dtype})
    return load_encoder(base, EncoderSettings.of(model), model, device=device, unpadded=unpadded)


def random_tokens(lengths: tuple[int, ...]) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return Tokens(ids, 0, [False] * len(ids))


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(axis=1).min())


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.999999), ("bfloat16", 0.999)])
def test_vectors_agree_packed_padded_and_in_any_company(medium_base: str, dtype: str, limit: float) -> None:
    tokens = random_tokens(LENGTHS)
    exact = encoder(medium_base, "float32", "cpu", "off").embed_tokens(tokens)
    packed, padded = encoder(medium_base, dtype, "cuda"), encoder(medium_base, dtype, "cuda", "off")
    assert isinstance(packed.packing, Packing)
    assert padded.packing is None
    together = packed.embed_tokens(tokens)
    assert lowest_cosine(together, exact) >= limit
    assert lowest_cosine(together, padded.embed_tokens(tokens)) >= limit
    for budget in (1, 64, 300):  # alone, and in batches of other texts
        assert lowest_cosine(together, packed.embed_tokens(tokens, tokens_per_batch=budget)) >= limit
    shifted = replace(tokens, input_ids=[*tokens.input_ids[1:], tokens.input_ids[0]])
    assert lowest_cosine(np.roll(together, -1, axis=0), packed.embed_tokens(shifted)) >= limit


def test_memory_that_runs_out_halves_the_budget_and_loses_no_row(medium_base: str) -> None:
    model = encoder(medium_base, "bfloat16", "cuda")
    tokens = random_tokens((256,) * 2048)  # 2^19 in all
    few = replace(tokens, input_ids=tokens.input_ids[:64], truncated=tokens.truncated[:64])  # 2^14 of them
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.embed_tokens(few, tokens_per_batch=2**14)
    per_token = (torch.cuda.max_memory_allocated() - before) / 2**14
    wanted = model.embed_tokens(tokens, tokens_per_batch=2**13)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Room for 2^17 tokens beside the model: too little for the 2^19 that come first, twice what 2^16 need.
    room = torch.cuda.memory_reserved() + 2**17 * per_token
    print(
        f"{per_token:,.0f} bytes a token, {room / 2**30:.2f} GiB of room, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free"
    )
    assert torch.cuda.mem_get_info()[0] > 2 * room, "other processes hold this GPU's memory"
    torch.cuda.set_per_process_memory_fraction(room / total)
    budget = TokenBudget(2**20)
    try:
        found = model.embed_tokens(tokens, tokens_per_batch=budget)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"budget {budget.tokens:,}, lowest cosine {lowest_cosine(found, wanted):.6f}")
    assert 2**16 <= budget.tokens <= 2**18
    # Batches of another size round otherwise, in bfloat16 by nearly 1e-4 over so many texts; no text is nearer to another's.
    assert lowest_cosine(found, wanted) >= 0.999
    assert ((found @ wanted.T).argmax(axis=1) == np.arange(len(wanted))).all()


def make_job(base: str, stage: int, dtype: str = "float32", **deepspeed: bool) -> JobSpec:
    train = {
        "data": [{"path": "x"}],
        "global_batch_size": 12,
        "workers": {"gpus_per_worker": 1},
        "deepspeed": {"zero_stage": stage, **deepspeed},
    }
    return JobSpec.model_validate({"name": "t", "model": {"base": base, "dtype": dtype}, "train": train})


def compare_gradients(_: int, base: str, result_file: str) -> None:
    import torch.distributed as dist

    from ullme_ray.model.backbone import DTYPES
    from ullme_ray.train.open_engine import open_engine
    from ullme_ray.train.step import backward_step

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    whole = make_batch(base, 12)
    on_gpu = whole.to(torch.device("cuda"))
    errors: list[Any] = []
    for number, case in enumerate(CASES):
        spec = objective(case)
        known = spec.reference == "precomputed"
        cpu = whole if known else replace(whole, reference_logps=None)
        batch = on_gpu if known else replace(on_gpu, reference_logps=None)
        expected = plain_gradient(case_module(base, case), cpu, spec)
        settings: list[dict[str, Any]] = [{"stage": stage} for stage in range(4)]
        if case == "grl":
            settings += [{"stage": 1, "offload_optimizer": True}, {"stage": 2, "offload_optimizer": True}]
            settings += [{"stage": 3, "offload_optimizer": True, "offload_parameters": True}]
            settings += [{"stage": stage, "dtype": "bfloat16"} for stage in range(4)]
        for setting in settings:
            job = make_job(base, **setting)
            module = case_module(base, case, checkpointing=number % 2 == 1).to(DTYPES[job.model.dtype])
            engine = open_engine(module, job, 1)
            backward_step(engine, batch, spec, chunk_size=(12, 1, 5)[number % 3], step=STEP, seed=SEED)
            found = {name: gradient.cpu() for name, gradient in engine.full_gradients().items()}
            errors.append([case, setting, relative_error(found, expected)])
            print(f"{case}, {setting}: relative error {errors[-1][-1]:.1e}", flush=True)
    Path(result_file).write_text(json.dumps(errors))
    dist.destroy_process_group()


def test_gradient_on_the_gpu_equals_plain_training_on_the_cpu(tiny_base: str, tmp_path: Path) -> None:
    result = tmp_path / "errors.json"
    mp.spawn(compare_gradients, args=(tiny_base, str(result)), nprocs=1)
    errors = json.loads(result.read_text())
    exact = [error for _, setting, error in errors if "dtype" not in setting]
    rounded = [error for _, setting, error in errors if "dtype" in setting]
    assert len(exact) == 4 * len(CASES) + 3
    assert len(rounded) == 4
    print(f"largest relative error: float32 {max(exact):.1e}, bfloat16 {max(rounded):.1e}")
    assert max(exact) <= 1e-5, [e for e in errors if e[-1] > 1e-5]
    assert max(rounded) <= 5e-2, [e for e in errors if "dtype" in e[1]]


def test_qlora_trains_on_a_base_of_four_bits(medium_base: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    from ullme_ray.model.two_pass import build_two_pass
    from ullme_ray.train.open_engine import open_engine
    from ullme_ray.train.step import train_step

    model = {
        "base": medium_base,
        "max_tokens": 64,
        "dtype": "bfloat16",
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "quantize_base": "nf4"},
    }
    job = make_job(medium_base, 0)
    job = job.model_copy(update={"model": ModelSpec.model_validate(model)})
    module = build_two_pass(medium_base, job.model, reference="adapter_off", seed=1)
    linear = [m for m in module.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 7 * 4
    engine = open_engine(module, job, 1)
    engine.set_learning_rate(1e-3)
    batch = make_batch(medium_base, 12).to(torch.device("cuda"))
    batch = replace(batch, reference_logps=None)
    spec = objective("grl")
    losses = [train_step(engine, batch, spec, chunk_size=5, step=0, seed=SEED).loss for _ in range(12)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
