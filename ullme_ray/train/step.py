"""One optimizer step: the loss over all ranks, its exact gradient in chunks (GradCache), and the update.

Pass 1 encodes every chunk without gradient, except the last, whose graph is kept. The global contrastive loss gives the
gradient of each embedding. Pass 2 encodes each other chunk again, dropped alike (model/dropout.py), and back-propagates
`embedding . its gradient` plus the terms that need only the chunk's own rows. One chunk is plain training: nothing is encoded
twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ullme_ray.errors import TrainingError
from ullme_ray.losses import Candidates, alignment_kl, contrastive_loss, dpo, sft
from ullme_ray.model.dropout import row_seeds
from ullme_ray.spec.job import ObjectiveSpec
from ullme_ray.train.collate import TrainBatch
from ullme_ray.train.collectives import all_gather, all_gather_with_grad, all_sum, world

LOSS_NAMES = ("contrastive", "generation", "alignment")
_QUERY, _PASSAGE, _GENERATE = 0, 1, 2  # dropout streams of a row; passage j of a row adds j to its seed


class Engine(Protocol):
    """What a step needs of the distributed engine: gradients averaged over ranks once, at the boundary."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]: ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None: ...

    def step(self) -> float:
        """Updates the weights; returns the norm of the gradient before clipping."""
        ...


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
    grad_norm: float


def train_step(
    engine: Engine, batch: TrainBatch, objective: ObjectiveSpec, *, chunk_size: int, step: int, seed: int
) -> StepResult:
    """One optimizer step over `batch`, this rank's rows of the global batch.

    Args:
        chunk_size: queries of one chunk; decides memory, never the gradient.
        step: number of the step, from 0; with `seed` it decides the dropout masks.

    Raises:
        TrainingError: a loss is not finite; the weights are as before.
    """
    losses = backward_step(engine, batch, objective, chunk_size=chunk_size, step=step, seed=seed)
    contrastive, generation, alignment = losses.tolist()
    total = sum(weight * loss for weight, loss in zip(_weights(objective), losses.tolist()))
    return StepResult(total, contrastive, generation, alignment, engine.step())


def backward_step(
    engine: Engine, batch: TrainBatch, objective: ObjectiveSpec, *, chunk_size: int, step: int, seed: int
) -> Tensor:
    """Everything of a step but the update: leaves the full gradient in the engine and returns the three losses (3,)."""
    chunks = batch.chunks(chunk_size)
    weights = _weights(objective)
    world_size = world()[1]
    num_queries = world_size * len(batch)
    # Divide once, by the queries of all ranks and chunks: so splitting cannot change what a weight means.
    # Times world_size, for the engine averages over ranks and the loss is a sum over them.
    scale = world_size / num_queries

    # Pass 1
    outputs: list[ChunkOutput] = []
    for chunk in chunks[:-1]:
        with torch.no_grad():
            outputs.append(_forward(engine, chunk, objective, step=step, seed=seed, generate=False))
    outputs.append(_forward(engine, chunks[-1], objective, step=step, seed=seed, generate=objective.needs_generation))

    # The global loss, on leaves that stand for the embeddings
    queries = torch.cat([out.queries.detach() for out in outputs]).requires_grad_()  # (B, D)
    passages = torch.cat([out.passages.detach() for out in outputs]).requires_grad_()  # (B, K, D)
    losses = torch.zeros(3, device=queries.device)
    if objective.contrastive_weight > 0:
        contrastive = _contrastive_sum(queries, passages, batch, objective)
        (objective.contrastive_weight * scale * contrastive).backward()
        losses[0] = contrastive.detach()
    else:
        queries.grad, passages.grad = torch.zeros_like(queries), torch.zeros_like(passages)
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
            generation, alignment = _chunk_sums(out, chunk, objective)
            surrogate = surrogate + scale * (weights[1] * generation + weights[2] * alignment)
            losses[1:] += torch.stack([generation.detach(), alignment.detach()])
        del out
        engine.backward(surrogate, is_last=position == 0)
    return _finite_means(losses, num_queries, step)


def _weights(objective: ObjectiveSpec) -> tuple[float, float, float]:
    return objective.contrastive_weight, objective.generation_weight, objective.alignment_weight


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
        with_reference=objective.generation_weight > 0 and objective.generation == "dpo",
    )
    by_query = (len(chunk), num_passages)  # passages come row-major: passage j of query i is i*K + j
    return ChunkOutput(
        queries, passages.view(*by_query, -1), *(score.view(by_query) if score is not None else None for score in scores)
    )


def _contrastive_sum(queries: Tensor, passages: Tensor, batch: TrainBatch, objective: ObjectiveSpec) -> Tensor:
    """Sum over this rank's queries of their loss against the passages of all ranks."""
    rank, _ = world()
    candidates = Candidates(
        all_gather(batch.query_keys),
        all_gather(batch.passage_keys),
        first_row=rank * len(batch),
        num_rows=len(batch),
        num_positives=batch.num_positives,
    )
    everywhere = all_gather_with_grad(passages.flatten(0, 1))  # (W*B*K, D), column i*K + j as in the candidates
    return contrastive_loss(queries, everywhere, candidates, temperature=objective.temperature).sum()


def _chunk_sums(out: ChunkOutput, chunk: TrainBatch, objective: ObjectiveSpec) -> tuple[Tensor, Tensor]:
    """Sums over the chunk's queries of the generation and the alignment loss."""
    assert out.logps is not None
    assert out.mean_logps is not None
    generation = alignment = out.logps.new_zeros(())
    if objective.generation_weight > 0 and objective.generation == "sft":
        generation = sft(out.mean_logps, num_positives=chunk.num_positives).sum()
    elif objective.generation_weight > 0:
        generation = dpo(
            out.logps,
            out.reference_logps,
            num_positives=chunk.num_positives,
            beta=objective.dpo_beta,
            label_smoothing=objective.label_smoothing,
            pairs=objective.dpo_pairs,
        ).sum()
    if objective.alignment_weight > 0:
        cosines = torch.einsum("cd,ckd->ck", out.queries, out.passages)  # (C, K)
        alignment = alignment_kl(
            cosines,
            out.mean_logps,
            rep_temperature=objective.rep_temperature,
            gen_temperature=objective.gen_temperature,
            direction=objective.alignment_direction,
            detach_gen=objective.detach_gen,
        ).sum()
    return generation, alignment


def _finite_means(losses: Tensor, num_queries: int, step: int) -> Tensor:
    """Means over all queries of all ranks. Every rank learns of every other's losses, so all stop together."""
    per_rank = all_gather(losses[None])  # (W, 3)
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
