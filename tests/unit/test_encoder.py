"""The encoder against itself: padding sides, batch mixes, prompts, and the export against two other libraries."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ullme_ray.errors import ModelError
from ullme_ray.model import Encoder, encoder_fingerprint, open_encoder
from ullme_ray.model.backbone import check_base, load_causal_lm
from ullme_ray.model.budget import token_budget_batches
from ullme_ray.model.encode import TokenBatch, encode_batch, pad_batch
from ullme_ray.model.encoder import (
    EncoderSettings,
    check_probe,
    load_encoder,
    probe_cosine,
    probe_floor,
)
from ullme_ray.model.export import export_encoder
from ullme_ray.model.pooling import pool, pooling_mask
from ullme_ray.model.two_pass import build_two_pass
from ullme_ray.parity import min_cosine
from ullme_ray.spec import JobSpec
from ullme_ray.spec.job import LoraSpec, ModelSpec

POOLINGS = ("mean", "lasttoken", "cls", "weightedmean")
TEXTS = [
    "make a bucket private",
    "a",
    "deletes the public access policy of a bucket, the key and the object",
    "list",
    "creates a table; the query returns a value " * 12,
]


def make_job(base: str, **model: object) -> JobSpec:
    settings = {"base": base, "max_tokens": 64, "prompts": {"query": "Find the answer:\n", "passage": "Text:\n"}, **model}
    return JobSpec.model_validate({"name": "t", "model": settings, "embed": {"input": {"path": "x"}}})


def make_encoder(base: str, **model: object) -> Encoder:
    return open_encoder(make_job(base, **model), device="cpu")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_of_states_a_person_can_compute(pooling: str) -> None:
    # Row 0: padding right, prompt of one token, own tokens 3 and 5. Row 1: the same text padded left.
    states = torch.tensor([[[9.0, 9], [3, 0], [0, 5], [7, 7]], [[7, 7], [9, 9], [3, 0], [0, 5]]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    own = pooling_mask(mask, torch.tensor([1, 1]))
    expected = {
        "mean": [1.5, 2.5],
        "weightedmean": [2 * 3 / 5, 3 * 5 / 5],  # weights are positions among real tokens, prompt counted: 2 and 3
        "lasttoken": [0.0, 5.0],
        "cls": [3.0, 0.0],
    }[pooling]
    unit = torch.tensor(expected) / torch.tensor(expected).norm()
    torch.testing.assert_close(pool(states, mask, own, pooling), unit.expand(2, 2))


def test_text_of_nothing_but_prompt_gives_a_finite_vector() -> None:
    own = pooling_mask(torch.tensor([[1, 1, 0]]), torch.tensor([2]))
    assert own.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prompt", ["query", "passage"])
def test_same_text_same_vector_in_any_batch_and_padding(tiny_base: str, pooling: str, prompt: str) -> None:
    encoder = make_encoder(tiny_base, pooling=pooling)
    alone = np.concatenate([encoder.encode([text], prompt) for text in TEXTS])  # type: ignore[arg-type]
    together = encoder.encode(TEXTS, prompt)  # type: ignore[arg-type]
    shuffled = encoder.encode(TEXTS[::-1], prompt, tokens_per_batch=70)[::-1]  # type: ignore[arg-type]
    tokens = encoder.tokenizer.tokenize(TEXTS, prompt)  # type: ignore[arg-type]
    right = pad_batch(tokens.input_ids, tokens.prompt_length, 0)
    flip = [
        torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(t, right.attention_mask)])
        for t in (right.input_ids, right.attention_mask)
    ]
    with torch.inference_mode():
        left = encode_batch(encoder.backbone, TokenBatch(flip[0], flip[1], right.prompt_lengths), pooling).numpy()
    assert flip[1][1, 0] == 0, "the short text must really be padded on the left"
    for other in (together, shuffled, left):
        assert (alone * other).sum(axis=1).min() >= 0.999999


def test_prompt_is_attended_but_not_pooled(tiny_base: str) -> None:
    """Another prompt moves the vector (attended); pooling over all tokens would give another one again (left out)."""
    encoder = make_encoder(tiny_base)
    query, passage = encoder.encode(["a bucket"], "query")[0], encoder.encode(["a bucket"], "passage")[0]
    assert query @ passage < 0.9999
    tokens = encoder.tokenizer.tokenize(["a bucket"], "query")
    assert tokens.prompt_length > 3
    with torch.inference_mode():
        everything = encode_batch(encoder.backbone, pad_batch(tokens.input_ids, 0, 0), "mean").numpy()[0]
    assert query @ everything < 0.9999


def test_prompt_that_swallows_a_short_text_still_gives_a_unit_vector(tiny_base: str) -> None:
    """`"Text: " + "a"` is tokenized as `Text`, `:`, ` a`: no token is the text's alone, and pooling falls back to all."""
    encoder = make_encoder(tiny_base, prompts={"passage": "Text: "})
    tokens = encoder.tokenizer.tokenize(["a"], "passage")
    assert tokens.prompt_length == len(tokens.input_ids[0])
    assert np.linalg.norm(encoder.encode(["a"])[0]) == pytest.approx(1.0, abs=1e-6)


def test_truncation_is_told(tiny_base: str) -> None:
    tokens = make_encoder(tiny_base).tokenizer.tokenize(["a", "a bucket " * 200], "passage")
    assert tokens.truncated == [False, True]
    assert len(tokens.input_ids[1]) == 64


def test_prompt_without_room_for_text_is_refused(tiny_base: str) -> None:
    with pytest.raises(ModelError, match=r"model\.prompts\.query is \d+ tokens long"):
        make_encoder(tiny_base, max_tokens=8)


def test_generation_tokens_end_with_the_passage(tiny_base: str) -> None:
    tokenizer = make_encoder(tiny_base).tokenizer
    tokens = tokenizer.tokenize_generation("make a bucket private", "access policy", max_tokens=64)
    end = tokenizer.hf.eos_token_id
    assert tokenizer.hf.decode(tokens.input_ids[-tokens.passage_length : -1]) == "access policy"
    assert tokens.input_ids[-1] == end
    long = tokenizer.tokenize_generation("query " * 100, "access " * 100, max_tokens=64)
    assert len(long.input_ids) == 64
    assert long.passage_length > 30


CHAT_TEMPLATE = (
    "policy access bucket object<|begin|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>value{% endif %}"
)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("query_prompt", ["", "Given a question, find passages:\n"])
def test_generation_tokens_keep_query_and_passage_within_any_limit(
    tiny_base: str, template: str | None, query_prompt: str
) -> None:
    tokenizer = make_encoder(tiny_base, prompts={"query": query_prompt}).tokenizer
    tokenizer.hf.chat_template = template
    with pytest.raises(ModelError, match=r"leaves no room .*train\.max_generation_tokens = 3 ") as refused:
        tokenizer.generation_room(3)
    overhead = int(str(refused.value).partition("take ")[2].split()[0])
    for limit in (overhead + 4, overhead + 5, overhead + 7, overhead + 30, overhead + 60):
        room = tokenizer.generation_room(limit)
        assert room == limit - overhead
        for query in ("make a bucket private", "list " * 200, "\U0001f600" * 50, ""):
            for passage in ("access policy", "table " * 200, ""):
                tokens = tokenizer.tokenize_generation(query, passage, max_tokens=limit)
                assert len(tokens.input_ids) <= limit
                assert 1 <= tokens.passage_length < len(tokens.input_ids)
                if len(passage) > 500:
                    assert tokens.passage_length >= room // 2
                if room >= 30 and query:
                    text = tokenizer.hf.decode(tokens.input_ids[: -tokens.passage_length])
                    assert query[:1] in text.replace(query_prompt, ""), "the prompt must not push the query out"


def test_token_budget_batches_hold_every_row_once_within_budget() -> None:
    lengths = [5, 100, 7, 7, 1, 64, 64, 3]
    batches = list(token_budget_batches(lengths, 64))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[r] for r in b) <= 64 for b in batches)
    assert [1] in batches  # longer than the budget: alone, never dropped


@pytest.mark.parametrize("pooling", POOLINGS)
def test_export_gives_equal_vectors_in_sentence_transformers_and_automodel(
    tiny_base: str, tmp_path: Path, pooling: str
) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    job = make_job(tiny_base, pooling=pooling)
    lm = load_causal_lm(tiny_base, job.model)
    folder = str(tmp_path / "model")
    exported = export_encoder(lm.base_model, make_encoder(tiny_base).tokenizer.hf, job, folder, training={"steps": 0})
    before = make_encoder(tiny_base, pooling=pooling)
    ours = {prompt: before.encode(TEXTS, prompt) for prompt in ("query", "passage")}
    st = SentenceTransformer(folder, device="cpu")
    auto = AutoModel.from_pretrained(folder).eval()
    hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, vectors in ours.items():
        theirs = st.encode(TEXTS, prompt_name=prompt)
        assert (vectors * theirs).sum(axis=1).min() >= 0.9999
        assert (vectors * exported.encode(TEXTS, prompt)).sum(axis=1).min() >= 0.999999  # type: ignore[arg-type]
        tokens = exported.tokenizer.tokenize(TEXTS, prompt)  # type: ignore[arg-type]
        batch = pad_batch(tokens.input_ids, tokens.prompt_length, hf_tokenizer.pad_token_id)
        with torch.inference_mode():
            states = auto(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        own = pooling_mask(batch.attention_mask, batch.prompt_lengths)
        plain = pool(states, batch.attention_mask, own, pooling).numpy()
        assert (vectors * plain).sum(axis=1).min() >= 0.9999
    # The control: without `is_causal: false` the same folder gives other vectors.
    config = Path(folder) / "config.json"
    assert '"is_causal": false' in config.read_text()
    shutil.copytree(folder, tmp_path / "causal")
    (tmp_path / "causal" / "config.json").write_text(config.read_text().replace('"is_causal": false', '"is_causal": true'))
    causal = SentenceTransformer(str(tmp_path / "causal"), device="cpu").encode(TEXTS, prompt_name="query")
    assert (ours["query"] * causal).sum(axis=1).min() < 0.999
    assert check_probe(exported, folder) >= 0.999999
    # Other vectors than the export's own, here for want of its prompts, are noticed.
    other = load_encoder(
        tiny_base,
        EncoderSettings.of(
            job.model.model_copy(update={"prompts": job.model.prompts.model_copy(update={"query": "", "passage": ""})})
        ),
        job.model,
        device="cpu",
    )
    with pytest.raises(ModelError, match="computes other vectors"):
        check_probe(other, folder)


def make_export(base: str, folder: Path, **model: object) -> str:
    job = make_job(base, **model)
    lm = load_causal_lm(base, job.model)
    export_encoder(lm.base_model, make_encoder(base).tokenizer.hf, job, str(folder), training={"steps": 0})
    return str(folder)


def job_of(base: str, **model: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "t", "model": {"base": base, **model}, "embed": {"input": {"path": "x"}}})


def test_job_whose_base_is_an_export_takes_over_its_settings(tiny_base: str, tmp_path: Path) -> None:
    folder = make_export(tiny_base, tmp_path / "model", pooling="lasttoken")
    made, opened = make_encoder(tiny_base, pooling="lasttoken"), open_encoder(job_of(folder), device="cpu")
    assert opened.settings == made.settings
    for prompt in ("query", "passage"):
        ours, theirs = made.encode(TEXTS, prompt), opened.encode(TEXTS, prompt)
        assert (ours * theirs).sum(axis=1).min() >= 0.999999
    changes: dict[str, dict[str, Any]] = {
        "pooling": {"pooling": "mean"},
        "max_tokens": {"max_tokens": 32},
        "prompts.query": {"prompts": {"query": "Other:\n"}},
    }
    for field, given in changes.items():
        with pytest.raises(ModelError, match=rf"model\.{field} = .*, but the model in .* was trained with"):
            open_encoder(job_of(folder, **given), device="cpu")


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode": "max"}, "max"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "pooling_mode_mean_tokens . pooling_mode_cls_token",
        ),
    ],
)
def test_pooling_that_cannot_be_computed_is_refused(
    tiny_base: str, tmp_path: Path, pooling: dict[str, object], words: str
) -> None:
    folder = make_export(tiny_base, tmp_path / "model")
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ModelError, match=f"pools by {words}"):
        open_encoder(job_of(folder), device="cpu")


def test_causal_attention_is_kept_by_encoder_training_and_export(tiny_base: str, tmp_path: Path) -> None:
    both, causal = make_encoder(tiny_base), make_encoder(tiny_base, bidirectional=False)
    assert both.fingerprint != causal.fingerprint
    vectors = causal.encode(TEXTS, "query")
    # The first token sees no other, so what follows it changes nothing; the control is attention both ways.
    for encoder, moves in ((causal, False), (both, True)):
        batches = [pad_batch([[5, 6, last]], 0, 0) for last in (7, 8)]
        first, second = (
            encode_batch(encoder.backbone, batch, "cls", bidirectional=not encoder.settings.causal) for batch in batches
        )
        assert bool((first - second).abs().max() > 1e-4) == moves
    job = make_job(tiny_base, bidirectional=False)
    module = build_two_pass(tiny_base, job.model, reference="none").eval()
    tokens = causal.tokenizer.tokenize(TEXTS, "query")
    with torch.no_grad():
        trained = module(pad_batch(tokens.input_ids, tokens.prompt_length, causal.tokenizer.pad_id))[0].numpy()
    assert (vectors * trained).sum(axis=1).min() >= 0.999999

    from sentence_transformers import SentenceTransformer

    folder = make_export(tiny_base, tmp_path / "model", bidirectional=False)
    opened = open_encoder(job_of(folder), device="cpu")
    theirs = SentenceTransformer(folder, device="cpu").encode(TEXTS, prompt_name="query")
    assert (vectors * opened.encode(TEXTS, "query")).sum(axis=1).min() >= 0.999999
    assert (vectors * theirs).sum(axis=1).min() >= 0.9999
    assert (vectors * both.encode(TEXTS, "query")).sum(axis=1).min() < 0.999
    assert "Attention is causal" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ModelError, match=r"model\.bidirectional = true, but the model in .* was trained with false"):
        open_encoder(job_of(folder, bidirectional=True), device="cpu")


def test_model_card_tells_prompts_length_and_weights(tiny_base: str, tmp_path: Path) -> None:
    folder = make_export(tiny_base, tmp_path / "model", prompts={"query": "a|b\n"}, lora={"rank": 4})
    card = (Path(folder) / "README.md").read_text()
    for fact in (r'| prompts | query `"a\|b\n"`, passage none |', "| longest text | 64 tokens |", "float32, LoRA merged"):
        assert fact in card


def make_foreign(base: str, folder: Path, *, pooling: str = "mean", include_prompt: bool = True, **config: Any) -> Any:
    """A sentence-transformers model as that library itself makes and saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(base, max_seq_length=64)
    for key, value in config.items():
        setattr(transformer.auto_model.config, key, value)
    parts = [transformer, Pooling(transformer.get_embedding_dimension(), pooling, include_prompt=include_prompt)]
    prompts = {"query": "Find the answer:\n", "passage": "Text:\n"}
    SentenceTransformer(modules=parts, device="cpu", prompts=prompts).save(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_foreign_model_is_encoded_as_its_folder_says(
    tiny_base: str, tmp_path: Path, causal: bool, include_prompt: bool
) -> None:
    theirs = make_foreign(tiny_base, tmp_path, include_prompt=include_prompt, **({} if causal else {"is_causal": False}))
    ours = open_encoder(job_of(str(tmp_path)), device="cpu")
    assert (ours.settings.causal, ours.settings.prompt_is_pooled) == (causal, include_prompt)
    other_attention = Encoder(
        ours.backbone, ours.tokenizer, dataclasses.replace(ours.settings, causal=not causal), ours.fingerprint
    )
    other_prompt = Encoder(
        ours.backbone,
        ours.tokenizer,
        dataclasses.replace(ours.settings, prompt_is_pooled=not include_prompt),
        ours.fingerprint,
    )
    for prompt in ("query", "passage"):
        expected = theirs.encode(TEXTS, prompt_name=prompt)
        assert min_cosine(ours.encode(TEXTS, prompt), expected) >= 0.999999  # type: ignore[arg-type]
        for control in (other_attention, other_prompt):
            assert min_cosine(control.encode(TEXTS, prompt), expected) < 0.999  # type: ignore[arg-type]


def test_foreign_model_with_more_than_pooling_is_refused(tiny_base: str, tmp_path: Path) -> None:
    from sentence_transformers.models import Dense

    model = make_foreign(tiny_base, tmp_path / "plain")
    model.append(Dense(32, 16))
    model.save(str(tmp_path / "dense"))
    with pytest.raises(ModelError, match=r"the sentence-transformers model in .* has Dense; only Transformer, Pooling"):
        open_encoder(job_of(str(tmp_path / "dense")), device="cpu")


def test_fingerprint_covers_all_that_decides_the_ids(tiny_base: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    folder, before = str(tmp_path / "base"), encoder_fingerprint(job_of(str(tmp_path / "base")))
    (tmp_path / "base" / "README.md").write_text("no part of the model")
    assert encoder_fingerprint(job_of(folder)) == before
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_prefix_space": True}))
    assert encoder_fingerprint(job_of(folder)) != before
    settings: list[dict[str, Any]] = [{}, {"pooling": "lasttoken"}, {"max_tokens": 16}, {"prompts": {"passage": "a key "}}]
    assert len({encoder_fingerprint(job_of(folder, **changed)) for changed in settings}) == len(settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probe_holds_exact_vectors_and_what_the_export_itself_reaches(
    tiny_base: str, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_export(tiny_base, tmp_path / "model", dtype=dtype)
    probe = json.loads((tmp_path / "model" / "probe.json").read_text())
    exact = open_encoder(job_of(folder), device="cpu")
    assert probe_cosine(exact, probe["entries"]) >= 0.999999
    encoder = open_encoder(job_of(folder, dtype=dtype), device="cpu")
    assert probe["dtype"] == dtype
    assert check_probe(encoder, folder) == pytest.approx(probe["cosine"], abs=1e-6)
    # An export that rounds more than usual is not refused where it rounds the same, and still is where it is not the same.
    assert probe_floor(encoder, 0.998) == pytest.approx(0.992)
    assert probe_floor(encoder, 1.0) == (0.9999 if dtype == "float32" else 0.999)
    # The model card's own check, as a user runs it.
    code = (tmp_path / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(code, {})
    assert float(capsys.readouterr().out) >= probe_floor(encoder, probe["cosine"])


def test_a_table_of_more_dims_than_the_model_has_is_refused_before_any_work(tiny_base: str) -> None:
    def job(dims: int) -> JobSpec:
        embed = {"input": {"path": "x"}, "output": {"dims": dims}}
        return JobSpec.model_validate({"name": "t", "model": {"base": tiny_base, "max_tokens": 32}, "embed": embed})

    check_base(job(32))
    with pytest.raises(ModelError, match=r"embed.output.dims = 33, but the vectors of model.base .* have 32 numbers"):
        check_base(job(33))


def test_four_bits_need_bitsandbytes_and_a_gpu(tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSpec(base=tiny_base, max_tokens=32, lora=LoraSpec(rank=2, quantize_base="nf4"))
    job = JobSpec.model_validate({"name": "t", "model": model.model_dump(), "embed": {"input": {"path": "x"}}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ModelError, match=r"needs the package bitsandbytes, which is not installed; pip install"):
        check_base(job)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="needs a GPU, and this machine has none"):
            build_two_pass(tiny_base, model, reference="none")
    whole = build_two_pass(tiny_base, model, reference="none", dtype=torch.float32)  # what an export merges into
    assert next(whole.parameters()).dtype == torch.float32
