"""The plan's figures against those of real objects: parameters, memory, steps, units."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.model.adapters import add_lora
from ullme_ray.model.dropout import RowSeeds
from ullme_ray.plan import Plan, make_plan
from ullme_ray.plan.memory import states_per_layer
from ullme_ray.spec import parse_job
from ullme_ray.spec.job import LoraSpec

JOB = """
name: planned
model: {base: BASE, max_tokens: 64}
train:
  data: [{path: pairs.jsonl}]
  global_batch_size: 512
  chunk_size: 8
  max_steps: 100
  warmup_ratio: 0.05
  workers: {num_workers: 16}
"""


def plan_of(base: str, *overrides: str) -> Plan:
    return make_plan(parse_job(JOB.replace("BASE", base).encode(), overrides=overrides))


def test_batch_arithmetic_and_steps_are_written_out() -> None:
    plan = plan_of("scratch")
    assert plan.batch is not None
    assert plan.batch.startswith("global 512 = 16 ranks x 32 queries; chunk 8 -> 4 chunks")
    assert plan.steps == "100 x 512 queries = 51,200; 5 warm-up steps, then cosine from 0.0001; a checkpoint every 50"
    assert plan.batch in plan.to_text()


@pytest.mark.parametrize("overrides", [(), ("model.lora.rank=4",)], ids=["full", "lora"])
def test_parameters_are_those_of_the_loaded_model(tiny_base: str, overrides: tuple[str, ...]) -> None:
    plan = plan_of(tiny_base, *overrides)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    whole = sum(p.numel() for p in model.parameters())
    if not overrides:
        assert (plan.parameters, plan.trainable_parameters) == (whole, whole)
        return
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert len(linear) == 14  # q, k, v, o and the MLP's three, in each of two layers
    adapters = sum(4 * (m.in_features + m.out_features) for m in linear)
    assert (plan.parameters, plan.trainable_parameters) == (whole + adapters, adapters)


def test_parameters_of_scratch_are_those_of_its_shape() -> None:
    plan = plan_of(
        "scratch",
        "model.scratch.hidden_size=32",
        "model.scratch.layers=2",
        "model.scratch.heads=4",
        "model.scratch.vocab_size=300",
    )
    embeddings, attention, mlp, norms = 300 * 32, 4 * 32 * 32, 3 * 32 * 96, 2 * 32
    assert plan.parameters == embeddings + 2 * (attention + mlp + norms) + 32
    assert any("at most 300 tokens" in note for note in plan.notes)


def test_memory_of_each_zero_stage(tiny_base: str) -> None:
    plan = plan_of(tiny_base, "model.dtype=bfloat16", "train.objective=cl")
    assert plan.parameters is not None
    n, shard = plan.parameters, -(-plan.parameters // 16)
    found = [(m.weights, m.gradients, m.optimizer, m.reference) for m in plan.memory]
    assert found == [
        (2 * n, 4 * n, 12 * n, 0),  # gradients are summed in float32
        (2 * n, 4 * n, 12 * shard, 0),
        (2 * n, 4 * n, 12 * shard, 0),  # whole until the one reduction of a step
        (2 * shard, 4 * shard, 12 * shard, 0),
    ]
    offloaded = plan_of(tiny_base, "model.dtype=bfloat16", "train.deepspeed={zero_stage: 2, offload_optimizer: true}")
    assert [m.optimizer for m in offloaded.memory] == [12 * n, 0, 0, 0]


def test_dpo_without_lora_keeps_a_copy_of_the_model(tiny_base: str) -> None:
    full = plan_of(tiny_base, "train.objective=dpo")
    adapted = plan_of(tiny_base, "train.objective=dpo", "model.lora.rank=4")
    assert {m.reference for m in full.memory} == {4 * (full.parameters or 0)}
    assert {m.reference for m in adapted.memory} == {0}


def test_activations_grow_with_the_chunk_and_not_with_the_batch(tiny_base: str) -> None:
    base, chunk, batch = (
        plan_of(tiny_base, *overrides).memory[0].activations
        for overrides in ((), ("train.chunk_size=16",), ("train.global_batch_size=1024",))
    )
    assert chunk == 2 * base
    assert batch == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config], ids=["llama", "qwen3"])
def test_states_kept_for_the_backward_pass_are_as_many_as_planned(
    family: type[PretrainedConfig], lora: bool, dtype: torch.dtype
) -> None:
    """Counted with saved-tensor hooks in real passes: the plan's number is never too low, and less than twice too high."""
    width, mlp = 256, 1024

    def kept(layers: int) -> float:
        config = family(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=width // 4,
            vocab_size=300,
        )
        model, seeds = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), RowSeeds()
        wrapped = (add_lora(model, LoraSpec(rank=4), seeds) if lora else model).to(dtype).train()
        own = {p.untyped_storage().data_ptr() for p in wrapped.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in own:
                saved[place] = tensor.untyped_storage()
            return tensor

        ids = torch.arange(2 * 32).view(2, 32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), seeds.use(torch.arange(2)):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return sum(storage.nbytes() for storage in saved.values()) / ids.numel() / states.element_size()

    per_layer = (kept(3) - kept(1)) / 2
    planned = states_per_layer(width, mlp, lora=lora)
    assert 0.5 * planned < per_layer < planned


def test_units_of_a_corpus_are_counted(tmp_path: Path, tiny_base: str) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(10)))
    plan = plan_of(tiny_base, "train=null", f"embed.input.path={tmp_path}/corpus.jsonl", "embed.rows_per_unit=4")
    assert plan.embed == {"rows": 10, "units": 3, "files": 1}
    assert plan.memory == ()
    assert plan.trainable_parameters == 0
    assert "10 rows, 3 units, 1 files" in plan.to_text()


def test_what_cannot_be_known_yet_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    missing = plan_of(str(tmp_path / "none"), f"embed.input.path={tmp_path}/none.jsonl")
    assert missing.parameters is None
    assert missing.memory == ()
    assert missing.batch is not None  # what can be known is still told
    assert [note.split(":")[0] for note in missing.notes] == ["parameters and memory are unknown", "units to embed"]
    later = plan_of("scratch", "dataset.name=aws_api_docs", "embed.input.path=run:data/corpus.jsonl", f"storage={tmp_path}")
    assert any("once `run` has written the data set" in note for note in later.notes)
    assert not list(tmp_path.iterdir())  # a plan writes nothing


def test_command_prints_text_or_json(tmp_path: Path, tiny_base: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("BASE", tiny_base))
    text = CliRunner().invoke(app, ["plan", str(path)])
    assert text.exit_code == 0
    assert "global 512 = 16 ranks x 32 queries" in text.stdout
    assert "<- this job" in text.stdout
    found = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json", "train.deepspeed.zero_stage=3"]).stdout)
    assert found["zero_stage"] == 3
    assert len(found["memory"]) == 4
    assert found["memory"][0]["optimizer"] > found["memory"][3]["optimizer"]
