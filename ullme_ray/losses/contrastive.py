"""The contrastive loss over the positives and hard negatives of all ranks (METHOD: losses, 1).

Cost: four (B, D) x (D, W*B*K) products a step, one of them a recompute. Memory: the similarities of one tile of passages,
(B, tile_passages), and a gradient the size of the passages; never the whole (B, W*B*K).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_PASSAGES = 8192  # 16 MiB of float32 similarities at B = 512


class Candidates(NamedTuple):
    """Whose passages are whose among those of all ranks; passage j of row i stands at column i*K + j."""

    query_keys: Tensor  # (W*B,) hashes of the query texts
    passage_keys: Tensor  # (W*B, K) hashes of the passage texts, positives first
    first_row: int  # of this rank
    num_rows: int  # B
    num_positives: int  # P

    @property
    def own(self) -> slice:
        """This rank's rows."""
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def own_positive_keys(self) -> Tensor:
        return self.passage_keys[self.own, : self.num_positives]  # (B, P)

    def negatives(self, start: int, stop: int) -> Tensor:
        """Which passages of columns [start, stop) are negatives of which of this rank's queries: (B, stop - start) bool.

        By the exact text: a passage is none if its text is one of the query's own positives, or if it is a positive of another
        row with the same query text.
        """
        num_passages = self.passage_keys.shape[1]
        columns = torch.arange(start, min(stop, self.passage_keys.numel()), device=self.query_keys.device)  # (T,)
        row = columns // num_passages  # (T,)
        is_positive_slot = columns % num_passages < self.num_positives  # (T,)
        false_negative = (self.query_keys[self.own, None] == self.query_keys[row]) & is_positive_slot  # (B, T)
        keys = self.passage_keys.flatten()[columns]  # (T,)
        for positive in self.own_positive_keys.unbind(dim=1):
            false_negative |= positive[:, None] == keys
        return ~false_negative

    def own_negatives(self) -> Tensor:
        """Which of its own row's K passages are negatives of a query: (B, K) bool."""
        return (self.passage_keys[self.own, :, None] != self.own_positive_keys[:, None, :]).all(dim=-1)


def contrastive_loss(
    queries: Tensor,
    passages: Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    form: Literal["infonce", "supcon"] = "infonce",
    miner_epsilon: float | None = None,
    margin: float | None = None,
    ratio: float | None = None,
    in_batch_negatives: bool = True,
    tile_passages: int = TILE_PASSAGES,
) -> Tensor:
    """How far each query's positives are from standing out among its negatives, in one of two forms.

    `infonce`: -log of a positive's share among itself and the negatives, averaged over the query's positives; the other
    positives are not in its denominator (van den Oord et al. 2018, eq. 4; ULLME section 3). `supcon`: the same with all
    positives of the query in the denominator (Khosla et al. 2020, eq. 2; queries are the anchors, passages the references).

    False negatives by score: a negative is dropped if its cosine is above `positive - margin` or above
    `positive - (1 - ratio) * |positive|`, that is `ratio * positive` unless the positive's cosine is below 0. Of several
    positives the lowest counts, as in sentence-transformers' mine_hard_negatives (NV-Retriever has one positive only).

    The miner is that of Wang et al. 2019, section 4.1, as in pytorch-metric-learning: a positive is kept if its cosine is
    below that of the hardest negative + epsilon, a negative if its cosine is above that of the lowest positive - epsilon.
    It sees the negatives that the filters left. Means are over kept positives; a query that keeps none has loss 0.

    Args:
        queries: (B, D) unit rows.
        passages: (W*B*K, D) unit rows, those of all ranks.
        candidates: whose they are; every query has a positive.
        temperature: divides the cosines.
        in_batch_negatives: False leaves a query its own row's passages only.
        tile_passages: passages compared at a time; decides memory, never the result.

    Returns:
        (B,) float32 (float64 for float64 rows). An infonce query without negatives has loss 0.
    """
    precise = torch.promote_types(queries.dtype, torch.float32)
    own_passages = passages.unflatten(0, candidates.passage_keys.shape)[candidates.own]  # (B, K, D)
    cosines = torch.einsum("bd,bkd->bk", queries.to(precise), own_passages.to(precise))  # (B, K)
    positives = cosines[:, : candidates.num_positives]  # (B, P)
    lowest_positive = positives.detach().amin(dim=1, keepdim=True)  # (B, 1)

    bounds = _Bounds(
        above=None if miner_epsilon is None else lowest_positive - miner_epsilon,
        at_most=_score_limit(lowest_positive, margin, ratio),
    )
    if in_batch_negatives:
        negatives, hardest = _TiledNegatives.apply(
            queries, passages, candidates, bounds, temperature, tile_passages
        )  # (B,) each
    else:
        negative = bounds.keep(candidates.own_negatives(), cosines.detach())  # (B, K)
        hardest = cosines.detach().masked_fill(~negative, -torch.inf).amax(dim=1)  # (B,)
        negatives = _logsumexp(cosines / temperature, negative)  # (B,)

    kept = torch.ones_like(positives, dtype=torch.bool)  # (B, P)
    if miner_epsilon is not None:
        kept = ~(positives.detach() - miner_epsilon >= hardest[:, None])  # in this form nan is kept too, and seen in the loss
    logits = positives / temperature  # (B, P)
    own_term = logits if form == "infonce" else _logsumexp(logits, kept)[:, None]  # (B, P) or (B, 1)
    losses = torch.logaddexp(own_term, negatives[:, None]) - logits  # (B, P)
    return losses.where(kept, 0).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


class _Bounds(NamedTuple):
    """Between which cosines a negative is kept, (B, 1) each or None. One that is nan is kept, so that the loss shows it."""

    above: Tensor | None
    at_most: Tensor | None

    def keep(self, negative: Tensor, cosines: Tensor) -> Tensor:
        if self.above is not None:
            negative = negative & ~(cosines <= self.above)
        if self.at_most is not None:
            negative = negative & ~(cosines > self.at_most)
        return negative


def _score_limit(positive: Tensor, margin: float | None, ratio: float | None) -> Tensor | None:
    limit = None if margin is None else positive - margin
    if ratio is not None:
        relative = positive - (1 - ratio) * positive.abs()
        limit = relative if limit is None else torch.minimum(limit, relative)
    return limit


def _logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Over the masked ones of a row. The lowest finite value stands for none, whose gradient is 0 and not nan."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).logsumexp(dim=1)


class _TiledNegatives(torch.autograd.Function):
    """(logsumexp of cosine / temperature, highest cosine) over a query's negatives, in tiles that backward computes again."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, passages: Tensor, candidates: Candidates, bounds: _Bounds, temperature: float, tile: int
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(queries.dtype, torch.float32)
        total = torch.full((len(queries),), -torch.inf, dtype=precise, device=queries.device)  # (B,)
        hardest = total.clone()  # (B,)
        for start in range(0, len(passages), tile):
            cosines = queries.to(precise) @ passages[start : start + tile].to(precise).T  # (B, T)
            negative = bounds.keep(candidates.negatives(start, start + tile), cosines)  # (B, T)
            cosines.masked_fill_(~negative, -torch.inf)
            hardest = torch.maximum(hardest, cosines.amax(dim=1))
            total = torch.logaddexp(total, (cosines / temperature).logsumexp(dim=1))
        ctx.save_for_backward(queries, passages, total)
        ctx.others = (candidates, bounds, temperature, tile)
        ctx.mark_non_differentiable(hardest)
        return total, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, passages, total = ctx.saved_tensors
        candidates, bounds, temperature, tile = ctx.others
        rows = queries.to(total.dtype)  # (B, D)
        query_grad = torch.zeros_like(rows)  # (B, D)
        passage_grad = torch.empty_like(passages)  # (M, D)
        for start in range(0, len(passages), tile):
            columns = passages[start : start + tile].to(total.dtype)  # (T, D)
            cosines = rows @ columns.T  # (B, T)
            negative = bounds.keep(candidates.negatives(start, start + tile), cosines)  # (B, T)
            share = (cosines / temperature - total[:, None]).exp_()  # (B, T), meant at negatives only
            pull = share.masked_fill_(~negative, 0) * (grad / temperature)[:, None]  # (B, T)
            query_grad.addmm_(pull, columns)
            passage_grad[start : start + tile] = pull.T @ rows
        return query_grad.to(queries.dtype), passage_grad, None, None, None, None
