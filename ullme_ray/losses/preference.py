"""Generation losses over log p(passage | query) (METHOD: losses, 2).

Only here are positives called chosen and hard negatives rejected.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
    pairs: Literal["all", "first"] = "all",
) -> Tensor:
    """Sigmoid DPO, averaged over a query's pairs (Rafailov et al. 2023, eq. 7; `label_smoothing`: Mitchell 2023).

    Args:
        logps: (B, K) summed log-probabilities under the model, positives first.
        reference_logps: (B, K) under the reference model; None is a reference that holds all passages equally likely.
        num_positives: P; the other K - P passages are the rejected ones.
        pairs: every positive x negative, or the first of each.

    Returns:
        (B,)
    """
    rewards = logps - reference_logps if reference_logps is not None else logps  # (B, K)
    chosen, rejected = rewards[:, :num_positives], rewards[:, num_positives:]
    if pairs == "first":
        chosen, rejected = chosen[:, :1], rejected[:, :1]
    margin = beta * (chosen[:, :, None] - rejected[:, None, :])  # (B, P, N)
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return torch.flatten(loss, 1).mean(dim=1)
