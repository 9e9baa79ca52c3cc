"""A training step's gradient written once more, in one graph and by loops; and the small batches and models to compare on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ullme_ray.losses import alignment_kl, dpo, sft
from ullme_ray.model.dropout import row_seeds
from ullme_ray.model.tokenizing import TextTokenizer, load_tokenizer
from ullme_ray.model.two_pass import TwoPassModel, build_two_pass
from ullme_ray.spec.job import LoraSpec, ModelSpec, ObjectiveSpec
from ullme_ray.train.collate import Example, TrainBatch, collate

WORDS = ["bucket", "object", "policy", "access", "private", "public", "list", "key", "table", "query", "value", "request"]
B, SEED, STEP = 7, 5, 3


def examples(num_rows: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [Example(row, text(3 + row), (text(4), text(9)), (text(6 + row),)) for row in range(num_rows)]


def make_batch(folder: str, num_rows: int = B, *, first: int = 0, stop: int | None = None) -> TrainBatch:
    """Rows [first, stop) of a global batch of `num_rows`."""
    tokenizer = TextTokenizer(load_tokenizer(folder), max_tokens=64, query_prompt="Find:\n", passage_prompt="")
    return collate(examples(num_rows)[first:stop], tokenizer, with_generation=True, max_generation_tokens=128)


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


def plain_gradient(module: TwoPassModel, batch: TrainBatch, spec: ObjectiveSpec, *, generate: bool = True) -> dict[str, Tensor]:
    """The loss of METHOD in one graph: no chunks, no cached gradients, the contrastive loss by loops."""
    rows = batch.rows.repeat_interleave(batch.num_passages)
    slots = torch.arange(batch.num_passages).repeat(len(batch))
    seeds = (
        row_seeds(SEED, STEP, batch.rows, 0),
        row_seeds(SEED, STEP, rows, 1) + slots,
        row_seeds(SEED, STEP, rows, 2) + slots,
    )
    q, flat, logps, mean_logps, reference = module(
        batch.queries,
        batch.passages,
        batch.generation if generate else None,
        seeds=seeds,
        with_reference=spec.generation == "dpo",
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
