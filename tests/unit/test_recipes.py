"""The job files in jobs/: all valid; the recipes fit the GPUs that they name, planned from their models' published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.plan import Plan, make_plan
from ullme_ray.spec import parse_job

JOBS = Path(__file__).parents[2] / "jobs"
# Of each model's config.json on the Hugging Face hub: the fields that decide its shape, and no others.
SHAPES = json.loads((Path(__file__).parent / "family_shapes.json").read_text())
RECIPES = {
    "llama3_8b_grl": ("Meta-Llama-3-8B-Instruct", 8_030_261_248),
    "mistral_7b_grl": ("Mistral-7B-Instruct-v0.2", 7_241_732_096),
    "phi_1_5_grl": ("phi-1_5", 1_418_270_720),
    "qwen3_0_6b_grl": ("Qwen3-0.6B", 596_049_920),
    "qwen3_4b_grl": ("Qwen3-4B", 4_022_468_096),
}
PUBLISHED = ("llama3_8b_grl", "mistral_7b_grl", "phi_1_5_grl")


def plan_of(recipe: str, folder: Path, *overrides: str) -> Plan:
    """The plan of a recipe; of its model only the config is there, and nothing is fetched."""
    (folder / "config.json").write_text(json.dumps(SHAPES[RECIPES[recipe][0]]))
    content = (JOBS / f"{recipe}.yaml").read_bytes()
    return make_plan(parse_job(content, overrides=(f"model.base={folder}", "model.hub_token=null", *overrides)))


def test_every_job_file_is_valid() -> None:
    files = sorted(JOBS.glob("*.yaml"))
    assert {*RECIPES, "quickstart", "smollm2_grl"} <= {file.stem for file in files}
    for file in files:
        result = CliRunner().invoke(app, ["check", str(file)])
        assert result.exit_code == 0, f"{file.name}: {result.output}"
    assert CliRunner().invoke(app, ["check", str(files[0]), "train.max_steps=none"]).exit_code != 0  # the control


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_gpus(recipe: str, tmp_path: Path) -> None:
    plan = plan_of(recipe, tmp_path)
    whole = RECIPES[recipe][1]
    assert plan.parameters is not None
    assert plan.trainable_parameters is not None
    assert plan.parameters - plan.trainable_parameters == whole  # as published: the shape is the real model's
    assert 0.002 < plan.trainable_parameters / whole < 0.06
    assert plan.verdict is not None
    assert plan.verdict.startswith("fits ")
    assert plan.verdict in plan.to_text()


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_published_recipe_is_the_published_one(recipe: str) -> None:
    job = parse_job((JOBS / f"{recipe}.yaml").read_bytes())
    train, lora = job.train, job.model.lora
    assert train is not None
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.adapters) == (16, 32, 0.1, "separate")
    assert (train.global_batch_size, train.max_steps, train.workers.num_workers) == (512, 500, 4)
    assert (train.positives_per_query, train.negatives_per_query, job.model.max_tokens) == (1, 1, 512)
    assert (train.weight_decay, train.max_grad_norm, train.lr_schedule, train.warmup_steps) == (0.0, 0.0, "cosine", 50)
    assert train.learning_rate == (1e-4 if recipe == "phi_1_5_grl" else 2e-4)
    objective = train.objective
    assert (objective.preset, objective.generation, objective.dpo_beta) == ("grl", "dpo", 0.1)
    assert (objective.contrastive_weight, objective.generation_weight, objective.alignment_weight) == (1.0, 0.5, 1.0)


def test_what_does_not_fit_is_told_with_a_way_out(tmp_path: Path) -> None:
    full = ("model.lora=null", "train.objective=cl", "train.chunk_size=2")
    plan = plan_of("llama3_8b_grl", tmp_path, *full, "train.deepspeed.zero_stage=0")
    assert plan.memory[0].total > 130 * 2**30  # 8 billion x (2 weights + 4 gradients + 12 optimizer)
    assert plan.verdict == "does not fit 80 GB under ZeRO 0; ZeRO 1, 2, 3 would: set train.deepspeed.zero_stage"
    sharded = plan_of("llama3_8b_grl", tmp_path, *full, "train.deepspeed.zero_stage=3")
    assert sharded.verdict == "fits 80 GB: ZeRO 1, 2, 3"
    smaller = plan_of("llama3_8b_grl", tmp_path, *full, "train.deepspeed.zero_stage=1", "train.workers.gpu_memory_gb=48")
    assert smaller.verdict == "does not fit 48 GB under ZeRO 1; ZeRO 3 would: set train.deepspeed.zero_stage"
    wide = plan_of("llama3_8b_grl", tmp_path, "train.chunk_size=128", "train.gradient_checkpointing=false")
    assert wide.verdict is not None
    assert "with train.gradient_checkpointing: true, train.chunk_size: " in wide.verdict
    hopeless = plan_of("llama3_8b_grl", tmp_path, *full, "train.workers.num_workers=1", "train.deepspeed.zero_stage=0")
    assert hopeless.verdict is not None
    assert "use more workers with ZeRO 3" in hopeless.verdict
    assert plan_of("llama3_8b_grl", tmp_path, "train.workers.gpu_memory_gb=null").verdict is None


def test_logits_dominate_a_wide_chunk(tmp_path: Path) -> None:
    """Generation's float32 logits over 128,256 tokens: leave them out, and the chunk costs a fraction."""
    grl, cl = (
        plan_of("llama3_8b_grl", tmp_path, f"train.objective={objective}", "model.lora.adapters=shared").memory[0].activations
        for objective in ("grl", "cl")
    )
    logits = 16 * 2 * 512 * 128_256 * 14
    assert grl - cl > logits
    assert logits / grl > 0.5


def test_quantized_weights_take_a_third(tmp_path: Path) -> None:
    plain = plan_of("llama3_8b_grl", tmp_path).memory[1].weights
    assert 0.3 < plan_of("llama3_8b_grl", tmp_path, "model.lora.quantize_base=nf4").memory[1].weights / plain < 0.4
