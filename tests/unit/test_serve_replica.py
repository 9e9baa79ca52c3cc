"""The model replica without Ray: every field of a call, adapters over one backbone, a new model published while it answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_budget import CUDA, Limited

from ullme_ray.errors import ModelError, ServeError
from ullme_ray.model import Encoder, open_encoder
from ullme_ray.model.adapters import inject_lora
from ullme_ray.model.backbone import load_backbone, load_causal_lm
from ullme_ray.model.export import export_encoder
from ullme_ray.model.tokenizing import load_tokenizer
from ullme_ray.serve.embedder import Embedder
from ullme_ray.serve.loaded import LoadedModel
from ullme_ray.serve.models import published_version, served_models
from ullme_ray.serve.schemas import DecodeCall, EmbedCall, EmbedReply, InputRefusedError, TokenizeCall
from ullme_ray.spec import JobSpec, RunFolder, parse_job
from ullme_ray.spec.run_folder import dump_job

TEXTS = ["make a bucket private", "a", "deletes the public access policy of a bucket, the key and the object", "list keys"]


def run(test: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(test, 60)

    return asyncio.run(bounded())


def make_job(storage: Path, base: str, name: str = "tiny", **serve: object) -> JobSpec:
    prompts = {"query": "make a query: ", "passage": ""}
    model = {"base": base, "max_tokens": 32, "prompts": prompts}
    return parse_job(json.dumps({"name": name, "storage": str(storage), "model": model, "serve": serve}).encode())


def save_adapter(base: str, folder: Path, seed: int, *, of_head: bool) -> None:
    """A LoRA adapter with weights that move vectors, saved from the model with its head or from the backbone alone."""
    job = make_job(folder.parent, base)
    model = load_causal_lm(base, job.model) if of_head else load_backbone(base, job.model)
    torch.manual_seed(seed)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    wrapped.save_pretrained(str(folder))


def merged_vectors(job: JobSpec, base: str, adapter: Path) -> np.ndarray:
    """By peft itself: the adapter folded into the weights."""
    encoder = open_encoder(job, device="cpu", unpadded="off")
    key = next(iter(peft.utils.load_peft_weights(str(adapter), device="cpu")))
    model: Any = load_causal_lm(base, job.model) if ".model.model." in key else load_backbone(base, job.model)
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    backbone = merged.base_model if ".model.model." in key else merged
    return Encoder(backbone.eval(), encoder.tokenizer, encoder.settings, "").encode(TEXTS)


def embed(replica: Embedder, call: EmbedCall) -> Any:
    async def ask() -> Any:
        return (await replica.embed(call)).value

    return ask()


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> Embedder:
    (served,) = served_models(make_job(tmp_path_factory.mktemp("replica"), tiny_base))
    return Embedder(served)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> Encoder:
    return open_encoder(make_job(tmp_path_factory.mktemp("encoder"), tiny_base), device="cpu")


def test_every_field_of_a_call_does_what_it_says(replica: Embedder, encoder: Encoder) -> None:
    call = EmbedCall("tiny", TEXTS)
    long = " ".join(f"key{n}" for n in range(60))

    async def test() -> None:
        unit: EmbedReply = await embed(replica, call)
        np.testing.assert_allclose(unit.vectors, encoder.encode(TEXTS), atol=1e-5)
        assert unit.num_tokens == [len(ids) for ids in encoder.tokenizer.tokenize(TEXTS, "passage").input_ids]
        assert unit.fingerprint == encoder.fingerprint
        assert set(unit.seconds) == {"tokenization", "queue", "inference"}
        query: EmbedReply = await embed(replica, replace(call, prompt="query"))
        np.testing.assert_allclose(query.vectors, encoder.encode(TEXTS, "query"), atol=1e-5)

        pooled: EmbedReply = await embed(replica, replace(call, normalize=False))
        lengths = np.linalg.norm(pooled.vectors, axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 1e-3, "else the next line shows nothing"
        np.testing.assert_allclose(pooled.vectors / lengths, unit.vectors, atol=1e-5)
        cut: EmbedReply = await embed(replica, replace(call, normalize=False, dimensions=8))
        np.testing.assert_allclose(cut.vectors, np.asarray(pooled.vectors)[:, :8], atol=1e-6)
        short: EmbedReply = await embed(replica, replace(call, dimensions=8))
        np.testing.assert_allclose(np.linalg.norm(short.vectors, axis=1), 1, atol=1e-6)

        states: EmbedReply = await embed(replica, replace(call, pool=False))
        assert [len(s) for s in states.vectors] == unit.num_tokens
        np.testing.assert_allclose([s.mean(axis=0) for s in states.vectors], pooled.vectors, atol=1e-5)

        right: EmbedReply = await embed(replica, EmbedCall("tiny", [long], prompt="query"))
        left: EmbedReply = await embed(replica, EmbedCall("tiny", [long], prompt="query", truncation_direction="left"))
        assert (right.num_truncated, left.num_truncated, left.num_tokens) == (1, 1, [32])
        assert not np.allclose(right.vectors, left.vectors, atol=1e-3)

    run(test())


@pytest.mark.parametrize(("wanted", "found"), [(77, [77]), ("auto", [256, 512, 1024, 2048, 4096, 8192])])
def test_a_batch_holds_what_the_job_says_or_what_was_timed(
    tmp_path: Path, tiny_base: str, wanted: object, found: list[int]
) -> None:
    (served,) = served_models(make_job(tmp_path, tiny_base, tokens_per_batch=wanted))
    assert run(Embedder(served).describe("tiny")).value.tokens_per_batch in found


@pytest.mark.parametrize("form", ["unit", "pooled", "tokens"])
def test_a_batch_with_its_padding_stays_in_the_budget_and_what_memory_refused_is_remembered(
    tmp_path: Path, tiny_base: str, form: Any
) -> None:
    (served,) = served_models(make_job(tmp_path, tiny_base))
    loaded = LoadedModel(served, device="cpu", tokens_per_batch=256, warm_up=False)
    lane, ids = loaded.lane("tiny", 0, form), [[5] * 32, *[[6, 7, 8]] * 60]  # 212 tokens, and 1,952 as one padded batch
    wanted = [lane.forward([row])[0] for row in ids]
    limited = Limited(loaded.encoder.backbone, 100, *CUDA)
    loaded.encoder.backbone = limited
    for given, alone in zip(lane.forward(ids), wanted, strict=True):
        np.testing.assert_allclose(given, alone, atol=1e-5)
    assert 0 < max(limited.refused) <= 256
    limited.refused.clear()
    limited.passed.clear()
    before = loaded.budget.positions
    lane.forward(ids)
    assert not limited.refused
    assert loaded.budget.positions - before == sum(limited.passed)


def test_the_end_of_a_text_is_kept_with_its_prompt(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    long = " ".join(f"key{n}" for n in range(60))
    kept = tokenizer.tokenize([long, "a key"], "query", keep="end")
    assert kept.truncated == [True, False]
    whole = tokenizer.hf(tokenizer.prompts["query"] + long)["input_ids"]
    head = kept.prompt_length
    assert kept.input_ids[0][:head] == whole[:head]
    assert kept.input_ids[0][head:] == whole[len(whole) - 32 + head :]
    assert kept.input_ids[1] == tokenizer.tokenize(["a key"], "query").input_ids[0]
    ids = list(range(40))
    assert tokenizer.wrap_ids([ids], keep="end").input_ids == [ids[-32:]]


def test_input_that_may_not_be_cut_or_is_too_much_is_refused_by_name(replica: Embedder) -> None:
    async def test() -> None:
        long = "bucket " * 100
        refused = await embed(replica, EmbedCall("tiny", ["a", long], truncate=False))
        assert isinstance(refused, InputRefusedError)
        assert (refused.reason, refused.position, refused.limit) == ("too_long", 1, 32)
        assert refused.num_tokens > 100
        by_ids = await embed(replica, EmbedCall("tiny", None, [[1] * 50], truncate=False))
        assert (by_ids.reason, by_ids.num_tokens) == ("too_long", 50)
        much = await embed(replica, EmbedCall("tiny", ["a key"] * 10, max_request_tokens=9))
        assert (much.reason, much.limit) == ("too_many_tokens", 9)

    run(test())


def test_tokens_and_their_texts(replica: Embedder, encoder: Encoder) -> None:
    async def test() -> None:
        reply = (await replica.tokenize(TokenizeCall("tiny", TEXTS, "query"))).value
        for text, tokens in zip(TEXTS, reply.tokens, strict=True):
            assert [t.id for t in tokens] == encoder.tokenizer.hf("make a query: " + text)["input_ids"]
            plain = [t for t in tokens if not t.special]
            assert all(t.text == ("make a query: " + text)[t.start : t.stop] for t in plain)
            assert all(t.start is None for t in tokens if t.special)
        ids = encoder.tokenizer.hf(TEXTS)["input_ids"]
        assert [text.strip() for text in (await replica.decode(DecodeCall("tiny", ids))).value] == TEXTS

    run(test())


def test_tokens_are_limited_before_they_are_written_out(replica: Embedder) -> None:
    async def test() -> None:
        refused = (await replica.tokenize(TokenizeCall("tiny", ["a key"] * 200, max_request_tokens=99))).value
        assert isinstance(refused, InputRefusedError)
        assert (refused.reason, refused.limit) == ("too_many_tokens", 99)
        assert refused.num_tokens < 200 * 2, "it stops at the slice that is too much"

    run(test())


def test_a_large_text_keeps_no_other_request_waiting(tmp_path: Path, tiny_base: str, encoder: Encoder) -> None:
    (served,) = served_models(make_job(tmp_path, tiny_base, tokens_per_batch=256))
    replica = Embedder(served)
    large, texts = "bucket policy " * 10_000, [f"key {number} " * 40 for number in range(100)]

    async def test() -> None:
        for asked in (replica.tokenize(TokenizeCall("tiny", [large])), replica.embed(EmbedCall("tiny", [large]))):
            held = threading.Event()  # large texts take as long as this test wants, on a machine of any speed
            replica._large_thread.submit(held.wait, 60)
            slow = asyncio.create_task(asked)
            await embed(replica, EmbedCall("tiny", TEXTS))
            done, _ = await asyncio.wait({slow}, timeout=1)
            assert not done  # or it was in the thread of the small ones, which then wait for it
            held.set()
            await slow
        replies = (await replica.tokenize(TokenizeCall("tiny", texts))).value
        assert [[token.id for token in tokens] for tokens in replies.tokens] == encoder.tokenizer.hf(texts)["input_ids"]

    run(test())


class Failing(torch.nn.Module):
    """A backbone of which each pass fails that `fails` on its ids."""

    def __init__(self, backbone: Any, fails: Any) -> None:
        super().__init__()
        self.backbone, self.config, self.fails = backbone, backbone.config, fails

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **inputs: Any) -> Any:
        if self.fails(input_ids):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.backbone(input_ids=input_ids, position_ids=position_ids, **inputs)


def test_a_replica_whose_device_is_broken_is_unhealthy_and_one_with_a_bad_request_is_not(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served,) = served_models(make_job(tmp_path, tiny_base, tokens_per_batch=256))
    replica = Embedder(served)
    encoder = replica._loaded.encoder
    good, bad = encoder.backbone, EmbedCall("tiny", None, [[7] * 5])

    async def failed() -> None:
        with pytest.raises(RuntimeError, match="CUDA error"):
            await embed(replica, bad)

    async def test() -> None:
        await replica.check_health()
        monkeypatch.setattr(encoder, "backbone", Failing(good, lambda ids: bool((ids == 7).any())))
        await failed()
        await replica.check_health()
        monkeypatch.setattr(encoder, "backbone", Failing(good, lambda ids: True))
        await failed()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="CUDA error"):
                await replica.check_health()
        monkeypatch.setattr(encoder, "backbone", good)
        await replica.check_health()

    run(test())


def test_adapters_share_a_backbone_and_get_their_own_vectors(tmp_path: Path, tiny_base: str, encoder: Encoder) -> None:
    for seed, name in enumerate(("legal", "code")):
        save_adapter(tiny_base, tmp_path / name, seed, of_head=name == "legal")
    adapters = [{"name": f"tiny/{name}", "path": str(tmp_path / name)} for name in ("legal", "code")]
    job = make_job(tmp_path, tiny_base, adapters=adapters)
    (served,) = served_models(job)
    shared = Embedder(served)
    wanted = {"tiny": encoder.encode(TEXTS)} | {
        f"tiny/{name}": merged_vectors(job, tiny_base, tmp_path / name) for name in ("legal", "code")
    }
    assert min(np.abs(wanted["tiny"] - wanted[f"tiny/{name}"]).max() for name in ("legal", "code")) > 0.01

    async def test() -> None:
        calls = [EmbedCall(name, [text]) for text in TEXTS for name in wanted] * 3
        replies = await asyncio.gather(*(embed(shared, call) for call in calls))
        for call, reply in zip(calls, replies, strict=True):
            assert call.texts
            np.testing.assert_allclose(reply.vectors[0], wanted[call.model][TEXTS.index(call.texts[0])], atol=1e-5)
        described = [(await shared.describe(name)).value for name in wanted]
        assert len({d.fingerprint for d in described}) == 3
        assert [d.parent for d in described] == [None, "tiny", "tiny"]

    run(test())


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, tiny_base: str) -> None:
    backbone = load_backbone(tiny_base, make_job(tmp_path, tiny_base).model)
    with pytest.raises(ModelError, match="no PEFT adapter can be loaded from"):
        inject_lora(backbone, str(tmp_path), "adapter0")
    save_adapter(tiny_base, tmp_path / "other", 1, of_head=False)
    config = json.loads((tmp_path / "other/adapter_config.json").read_text())
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ModelError, match="does not fit the served model"):
        inject_lora(backbone, str(tmp_path / "other"), "adapter1")
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "other/adapter_model.safetensors")
    save_file({k.replace("layers.1", "layers.9"): w for k, w in weights.items()}, tmp_path / "other/adapter_model.safetensors")
    with pytest.raises(ModelError, match="is of another model than the served one"):
        inject_lora(load_backbone(tiny_base, make_job(tmp_path, tiny_base).model), str(tmp_path / "other"), "adapter0")


def publish(job: JobSpec, base: str, *, shift: float) -> None:
    """An export of the base with its weights moved, as a run publishes it."""
    export = Path(RunFolder.of(job).export)
    backbone: Any = load_backbone(base, job.model)
    for parameter in backbone.parameters():
        parameter.data.mul_(1 + shift).requires_grad_(False)
    new = export.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    export_encoder(backbone, load_tokenizer(base), job, str(new), training={})
    (export / "modules.json").unlink(missing_ok=True)
    shutil.copytree(new, export, ignore=shutil.ignore_patterns("modules.json"), dirs_exist_ok=True)
    shutil.copy(new / "modules.json", export)


def test_a_newly_published_model_is_changed_over_to_and_a_broken_one_is_not(tmp_path: Path, tiny_base: str) -> None:
    train = {"data": [{"path": "x.jsonl"}], "global_batch_size": 2, "max_steps": 1, "objective": "cl"}
    tree = json.loads(json.dumps(make_job(tmp_path, tiny_base).model_dump(mode="json", include={"name", "storage", "model"})))
    job = parse_job(json.dumps(tree | {"train": train, "serve": {"reload_s": 0.1}}).encode())
    publish(job, tiny_base, shift=0.0)
    (served,) = served_models(job)
    replica = Embedder(served)

    async def until(fingerprint: str) -> EmbedReply:
        while True:
            reply: EmbedReply = await embed(replica, EmbedCall("tiny", TEXTS))
            if reply.fingerprint == fingerprint:
                return reply
            await asyncio.sleep(0.02)

    async def test() -> None:
        old: EmbedReply = await embed(replica, EmbedCall("tiny", TEXTS))
        await asyncio.to_thread(publish, job, tiny_base, shift=0.3)
        wanted = open_encoder(job, device="cpu")
        new = await until(wanted.fingerprint)
        assert not np.allclose(old.vectors, new.vectors, atol=1e-3)
        np.testing.assert_allclose(new.vectors, wanted.encode(TEXTS), atol=1e-5)

        probe = Path(RunFolder.of(job).export) / "probe.json"
        entries = json.loads(probe.read_text())
        entries["entries"][0]["embedding"] = [1.0] + [0.0] * 31
        probe.write_text(json.dumps(entries))
        await asyncio.sleep(1.0)
        still: EmbedReply = await embed(replica, EmbedCall("tiny", TEXTS))
        np.testing.assert_array_equal(still.vectors, new.vectors)

    run(test())
    export = Path(RunFolder.of(job).export)
    assert published_version(served) is not None
    (export / "modules.json").unlink()
    assert published_version(served) is None, "while it is being published"


def test_models_of_other_runs_and_folders(tmp_path: Path, tiny_base: str) -> None:
    other = make_job(tmp_path, tiny_base, "other")
    models = [{"name": "v2", "run": "other", "replicas": {"min": 0, "max": 2}}, {"name": "org/plain", "base": tiny_base}]
    job = make_job(tmp_path, tiny_base, models=models)
    with pytest.raises(ServeError, match=r"serve\.models\.0\.run = other: .* run that job first"):
        served_models(job)
    folder = Path(RunFolder.of(other).root)
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(dump_job(other))
    own, v2, plain = served_models(job)
    assert [m.name for m in (own, v2, plain)] == ["tiny", "v2", "org/plain"]
    assert (v2.job.name, v2.pool.min, v2.job.serve) == ("other", 0, job.serve)
    assert plain.job.model.prompts.query == "", "another model has prompts of its own"
