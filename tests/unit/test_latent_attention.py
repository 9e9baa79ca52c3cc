"""NV-Embed's pooling: against a plain computation, in training, through checkpoint weights and export to other readers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grl_reference import SEED, STEP, PlainEngine, gradient, make_batch, objective, plain_gradient, relative_error, stir
from test_encoder import TEXTS, make_encoder, make_job

from ullme_ray.errors import ModelError
from ullme_ray.model import encoder_fingerprint, open_encoder
from ullme_ray.model.adapters import merge_lora
from ullme_ray.model.export import export_encoder
from ullme_ray.model.latent_attention import FOLDER, LatentAttention
from ullme_ray.model.two_pass import TwoPassModel, build_two_pass
from ullme_ray.parity import min_cosine
from ullme_ray.plan import make_plan
from ullme_ray.spec import JobSpec
from ullme_ray.spec.job import LoraSpec, ModelSpec
from ullme_ray.train.step import backward_step

LATENT: dict[str, Any] = {"pooling": "latent_attention", "latent_attention": {"latents": 5, "heads": 4}}


def make_module(base: str, *, lora: bool = False, checkpointing: bool = False, trained: bool = True) -> TwoPassModel:
    spec = LoraSpec(rank=4, alpha=8, dropout=0.3) if lora else None
    model = ModelSpec.model_validate({"base": base, "max_tokens": 64, "lora": spec, **LATENT})
    module = build_two_pass(base, model, reference="auto", gradient_checkpointing=checkpointing, seed=2)
    if trained:
        stir(module.head)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module


def test_states_are_those_of_a_plain_float64_computation() -> None:
    head = LatentAttention(12, 5, 3).reset(0)
    stir(head)
    states = torch.randn(2, 4, 12)
    with torch.no_grad():
        got = head(states).double().numpy()
    w = {name: p.detach().double().numpy() for name, p in head.named_parameters()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    memory = norm(w["latents"], "latent_norm") @ w["key_value.weight"].T
    keys, values = memory[:, :12], memory[:, 12:]
    for row in range(2):
        for token in range(4):
            x = states[row, token].double().numpy()
            query = w["query.weight"] @ norm(x, "query_norm")
            answer = np.zeros(12)
            for h in range(3):
                own = slice(4 * h, 4 * h + 4)
                scores = np.exp(keys[:, own] @ query[own] / 2.0)
                answer[own] = (scores / scores.sum()) @ values[:, own]
            x = x + w["attention_out.weight"] @ answer
            inner = w["mlp_in.weight"] @ norm(x, "mlp_norm") + w["mlp_in.bias"]
            gelu = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in inner])
            expected = x + w["mlp_out.weight"] @ gelu + w["mlp_out.bias"]
            np.testing.assert_allclose(got[row, token], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(got - states.numpy()).max() > 0.1


def test_training_starts_from_mean_pooling_and_the_seed_decides_the_rest(tiny_base: str) -> None:
    batch = make_batch(tiny_base)
    seeds = (batch.rows, batch.rows.repeat_interleave(batch.num_passages), batch.rows)
    fresh = make_module(tiny_base, trained=False).eval()
    mean = build_two_pass(tiny_base, ModelSpec(base="x"), reference="none").eval()
    with torch.no_grad():
        one, other = (m(batch.queries, batch.passages, seeds=seeds)[0] for m in (fresh, mean))
        torch.testing.assert_close(one, other)
        moved = make_module(tiny_base).eval()(batch.queries, batch.passages, seeds=seeds)[0]
    assert (one * moved).sum(dim=1).max() < 0.999
    again, different = LatentAttention(32, 5, 4).reset(2), LatentAttention(32, 5, 4).reset(3)
    assert torch.equal(again.latents, fresh.head.latents)
    assert not torch.equal(different.latents, fresh.head.latents)


@pytest.mark.parametrize("lora", [True, False], ids=["lora-dropout", "full"])
@pytest.mark.parametrize("preset", ["cl", "grl"])
def test_gradient_is_that_of_plain_training_for_every_chunk_size(tiny_base: str, preset: str, lora: bool) -> None:
    batch, spec = replace(make_batch(tiny_base), reference_logps=None), objective(preset)
    expected = plain_gradient(make_module(tiny_base, lora=lora), batch, spec)
    head = {name for name in expected if name.startswith("head.")}
    assert len(head) == 14, "every weight of the head gets a gradient"
    assert all(expected[name].abs().max() > 0 for name in head)
    for chunk_size, checkpointing in ((1, False), (3, True), (len(batch), False)):
        other = make_module(tiny_base, lora=lora, checkpointing=checkpointing)
        backward_step(PlainEngine(other), batch, spec, chunk_size=chunk_size, step=STEP, seed=SEED)
        got = gradient(other)
        assert relative_error(got, expected) <= 1e-5
        assert relative_error({n: got[n] for n in head}, {n: expected[n] for n in head}) <= 1e-5
    other = make_module(tiny_base, lora=lora)
    backward_step(PlainEngine(other, forget=True), batch, spec, chunk_size=3, step=STEP, seed=SEED)
    assert relative_error(gradient(other), expected) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_gives_equal_vectors_here_and_in_sentence_transformers(tiny_base: str, tmp_path: Path, dtype: str) -> None:
    from sentence_transformers import SentenceTransformer

    module = make_module(tiny_base).eval()
    settings = {"dtype": dtype, **LATENT}
    job, folder = make_job(tiny_base, **settings), str(tmp_path / "model")
    tokenizer = make_encoder(tiny_base).tokenizer.hf
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    backbone, head = merge_lora(module.lm).base_model.to(kind), module.head.to(kind)
    exported = export_encoder(backbone, tokenizer, job, folder, training={"steps": 0}, head=head)
    ours = open_encoder(make_job(folder, dtype=dtype), device="cpu")  # pooling and shape come from the folder
    assert ours.settings.latent_attention == (5, 4)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(folder, device="cpu")
    st = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
    saved_again = str(tmp_path / "again")
    st.save(saved_again)
    again = SentenceTransformer(saved_again, device="cpu", trust_remote_code=True)
    floor = 0.999999 if dtype == "float32" else 0.9995
    for prompt in ("query", "passage"):
        vectors = exported.encode(TEXTS, prompt)  # type: ignore[arg-type]
        assert (vectors * ours.encode(TEXTS, prompt)).sum(axis=1).min() >= 0.999999  # type: ignore[arg-type]
        theirs = st.encode(TEXTS, prompt_name=prompt)
        assert min_cosine(vectors, theirs) >= floor
        assert np.array_equal(theirs, again.encode(TEXTS, prompt_name=prompt))
    # The control: the same backbone without the trained layer gives other vectors.
    plain = make_encoder(tiny_base, dtype=dtype).encode(TEXTS, "query")
    assert (plain * exported.encode(TEXTS, "query")).sum(axis=1).max() < 0.999
    assert "trust_remote_code=True" in (tmp_path / "model" / "README.md").read_text()
    # The fingerprint covers the layer, and a job that says another shape is refused.
    before = encoder_fingerprint(job_on(folder))
    assert before == encoder_fingerprint(job_on(folder))
    with pytest.raises(ModelError, match=r"model\.latent_attention = \(6, 4\), but .* was trained with \(5, 4\)"):
        open_encoder(make_job(folder, **{**LATENT, "latent_attention": {"latents": 6, "heads": 4}}), device="cpu")
    trained_further = build_two_pass(folder, ModelSpec.model_validate({"base": folder, **LATENT}), reference="none")
    torch.testing.assert_close(trained_further.head.latents.float(), head.latents.float())
    stir(head)
    head.write(f"{folder}/{FOLDER}")
    assert encoder_fingerprint(job_on(folder)) != before


def job_on(folder: str) -> JobSpec:
    return JobSpec.model_validate({"name": "t", "model": {"base": folder}, "embed": {"input": {"path": "x"}}})


def test_an_untrained_or_broken_layer_is_refused(tiny_base: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"latent_attention has weights to be trained, and .* holds none; add a train section"):
        open_encoder(make_job(tiny_base, **LATENT), device="cpu")
    with pytest.raises(ModelError, match=r"model\.latent_attention\.heads = 5 does not divide .* width 32; use 2 or 4"):
        LatentAttention(32, 3, 5)
    LatentAttention(32, 3, 4).reset(0).write(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"width": 32, "latents": 4, "heads": 4}))
    with pytest.raises(ModelError, match="no latent attention can be loaded"):
        LatentAttention.read(str(tmp_path))


def test_before_training_the_base_is_measured_with_mean_pooling(tiny_base: str) -> None:
    train = {"data": [{"path": "x"}], "objective": "cl"}
    prompts = {"query": "Find the answer:\n", "passage": "Text:\n"}
    model = {"base": tiny_base, "max_tokens": 64, "prompts": prompts, **LATENT}
    base = open_encoder(JobSpec.model_validate({"name": "t", "model": model, "train": train}), which="base", device="cpu")
    vectors, mean = base.encode(TEXTS), make_encoder(tiny_base).encode(TEXTS)
    assert (vectors * mean).sum(axis=1).min() >= 0.999999


def test_plan_counts_the_layer(tiny_base: str) -> None:
    model = {"base": tiny_base, "lora": {"rank": 4}, **LATENT}
    job = JobSpec.model_validate({"name": "t", "model": model, "train": {"data": [{"path": "x"}], "objective": "cl"}})
    module = make_module(tiny_base, lora=True)
    plan = make_plan(job)
    assert plan.parameters == sum(p.numel() for p in module.parameters())
    assert plan.trainable_parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
