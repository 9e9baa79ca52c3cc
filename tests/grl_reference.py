"""A training step's gradient written once more, in one graph and by loops; and the small batches and models to compare on."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ullme_ray.losses import alignment_kl, dpo, hinge, ipo, kto, sft
from ullme_ray.model.dropout import row_seeds
from ullme_ray.model.tokenizing import TextTokenizer, load_tokenizer
from ullme_ray.model.two_pass import TwoPassModel, build_two_pass
from ullme_ray.spec.job import LoraSpec, ModelSpec
from ullme_ray.spec.objective import ObjectiveSpec
from ullme_ray.train.collate import Example, TrainBatch, collate

WORDS = ["bucket", "object", "policy", "access", "private", "public", "list", "key", "table", "query", "value", "request"]
B, SEED, STEP = 7, 5, 3


def examples(num_rows: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [
        Example(row, text(3 + row), (text(4), text(9)), (text(6 + row),), scores=(2.0 + row % 3, 1.5, 0.1 * row))
        for row in range(num_rows)
    ]


def make_batch(folder: str, num_rows: int = B, *, first: int = 0, stop: int | None = None) -> TrainBatch:
    """Rows [first, stop) of a global batch of `num_rows`."""
    tokenizer = TextTokenizer(load_tokenizer(folder), max_tokens=64, query_prompt="Find:\n", passage_prompt="")
    batch = collate(examples(num_rows)[first:stop], tokenizer, with_generation=True, max_generation_tokens=128)
    generator = torch.Generator().manual_seed(9)
    reference = -40 * torch.rand((num_rows, batch.num_passages), generator=generator)
    return replace(batch, reference_logps=reference[first:stop])


# What a step can be asked for, by name: (objective, kind of model). Each name is a test case here, on ranks and under ZeRO.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "cl": ({"preset": "cl"}, "full"),
    "cl-lora": ({"preset": "cl"}, "shared"),
    "sft": ({"preset": "sft"}, "shared"),
    "dpo-frozen-copy": ({"preset": "dpo"}, "full"),
    "grl": ({"preset": "grl"}, "shared"),
    "grl-separate": ({"preset": "grl"}, "separate"),
    "genc-separate": ({"preset": "genc"}, "separate"),
    "ipo-no-reference": ({"preset": "grl", "generation": "ipo", "reference": "none"}, "full"),
    "hinge-precomputed": ({"preset": "dpo", "generation": "hinge", "reference": "precomputed"}, "full"),
    "kto": ({"preset": "dpo", "generation": "kto"}, "shared"),
    "distill-matryoshka": (
        {"preset": "grl", "distill_weight": 0.7, "matryoshka": {"dims": [16, 8], "weights": [0.5, 0.25]}},
        "full",
    ),
    "filtered": ({"preset": "cl", "contrastive": "supcon", "negative_margin": 0.05, "negative_ratio": 0.99}, "full"),
    "grl-latent": ({"preset": "grl"}, "latent"),
}


def make_module(folder: str, kind: str, *, reference: str = "auto", checkpointing: bool = False) -> TwoPassModel:
    """`full` fine-tuning, also with `latent` attention pooling, or LoRA with dropout and `shared` or `separate` adapters."""
    lora = None if kind in ("full", "latent") else LoraSpec(rank=4, alpha=8, dropout=0.3, adapters=kind)  # type: ignore[arg-type]
    latent = {"pooling": "latent_attention", "latent_attention": {"latents": 5, "heads": 4}} if kind == "latent" else {}
    model = ModelSpec.model_validate({"base": folder, "max_tokens": 64, "lora": lora, **latent})
    module = build_two_pass(folder, model, reference=reference, gradient_checkpointing=checkpointing, seed=2)
    if kind == "latent":
        stir(module.head)
    if lora:  # B starts at zero, which would hide the gradient of A
        generator = torch.Generator().manual_seed(4)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module


def stir(head: torch.nn.Module) -> None:
    """Weights of latent attention as after training: its output matrices start at zero, which would hide all else."""
    generator = torch.Generator().manual_seed(3)
    for parameter in head.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3


def gradient(module: TwoPassModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a
    difference = sum(float((a[n].double() - b[n].double()).pow(2).sum()) for n in a)
    return (difference / sum(float(x.double().pow(2).sum()) for x in b.values())) ** 0.5


def objective(case: str) -> ObjectiveSpec:
    """Of a case, with a gradient into the generation side of the alignment term too."""
    return ObjectiveSpec.model_validate({**CASES[case][0], "detach_gen": False})


def case_module(folder: str, case: str, *, checkpointing: bool = False) -> TwoPassModel:
    return copy.deepcopy(_template(folder, case, checkpointing))


@functools.cache
def _template(folder: str, case: str, checkpointing: bool) -> TwoPassModel:
    return make_module(folder, CASES[case][1], reference=objective(case).reference, checkpointing=checkpointing)


def plain_gradient(module: TwoPassModel, batch: TrainBatch, spec: ObjectiveSpec, *, generate: bool = True) -> dict[str, Tensor]:
    """The loss of METHOD in one graph: no chunks, no cached gradients, the contrastive loss by loops."""
    num_rows, num_positives = len(batch), batch.num_positives
    rows = batch.rows.repeat_interleave(batch.num_passages)
    slots = torch.arange(batch.num_passages).repeat(num_rows)
    seeds = (
        row_seeds(SEED, STEP, batch.rows, 0),
        row_seeds(SEED, STEP, rows, 1) + slots,
        row_seeds(SEED, STEP, rows, 2) + slots,
    )
    q, flat, logps, mean_logps, reference = module(
        batch.queries, batch.passages, batch.generation if generate else None, seeds=seeds, with_reference=True
    )
    p = flat.view(num_rows, batch.num_passages, -1)
    if generate:
        logps, mean_logps = logps.view(p.shape[:2]), mean_logps.view(p.shape[:2])
    reference = batch.reference_logps if reference is None else reference.view(p.shape[:2])
    if spec.reference == "none":
        reference = None
    loss = torch.zeros(())
    for width, weight in [(q.shape[1], 1.0), *spec.widths[1:]]:
        query = torch.nn.functional.normalize(q[:, :width], dim=-1)
        passage = torch.nn.functional.normalize(p[:, :, :width], dim=-1)
        cosines = torch.einsum("id,jkd->ijk", query, passage)  # (B, B, K)
        for i in range(num_rows):
            loss = loss + weight * spec.contrastive_weight * _contrastive_of_row(cosines[i], i, num_positives, spec)
        own = cosines[torch.arange(num_rows), torch.arange(num_rows)]  # (B, K)
        if spec.alignment_weight:
            kl = alignment_kl(
                own,
                mean_logps,
                rep_temperature=spec.rep_temperature,
                gen_temperature=spec.gen_temperature,
                direction=spec.alignment_direction,
                detach_gen=False,
            )
            loss = loss + weight * spec.alignment_weight * kl.sum()
        if spec.distill_weight and width == q.shape[1]:
            teacher = batch.teacher_scores.softmax(dim=1)
            kl = (teacher * (teacher.log() - (own / spec.rep_temperature).log_softmax(dim=1))).sum()
            loss = loss + spec.distill_weight * spec.rep_temperature**2 * kl
    if spec.generation_weight:
        kinds = {"num_positives": num_positives, "beta": 0.1, "pairs": spec.dpo_pairs}
        lengths = batch.generation.passage_lengths.view(p.shape[:2])
        ratios = (logps - (0 if reference is None else reference)).detach()
        values = {
            "sft": lambda: sft(mean_logps, num_positives=num_positives),
            "dpo": lambda: dpo(logps, reference, **kinds),
            "ipo": lambda: ipo(mean_logps, reference if reference is None else reference / lengths, **kinds),
            "hinge": lambda: hinge(logps, reference, **kinds),
            "kto": lambda: kto(
                logps, reference, kl=(ratios[:, :num_positives].mean(), ratios[:, num_positives:].mean()), **kinds
            ),
        }
        loss = loss + spec.generation_weight * values[spec.generation]().sum()
    (loss / num_rows).backward()
    return gradient(module)


def _contrastive_of_row(cosines: Tensor, row: int, num_positives: int, spec: ObjectiveSpec) -> Tensor:
    """Loss of one query against all passages (B, K), by the words of METHOD; the texts are all different."""
    positives = cosines[row, :num_positives]
    lowest = float(positives.detach().min())
    negatives = [cosine for j, others in enumerate(cosines) for cosine in (others[num_positives:] if j == row else others)]
    if spec.negative_margin is not None:
        negatives = [n for n in negatives if float(n.detach()) <= lowest - spec.negative_margin]
    if spec.negative_ratio is not None:
        negatives = [n for n in negatives if float(n.detach()) <= lowest - (1 - spec.negative_ratio) * abs(lowest)]
    kept = list(positives)
    if spec.miner_epsilon is not None:
        highest = max((float(n.detach()) for n in negatives), default=-2.0)
        negatives = [n for n in negatives if float(n.detach()) > lowest - spec.miner_epsilon]
        kept = [p for p in positives if float(p.detach()) < highest + spec.miner_epsilon]
    total = torch.zeros(())
    for positive in kept:
        denominator = torch.stack([*(kept if spec.contrastive == "supcon" else [positive]), *negatives]) / spec.temperature
        total = total + denominator.logsumexp(0) - positive / spec.temperature
    return total / max(1, len(kept))


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
