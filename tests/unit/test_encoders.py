"""Encoder-only and encoder-decoder families: tiny random models, loaded, trained and exported as a user's would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grl_reference import SEED, STEP, PlainEngine, gradient, make_batch, objective, plain_gradient, relative_error
from tiny_encoders import FAMILIES, SHAPE, save_encoder

from ullme_ray.errors import ModelError
from ullme_ray.model import check_base, open_encoder
from ullme_ray.model.adapters import merge_lora
from ullme_ray.model.backbone import load_backbone
from ullme_ray.model.encode import encode_batch, pad_batch
from ullme_ray.model.export import export_encoder
from ullme_ray.model.family import kind_of, position_limit
from ullme_ray.model.two_pass import build_two_pass
from ullme_ray.plan import make_plan
from ullme_ray.spec import JobSpec
from ullme_ray.spec.job import LoraSpec, ModelSpec
from ullme_ray.train.step import backward_step

TRAINED = ("xlm-roberta", "bert", "modernbert", "mt5")
TEXTS = ["make a bucket private", "a", "deletes the public access policy of a bucket, the key and the object", "list " * 30]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: save_encoder(family, str(tmp_path_factory.mktemp(family))) for family in FAMILIES}


def make_job(base: str, *, objective: object = None, max_generation_tokens: int | None = None, **model: object) -> JobSpec:
    settings = {"base": base, "max_tokens": 64, "prompts": {"query": "Find the answer:\n", "passage": "Text:\n"}, **model}
    train = {"data": [{"path": "x"}], "objective": objective, "max_generation_tokens": max_generation_tokens}
    stages = {"train": train} if objective else {"embed": {"input": {"path": "x"}}}
    return JobSpec.model_validate({"name": "t", "model": settings, **stages})


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_embeds_alike_in_any_batch(family: str, bases: dict[str, str]) -> None:
    backbone = load_backbone(bases[family], ModelSpec(base="x"))
    assert kind_of(backbone.config) == FAMILIES[family][1]
    ids = [[0, 36, 7, 8, 9, 10, 2], [0, 12, 2], [0, 14, 1, 16, 2]]  # the last text holds the padding token as a word
    for pooling in ("mean", "lasttoken"):
        with torch.inference_mode():
            together = encode_batch(backbone, pad_batch(ids, 0, 1), pooling)
            filled = encode_batch(backbone, pad_batch([*ids, [5] * 40], 0, 1), pooling)[:3]
            other_filler = encode_batch(backbone, pad_batch(ids, 0, 99), pooling)
            alone = torch.cat([encode_batch(backbone, pad_batch([row], 0, 1), pooling) for row in ids])
            # the control: an unmasked padding token changes the vector
            unmasked = encode_batch(backbone, pad_batch([[*row, 1, 1, 1] for row in ids], 0, 1), pooling)
        for other in (together, filled, other_filler):
            assert (alone * other).sum(dim=1).min() >= 0.999999
        assert (alone * unmasked).sum(dim=1).min() < 0.9999


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_export_of_an_encoder_gives_equal_vectors_in_sentence_transformers(
    family: str, pooling: str, bases: dict[str, str], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    job = make_job(bases[family], pooling=pooling)
    before = open_encoder(job, device="cpu")
    module = build_two_pass(bases[family], job.model, reference="none")
    folder = str(tmp_path / "model")
    exported = export_encoder(merge_lora(module.lm).base_model, before.tokenizer.hf, job, folder, training={"steps": 0})
    st = SentenceTransformer(folder, device="cpu")
    reopened = open_encoder(make_job(folder, pooling=pooling), device="cpu")
    for prompt in ("query", "passage"):
        ours = before.encode(TEXTS, prompt)  # type: ignore[arg-type]
        assert (ours * exported.encode(TEXTS, prompt)).sum(axis=1).min() >= 0.999999  # type: ignore[arg-type]
        assert (ours * reopened.encode(TEXTS, prompt)).sum(axis=1).min() >= 0.999999  # type: ignore[arg-type]
        assert (ours * st.encode(TEXTS, prompt_name=prompt)).sum(axis=1).min() >= 0.999999
    assert (before.encode(TEXTS, "query") * st.encode(TEXTS, prompt_name="passage")).sum(axis=1).min() < 0.999
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"made from the {FAMILIES[family][1]} " in card
    assert "is_causal" not in card


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", TRAINED)
def test_gradient_of_an_encoder_is_that_of_plain_training(family: str, lora: bool, bases: dict[str, str]) -> None:
    batch, spec = make_batch(bases[family]), objective("cl")
    model = ModelSpec(base="x", max_tokens=64, lora=LoraSpec(rank=4, alpha=8, dropout=0.3) if lora else None)

    def build(checkpointing: bool = False) -> Any:
        module = build_two_pass(bases[family], model, reference="none", gradient_checkpointing=checkpointing, seed=2)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        return module

    module = build()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    expected = plain_gradient(module, batch, spec, generate=False)
    assert set(expected) == trained, "every trained weight gets a gradient"
    for chunk_size, checkpointing in ((1, False), (3, True)):
        other = build(checkpointing)
        backward_step(PlainEngine(other), batch, spec, chunk_size=chunk_size, step=STEP, seed=SEED)
        assert relative_error(gradient(other), expected) <= 1e-5
    other = build()
    backward_step(PlainEngine(other, forget=True), batch, spec, chunk_size=3, step=STEP, seed=SEED)
    assert relative_error(gradient(other), expected) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_objectives_that_generate_are_refused_by_name(family: str, bases: dict[str, str]) -> None:
    for preset in ("sft", "dpo", "grl", "genc"):
        with pytest.raises(
            ModelError, match=rf"objective = {preset} \(.*\) needs a model that generates.*{family}.*objective cl"
        ):
            check_base(make_job(bases[family], objective=preset))
    check_base(make_job(bases[family], objective="cl"))
    check_base(make_job(bases[family], objective={"preset": "cl", "distill_weight": 1.0}))


def test_causal_attention_of_an_encoder_is_refused(bases: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"model\.bidirectional = false, but .* always attends both ways"):
        check_base(make_job(next(iter(bases.values())), bidirectional=False))


def test_encoder_decoder_without_a_loadable_encoder_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64)
    BartModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"bart is an encoder-decoder whose encoder .* cannot load alone; use one of .*t5"):
        check_base(make_job(str(tmp_path)))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_longer_than_the_positions_are_refused(family: str, bases: dict[str, str]) -> None:
    limit = FAMILIES[family][2]
    if limit is None:
        check_base(make_job(bases[family], max_tokens=100_000))
        return
    job = make_job(bases[family], max_tokens=limit)
    check_base(job)
    vectors = open_encoder(job, device="cpu").encode(["list " * 400])  # as long as allowed: every position has its row
    assert vectors.shape == (1, 32)
    for refuse in (check_base, open_encoder):
        with pytest.raises(ModelError, match=rf"model\.max_tokens = {limit + 1}, but .* reach {limit} tokens"):
            refuse(make_job(bases[family], max_tokens=limit + 1))


def test_generation_longer_than_the_positions_is_refused(tiny_base: str) -> None:
    check_base(make_job(tiny_base, objective="grl", max_tokens=128, max_generation_tokens=512))
    with pytest.raises(ModelError, match=r"train\.max_generation_tokens = 513, but .* reach 512 tokens"):
        check_base(make_job(tiny_base, objective="grl", max_tokens=129, max_generation_tokens=513))


def test_stretched_rotary_positions_reach_as_far_as_the_config_says() -> None:
    from transformers import LlamaConfig

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    assert position_limit(LlamaConfig(max_position_embeddings=64)) == 64
    assert position_limit(LlamaConfig(max_position_embeddings=64, rope_parameters=yarn)) == 256
    assert position_limit(LlamaConfig(max_position_embeddings=256, rope_parameters=yarn)) == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_counts_an_encoder(family: str, bases: dict[str, str]) -> None:
    plan = make_plan(make_job(bases[family], objective="cl"))
    module = build_two_pass(bases[family], ModelSpec(base="x"), reference="none")
    assert plan.parameters == sum(p.numel() for p in module.parameters())
    assert plan.memory


def test_gemma_made_bidirectional_is_an_encoder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    shape = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = AutoConfig.for_model("gemma3_text", **shape, use_bidirectional_attention=True)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_bidirectional_attention"] is True
    assert kind_of(load_backbone(str(tmp_path), ModelSpec(base="x")).config) == "encoder"
