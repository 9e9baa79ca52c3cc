"""Generation losses over log p(passage | query) (METHOD: losses, 2).

Only here are positives called chosen and hard negatives rejected. The log-ratio of a passage is its log-probability under the
model minus that under the reference; without a reference (None) all passages count as equally likely under it.
Cost: a few numbers per query.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Pairs = Literal["all", "first"]


def sft(mean_logps: Tensor, *, num_positives: int) -> Tensor:
    """Mean negative log-likelihood per token of the positives.

    Args:
        mean_logps: (B, K) mean log-probability of a passage's tokens, positives first.

    Returns:
        (B,)
    """
    return -mean_logps[:, :num_positives].mean(dim=1)


def dpo(
    logps: Tensor,
    reference_logps: Tensor | None,
    *,
    num_positives: int,
    beta: float,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
) -> Tensor:
    """Sigmoid DPO, averaged over a query's pairs (Rafailov et al. 2023, eq. 7; `label_smoothing`: Mitchell 2023).

    Args:
        logps: (B, K) summed log-probabilities under the model, positives first.
        reference_logps: (B, K) under the reference model, or None.
        num_positives: P; the other K - P passages are the rejected ones.
        beta: strength of the pull to the reference.
        pairs: every positive x negative, or the first of each.

    Returns:
        (B,)
    """
    margins = beta * _margins(logps, reference_logps, num_positives, pairs)  # (B, P, N)
    return _mean(-(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins))


def ipo(
    mean_logps: Tensor, mean_reference_logps: Tensor | None, *, num_positives: int, beta: float, pairs: Pairs = "all"
) -> Tensor:
    """(margin - 1 / (2 beta))^2, averaged over a query's pairs (Azar et al. 2023, eq. 17, whose tau is beta).

    Args as in `dpo`, but of mean log-probabilities per token: the squared loss would grow with the length otherwise. So does
    trl, whose authors confirmed it with those of the paper.
    """
    return _mean((_margins(mean_logps, mean_reference_logps, num_positives, pairs) - 1 / (2 * beta)).square())


def hinge(logps: Tensor, reference_logps: Tensor | None, *, num_positives: int, beta: float, pairs: Pairs = "all") -> Tensor:
    """max(0, 1 - beta * margin), averaged over a query's pairs (Zhao et al. 2023, SLiC; Liu et al. 2024). Args as in `dpo`."""
    return _mean(torch.relu(1 - beta * _margins(logps, reference_logps, num_positives, pairs)))


def kto(
    logps: Tensor,
    reference_logps: Tensor | None,
    *,
    num_positives: int,
    beta: float,
    kl: tuple[Tensor, Tensor],
    pairs: Pairs = "all",
) -> Tensor:
    """Paired KTO (Ethayarajh et al. 2024, eq. 8 with both weights 1; trl's former `kto_pair`), averaged over a query's pairs.

    With log-ratios c of the chosen, r of the rejected passage and KL estimates z, each taken from the other side of the batch:
    ((1 - sigmoid(beta * (c - z_rejected))) + (1 - sigmoid(beta * (z_chosen - r)))) / 2.

    Args:
        logps, reference_logps, num_positives, beta, pairs: as in `dpo`.
        kl: (z_chosen, z_rejected) before they are cut off at 0 here: the mean log-ratio of each side over all queries of all
            ranks and chunks, from `log_ratio_sums`. No gradient goes into them.

    Returns:
        (B,)
    """
    chosen, rejected = _log_ratios(logps, reference_logps, num_positives, pairs)  # (B, P), (B, N)
    chosen_kl, rejected_kl = (side.detach().clamp(min=0) for side in kl)
    chosen_loss = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    rejected_loss = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    # The mean over P x N pairs of a sum of a chosen and a rejected term is the sum of the two means.
    return (chosen_loss.mean(dim=1) + rejected_loss.mean(dim=1)) / 2


def log_ratio_sums(logps: Tensor, reference_logps: Tensor | None, *, num_positives: int, pairs: Pairs = "all") -> Tensor:
    """What `kto`'s estimates are averaged from: add these up over chunks and ranks, then divide the first column by the second.

    Args as in `dpo`.

    Returns:
        (2, 2): [[sum, count] of the chosen, [sum, count] of the rejected], without gradient.
    """
    with torch.no_grad():
        sides = _log_ratios(logps, reference_logps, num_positives, pairs)
        return torch.stack([torch.stack([side.sum(), side.new_tensor(side.numel())]) for side in sides])


def _log_ratios(logps: Tensor, reference_logps: Tensor | None, num_positives: int, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Chosen (B, P) and rejected (B, N), or (B, 1) each."""
    assert logps.shape[1] > num_positives, "a preference needs a hard negative"
    ratios = logps - reference_logps if reference_logps is not None else logps  # (B, K)
    chosen, rejected = ratios[:, :num_positives], ratios[:, num_positives:]
    return (chosen[:, :1], rejected[:, :1]) if pairs == "first" else (chosen, rejected)


def _margins(logps: Tensor, reference_logps: Tensor | None, num_positives: int, pairs: Pairs) -> Tensor:
    chosen, rejected = _log_ratios(logps, reference_logps, num_positives, pairs)
    return chosen[:, :, None] - rejected[:, None, :]  # (B, P, N)


def _mean(losses: Tensor) -> Tensor:
    return losses.flatten(1).mean(dim=1)  # (B, P, N) -> (B,)
