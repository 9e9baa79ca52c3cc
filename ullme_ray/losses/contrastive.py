"""InfoNCE over the positives and hard negatives of all ranks (METHOD: losses, 1). Cost: one (B, W*B*K) similarity per rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CandidateMasks(NamedTuple):
    """What each of B queries takes each of M passages for; a passage may be neither."""

    positive: Tensor  # (B, M) bool
    negative: Tensor  # (B, M) bool


def candidate_masks(
    query_keys: Tensor, passage_keys: Tensor, *, first_row: int, num_rows: int, num_positives: int
) -> CandidateMasks:
    """Tells positives, negatives and false negatives apart by the exact text, over all ranks.

    A passage is no negative of a query if its text is one of the query's own positives, or if it is a positive of another row
    with the same query text.

    Args:
        query_keys: (W*B,) hashes of the query texts of all ranks.
        passage_keys: (W*B, K) hashes of the passage texts of all ranks, positives first.
        first_row: this rank's first row among the W*B.
        num_rows: B.
        num_positives: P.

    Returns:
        Masks (B, W*B*K); passage j of row i stands at column i*K + j.
    """
    total_rows, num_passages = passage_keys.shape
    own = slice(first_row, first_row + num_rows)
    rows = torch.arange(total_rows, device=query_keys.device)
    is_positive_slot = torch.arange(num_passages, device=query_keys.device) < num_positives  # (K,)

    own_row = rows[own, None] == rows[None, :]  # (B, W*B)
    same_query = query_keys[own, None] == query_keys[None, :]  # (B, W*B)
    positive = own_row[:, :, None] & is_positive_slot  # (B, W*B, K)
    sibling = same_query[:, :, None] & is_positive_slot  # (B, W*B, K)
    own_positive_keys = passage_keys[own, :num_positives]  # (B, P)
    same_text = (passage_keys[None, :, :, None] == own_positive_keys[:, None, None, :]).any(dim=-1)  # (B, W*B, K)
    negative = ~(positive | sibling | same_text)
    return CandidateMasks(positive.flatten(1), negative.flatten(1))


def infonce(queries: Tensor, passages: Tensor, masks: CandidateMasks, *, temperature: float) -> Tensor:
    """-log of each positive's share among itself and the negatives, averaged over a query's positives.

    The other positives of a query are not in a positive's denominator. van den Oord et al. 2018, eq. 4; ULLME section 3.

    Args:
        queries: (B, D) unit rows.
        passages: (M, D) unit rows.
        masks: (B, M) each; every query has a positive. A query without negatives has loss 0.
        temperature: divides the cosines.

    Returns:
        (B,) float32.
    """
    scores = queries.float() @ passages.float().T / temperature  # (B, M)
    lowest = torch.finfo(scores.dtype).min  # finite: an all-masked row must give gradient 0, not nan
    negatives = scores.masked_fill(~masks.negative, lowest).logsumexp(dim=1, keepdim=True)  # (B, 1)
    loss = torch.logaddexp(scores, negatives) - scores  # (B, M), meant at positives only
    return (loss * masks.positive).sum(dim=1) / masks.positive.sum(dim=1)
