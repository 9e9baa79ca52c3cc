"""GradCache changes memory, never the gradient; checked against one plain backward written without our step.

METHOD's invariants on one rank: chunk sizes 1, 2, 3, B and none, dropout on, LoRA and full fine-tuning, with and without
activation checkpointing, all presets. Ranks and ZeRO stages: tests/integration/test_zero_gradients.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ullme_ray.errors import TrainingError
from ullme_ray.losses import alignment_kl, dpo, sft
from ullme_ray.model.dropout import RowDropout, keep_mask, row_seeds
from ullme_ray.model.tokenizing import TextTokenizer, load_tokenizer
from ullme_ray.model.two_pass import TwoPassModel, build_two_pass
from ullme_ray.spec.job import LoraSpec, ModelSpec, ObjectiveSpec
from ullme_ray.train.collate import Example, TrainBatch, collate
from ullme_ray.train.step import backward_step, train_step

WORDS = ["bucket", "object", "policy", "access", "private", "public", "list", "key", "table", "query", "value", "request"]
B, SEED, STEP = 7, 5, 3


class PlainEngine:
    """One process, no sharding: gradients add up in the parameters."""

    def __init__(self, module: TwoPassModel, *, forget: bool = False) -> None:
        self.module = module
        self.forget = forget  # the failing control: gradients of all chunks but one are lost
        self.stepped = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        if self.forget:
            self.module.zero_grad()
        loss.backward()

    def step(self) -> float:
        self.stepped = True
        return 0.0


def examples(num_rows: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [Example(row, text(3 + row), (text(4), text(9)), (text(6 + row),)) for row in range(num_rows)]


def make_batch(folder: str, num_rows: int = B) -> TrainBatch:
    tokenizer = TextTokenizer(load_tokenizer(folder), max_tokens=64, query_prompt="Find:\n", passage_prompt="")
    return collate(examples(num_rows), tokenizer, with_generation=True, max_generation_tokens=64)


def make_module(folder: str, *, lora: bool, checkpointing: bool = False) -> TwoPassModel:
    model = ModelSpec(base=folder, max_tokens=64, lora=LoraSpec(rank=4, alpha=8, dropout=0.3) if lora else None)
    module = build_two_pass(folder, model, reference="auto", gradient_checkpointing=checkpointing, seed=2)
    if lora:  # B starts at zero, which would hide the gradient of A
        generator = torch.Generator().manual_seed(4)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module


def gradient(module: TwoPassModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a
    difference = sum(float((a[n].double() - b[n].double()).pow(2).sum()) for n in a)
    return (difference / sum(float(x.double().pow(2).sum()) for x in b.values())) ** 0.5


def objective(preset: str) -> ObjectiveSpec:
    return ObjectiveSpec.model_validate({"preset": preset, "detach_gen": False})


def plain_gradient(module: TwoPassModel, batch: TrainBatch, spec: ObjectiveSpec) -> dict[str, Tensor]:
    """The loss of METHOD in one graph: no chunks, no cached gradients, the contrastive loss by loops."""
    rows = batch.rows.repeat_interleave(batch.num_passages)
    slots = torch.arange(batch.num_passages).repeat(len(batch))
    seeds = (
        row_seeds(SEED, STEP, batch.rows, 0),
        row_seeds(SEED, STEP, rows, 1) + slots,
        row_seeds(SEED, STEP, rows, 2) + slots,
    )
    q, flat, logps, mean_logps, reference = module(
        batch.queries, batch.passages, batch.generation, seeds=seeds, with_reference=spec.generation == "dpo"
    )
    p = flat.view(len(batch), batch.num_passages, -1)
    shape = p.shape[:2]
    loss = torch.zeros(())
    for i in range(len(batch)):
        scores = torch.einsum("d,bkd->bk", q[i], p) / spec.temperature
        others = torch.cat([scores[j] if j != i else scores[i, 2:] for j in range(len(batch))])
        for positive in scores[i, :2]:
            everything = torch.cat([positive[None], others])
            loss = loss + spec.contrastive_weight * (everything.logsumexp(0) - positive) / 2
    if spec.generation_weight:
        if spec.generation == "sft":
            loss = loss + spec.generation_weight * sft(mean_logps.view(shape), num_positives=2).sum()
        else:
            reference = reference.view(shape)
            loss = loss + spec.generation_weight * dpo(logps.view(shape), reference, num_positives=2, beta=0.1).sum()
    if spec.alignment_weight:
        kl = alignment_kl(
            torch.einsum("bd,bkd->bk", q, p), mean_logps.view(shape), rep_temperature=0.1, gen_temperature=1.0, detach_gen=False
        )
        loss = loss + spec.alignment_weight * kl.sum()
    (loss / len(batch)).backward()
    return gradient(module)


@pytest.mark.parametrize("lora", [True, False], ids=["lora-dropout", "full"])
@pytest.mark.parametrize("preset", ["cl", "sft", "dpo", "grl"])
def test_gradient_is_that_of_plain_training_for_every_chunk_size(tiny_base: str, preset: str, lora: bool) -> None:
    batch, spec = make_batch(tiny_base), objective(preset)
    module = make_module(tiny_base, lora=lora)
    assert lora == any(isinstance(m, RowDropout) and m.p > 0 for m in module.modules())
    expected = plain_gradient(module, batch, spec)
    for chunk_size in (1, 2, 3, B, B + 5):
        for checkpointing in (False, True):
            other = make_module(tiny_base, lora=lora, checkpointing=checkpointing)
            backward_step(PlainEngine(other), batch, spec, chunk_size=chunk_size, step=STEP, seed=SEED)
            assert relative_error(gradient(other), expected) <= 1e-5, (chunk_size, checkpointing)
    # Controls that must fail: another dropout mask (LoRA), and chunks whose gradients do not add up.
    if lora:
        other = make_module(tiny_base, lora=lora)
        backward_step(PlainEngine(other), batch, spec, chunk_size=3, step=STEP + 1, seed=SEED)
        assert relative_error(gradient(other), expected) > 1e-2
    other = make_module(tiny_base, lora=lora)
    backward_step(PlainEngine(other, forget=True), batch, spec, chunk_size=3, step=STEP, seed=SEED)
    assert relative_error(gradient(other), expected) > 1e-2


def test_rows_of_a_batch_keep_their_own_passages(tiny_base: str) -> None:
    batch, rows = make_batch(tiny_base), examples(B)
    hf = load_tokenizer(tiny_base)
    for chunk_size in (1, 3, B):
        row = 0
        for chunk in batch.chunks(chunk_size):
            for i in range(len(chunk)):
                assert hf.decode(chunk.queries.input_ids[i], skip_special_tokens=True) == "Find:\n" + rows[row].query
                for j, passage in enumerate(rows[row].passages):
                    flat = i * chunk.num_passages + j
                    assert hf.decode(chunk.passages.input_ids[flat], skip_special_tokens=True) == passage
                    assert chunk.generation is not None
                    scored = chunk.generation.input_ids[flat][chunk.generation.attention_mask[flat] > 0]
                    length = int(chunk.generation.passage_lengths[flat])
                    assert hf.decode(scored[-length:], skip_special_tokens=True) == passage
                row += 1
        assert row == B


def test_losses_do_not_depend_on_chunk_size(tiny_base: str) -> None:
    batch, spec = make_batch(tiny_base), objective("grl")
    losses = [
        backward_step(PlainEngine(make_module(tiny_base, lora=True)), batch, spec, chunk_size=c, step=0, seed=0)
        for c in (1, 3, B)
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_base: str) -> None:
    module = make_module(tiny_base, lora=False)
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    engine = PlainEngine(module)
    with pytest.raises(TrainingError, match=r"step 1: .*contrastive.* loss is not finite on ranks \[0\]"):
        train_step(engine, make_batch(tiny_base), objective("grl"), chunk_size=2, step=0, seed=0)
    assert not engine.stepped


def test_dropout_masks_follow_the_row_and_keep_the_right_share() -> None:
    seeds = row_seeds(1, 2, torch.arange(64), 0)
    mask = keep_mask(seeds, 3, 50, 64, 0.3)
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.005)
    # no row, position or feature stands out, and neighbours are unrelated
    for dim in ((1, 2), (0, 2), (0, 1)):
        assert (mask.float().mean(dim=dim) - 0.7).abs().max() < 0.05
    centred = mask.float() - mask.float().mean()
    for dim in range(3):
        neighbours = (centred.narrow(dim, 0, mask.shape[dim] - 1) * centred.narrow(dim, 1, mask.shape[dim] - 1)).mean()
        assert abs(float(neighbours)) / 0.21 < 0.02
    assert torch.equal(keep_mask(seeds[5:6], 3, 20, 64, 0.3), mask[5:6, :20])  # alone and shorter: the same mask
    assert not torch.equal(keep_mask(seeds[5:6], 4, 20, 64, 0.3), mask[5:6, :20])
