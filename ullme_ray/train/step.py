"""One optimizer step: the loss over all ranks, its exact gradient in chunks (GradCache), and the update.

Pass 1 encodes every chunk without gradient, except the last, whose graph is kept. The global contrastive loss gives the
gradient of each embedding. Pass 2 encodes each other chunk again, dropped alike (model/dropout.py), and back-propagates
`embedding . its gradient` plus the terms that need only the chunk's own rows. One chunk is plain training: nothing is encoded
twice.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ullme_ray.errors import TrainingError
from ullme_ray.losses import (
    Candidates,
    alignment_kl,
    contrastive_loss,
    distill_kl,
    dpo,
    hinge,
    ipo,
    kto,
    log_ratio_sums,
    sft,
    truncate,
)
from ullme_ray.model.dropout import row_seeds
from ullme_ray.spec.objective import ObjectiveSpec
from ullme_ray.train.collate import TrainBatch
from ullme_ray.train.collectives import all_gather, all_gather_with_grad, all_sum, world
from ullme_ray.train.engine import Engine

LOSS_NAMES = ("contrastive", "generation", "alignment", "distill")
_QUERY, _PASSAGE, _GENERATE = 0, 1, 2  # dropout streams of a row; passage j of a row adds j to its seed


class ChunkOutput(NamedTuple):
    queries: Tensor  # (C, D)
    passages: Tensor  # (C, K, D)
    logps: Tensor | None  # (C, K) summed
    mean_logps: Tensor | None  # (C, K)
    reference_logps: Tensor | None  # (C, K)


@dataclass(frozen=True)
class StepResult:
    """Losses are means over all queries of all ranks, before weighting; `loss` is their weighted sum."""

    loss: float
    contrastive_loss: float
    generation_loss: float
    alignment_loss: float
    distill_loss: float
    grad_norm: float

    def as_record(self, objective: ObjectiveSpec) -> dict[str, float]:
        """For the metrics; the distillation loss only where there is one."""
        record = asdict(self)
        if objective.distill_weight == 0:
            del record["distill_loss"]
        return record


def train_step(
    engine: Engine, batch: TrainBatch, objective: ObjectiveSpec, *, chunk_size: int, step: int, seed: int
) -> StepResult:
    """One optimizer step over `batch`, this rank's rows of the global batch.

    Args:
        chunk_size: queries of one chunk; decides memory, never the gradient.
        step: number of the step, from 0; with `seed` it decides the dropout masks.

    Raises:
        TrainingError: a loss is not finite, and the weights are as before; or the gradient is not, and this engine must not
            be used or saved any more.
    """
    losses = backward_step(engine, batch, objective, chunk_size=chunk_size, step=step, seed=seed)
    total = sum(weight * loss for weight, loss in zip(_weights(objective), losses.tolist()))
    grad_norm = engine.step()
    if not math.isfinite(grad_norm):  # the same number on all ranks, so all stop
        raise TrainingError(
            f"step {step + 1}: the gradient is not finite though all losses are; stopped, the last checkpoint is as it was. "
            f"Lower train.learning_rate, raise the temperatures, or look at the rows of this step"
        )
    contrastive, generation, alignment, distill = losses.tolist()
    return StepResult(total, contrastive, generation, alignment, distill, grad_norm)


def backward_step(
    engine: Engine, batch: TrainBatch, objective: ObjectiveSpec, *, chunk_size: int, step: int, seed: int
) -> Tensor:
    """Everything of a step but the update: leaves the full gradient in the engine and returns the losses (4,)."""
    chunks = batch.chunks(chunk_size)
    weights = _weights(objective)
    world_size = world()[1]
    num_queries = world_size * len(batch)
    # Divide once, by the queries of all ranks and chunks: so splitting cannot change what a weight means.
    # Times world_size, for the engine averages over ranks and the loss is a sum over them.
    scale = world_size / num_queries

    # Pass 1
    scores_first = objective.compares_pairs and objective.generation == "kto"  # its baseline is a mean over the whole batch
    outputs: list[ChunkOutput] = []
    for chunk in chunks[:-1]:
        with torch.no_grad():
            outputs.append(_forward(engine, chunk, objective, step=step, seed=seed, generate=scores_first))
    outputs.append(_forward(engine, chunks[-1], objective, step=step, seed=seed, generate=objective.needs_generation))
    kto_baseline = _kto_baseline(outputs, batch.num_positives, objective) if scores_first else None

    # The global loss, on leaves that stand for the embeddings
    queries = torch.cat([out.queries.detach() for out in outputs]).requires_grad_()  # (B, D)
    passages = torch.cat([out.passages.detach() for out in outputs]).requires_grad_()  # (B, K, D)
    losses = torch.zeros(len(LOSS_NAMES), device=queries.device)
    whole = 0.0 * (queries.sum() + passages.sum())  # so that every leaf gets a gradient, whatever the weights
    if objective.contrastive_weight > 0:
        contrastive = _contrastive_sum(queries, passages, batch, objective)
        whole = whole + weights[0] * scale * contrastive
        losses[0] = contrastive.detach()
    if objective.distill_weight > 0:
        distill = _distill_sum(queries, passages, batch, objective)
        whole = whole + weights[3] * scale * distill
        losses[3] = distill.detach()
    whole.backward()
    assert queries.grad is not None
    assert passages.grad is not None

    # Pass 2, the last chunk first: its graph is alive already
    for position in reversed(range(len(chunks))):
        chunk, start = chunks[position], position * chunk_size
        out = outputs.pop()
        if position < len(chunks) - 1:
            out = _forward(engine, chunk, objective, step=step, seed=seed, generate=objective.needs_generation)
        own = slice(start, start + len(chunk))
        surrogate = (out.queries * queries.grad[own]).sum() + (out.passages * passages.grad[own]).sum()
        if objective.needs_generation:
            generation, alignment = _chunk_sums(out, chunk, objective, kto_baseline)
            surrogate = surrogate + scale * (weights[1] * generation + weights[2] * alignment)
            losses[1:3] += torch.stack([generation.detach(), alignment.detach()])
        del out
        engine.backward(surrogate, is_last=position == 0)
    return _finite_means(losses, num_queries, step)


def _weights(objective: ObjectiveSpec) -> tuple[float, float, float, float]:
    """In the order of LOSS_NAMES."""
    return (
        objective.contrastive_weight,
        objective.generation_weight,
        objective.alignment_weight,
        objective.distill_weight,
    )


def _forward(
    engine: Engine, chunk: TrainBatch, objective: ObjectiveSpec, *, step: int, seed: int, generate: bool
) -> ChunkOutput:
    """One call of the engine, so that an engine which shards parameters sees one forward per backward."""
    num_passages = chunk.num_passages
    passage_rows = chunk.rows.repeat_interleave(num_passages)  # (C*K,)
    slots = torch.arange(num_passages, device=passage_rows.device).repeat(len(chunk))  # (C*K,)
    seeds = (
        row_seeds(seed, step, chunk.rows, _QUERY),
        row_seeds(seed, step, passage_rows, _PASSAGE) + slots,
        row_seeds(seed, step, passage_rows, _GENERATE) + slots,
    )
    queries, passages, *scores = engine(
        chunk.queries,
        chunk.passages,
        chunk.generation if generate else None,
        seeds=seeds,
        with_reference=objective.needs_reference and chunk.reference_logps is None,
    )
    by_query = (len(chunk), num_passages)  # passages come row-major: passage j of query i is i*K + j
    logps, mean_logps, reference = (score.view(by_query) if score is not None else None for score in scores)
    return ChunkOutput(
        queries, passages.view(*by_query, -1), logps, mean_logps, reference if reference is not None else chunk.reference_logps
    )


def _contrastive_sum(queries: Tensor, passages: Tensor, batch: TrainBatch, objective: ObjectiveSpec) -> Tensor:
    """Sum over this rank's queries of their loss against the passages of all ranks, at every Matryoshka width."""
    rank, _ = world()
    everywhere = all_gather_with_grad(passages.flatten(0, 1))  # (W*B*K, D), column i*K + j as in the keys
    candidates = Candidates(
        query_keys=all_gather(batch.query_keys),
        passage_keys=all_gather(batch.passage_keys),
        first_row=rank * len(batch),
        num_rows=len(batch),
        num_positives=batch.num_positives,
    )
    total = queries.new_zeros(())
    for width, weight in objective.widths:
        losses = contrastive_loss(
            _cut(queries, width),
            _cut(everywhere, width),
            candidates,
            form=objective.contrastive,
            temperature=objective.temperature,
            miner_epsilon=objective.miner_epsilon,
            margin=objective.negative_margin,
            ratio=objective.negative_ratio,
            in_batch_negatives=batch.in_batch_negatives,
        )  # (B,)
        total = total + weight * losses.sum()
    return total


def _cut(embedding: Tensor, width: int | None) -> Tensor:
    return embedding if width is None else truncate(embedding, width)


def _distill_sum(queries: Tensor, passages: Tensor, batch: TrainBatch, objective: ObjectiveSpec) -> Tensor:
    """Sum over this rank's queries of the divergence from the teacher, over each query's own passages."""
    assert batch.teacher_scores is not None
    return distill_kl(
        torch.einsum("bd,bkd->bk", queries, passages),
        batch.teacher_scores,
        temperature=objective.rep_temperature,
        teacher_temperature=objective.teacher_temperature,
    ).sum()


def _chunk_sums(
    out: ChunkOutput, chunk: TrainBatch, objective: ObjectiveSpec, kto_baseline: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Sums over the chunk's queries of the generation and the alignment loss."""
    assert out.logps is not None
    assert out.mean_logps is not None
    assert chunk.generation is not None
    generation = alignment = out.logps.new_zeros(())
    if objective.generation_weight > 0:
        generation = _generation_losses(out, chunk, objective, kto_baseline).sum()
    if objective.alignment_weight > 0:
        for width, weight in objective.widths:
            cosines = torch.einsum("cd,ckd->ck", _cut(out.queries, width), _cut(out.passages, width))  # (C, K)
            alignment = (
                alignment
                + weight
                * alignment_kl(
                    cosines,
                    out.mean_logps,
                    rep_temperature=objective.rep_temperature,
                    gen_temperature=objective.gen_temperature,
                    direction=objective.alignment_direction,
                    detach_gen=objective.detach_gen,
                ).sum()
            )
    return generation, alignment


def _generation_losses(
    out: ChunkOutput, chunk: TrainBatch, objective: ObjectiveSpec, kto_baseline: tuple[Tensor, Tensor] | None
) -> Tensor:
    """(C,) of the objective's form."""
    assert out.logps is not None
    assert out.mean_logps is not None
    assert chunk.generation is not None
    pairs: dict[str, Any] = {
        "num_positives": chunk.num_positives,
        "beta": objective.dpo_beta,
        "pairs": objective.dpo_pairs,
    }
    match objective.generation:
        case "sft":
            return sft(out.mean_logps, num_positives=chunk.num_positives)
        case "dpo":
            return dpo(out.logps, out.reference_logps, label_smoothing=objective.label_smoothing, **pairs)
        case "ipo":
            lengths = chunk.generation.passage_lengths.view_as(out.logps)  # (C, K)
            reference = out.reference_logps / lengths if out.reference_logps is not None else None
            return ipo(out.mean_logps, reference, **pairs)
        case "hinge":
            return hinge(out.logps, out.reference_logps, **pairs)
        case "kto":
            assert kto_baseline is not None
            return kto(out.logps, out.reference_logps, kl=kto_baseline, **pairs)


def _kto_baseline(outputs: list[ChunkOutput], num_positives: int, objective: ObjectiveSpec) -> tuple[Tensor, Tensor]:
    """Mean log-ratios of the chosen and of the rejected passages over all ranks and chunks; no gradient."""
    logps = torch.cat([out.logps.detach() for out in outputs if out.logps is not None])  # (B, K)
    held = [out.reference_logps for out in outputs if out.reference_logps is not None]
    sums = log_ratio_sums(
        logps, torch.cat(held) if held else None, num_positives=num_positives, pairs=objective.dpo_pairs
    )  # (2, 2): sum and count of each side
    totals = all_sum(sums)
    chosen, rejected = totals[:, 0] / totals[:, 1]
    return chosen, rejected


def _finite_means(losses: Tensor, num_queries: int, step: int) -> Tensor:
    """Means over all queries of all ranks. Every rank learns of every other's losses, so all stop together."""
    per_rank = all_gather(losses[None])  # (W, 4)
    if not torch.isfinite(per_rank).all():
        bad = (~torch.isfinite(per_rank)).nonzero().tolist()
        names = sorted({LOSS_NAMES[column] for _, column in bad})
        ranks = sorted({rank for rank, _ in bad})
        raise TrainingError(
            f"step {step + 1}: {' and '.join(names)} loss is not finite on ranks {ranks}; stopped before the weights moved. "
            f"Lower train.learning_rate, raise the temperature of that term, or look at the rows of this step"
        )
    return per_rank.sum(dim=0) / num_queries


def total_tokens(batch: TrainBatch) -> tuple[int, int]:
    """(encoded, generated) tokens of this step over all ranks, padding left out."""
    counts = all_sum(torch.tensor([batch.num_encode_tokens, batch.num_generate_tokens], device=batch.rows.device))
    return int(counts[0]), int(counts[1])
