"""The KL term that makes GRL: embedding relevance and generation relevance of one query's passages (METHOD: losses, 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def alignment_kl(
    cosines: Tensor,
    mean_logps: Tensor,
    *,
    rep_temperature: float,
    gen_temperature: float,
    direction: Literal["rep_gen", "gen_rep"] = "rep_gen",
    detach_gen: bool = True,
) -> Tensor:
    """KL between softmax(cos / rep_temperature) and softmax(mean log-prob / gen_temperature) over K passages (ULLME, GRL).

    Args:
        cosines: (B, K) cosine of a query and its own passages.
        mean_logps: (B, K) mean token log-probability of each passage given the query.
        direction: rep_gen is KL(P_rep || P_gen), the paper's; gen_rep the reverse, both original code bases'.
        detach_gen: no gradient into the generation side.

    Returns:
        (B,)
    """
    gen = mean_logps.detach() if detach_gen else mean_logps
    log_rep = (cosines / rep_temperature).log_softmax(dim=1)  # (B, K)
    log_gen = (gen / gen_temperature).log_softmax(dim=1)  # (B, K)
    first, second = (log_rep, log_gen) if direction == "rep_gen" else (log_gen, log_rep)
    return (first.exp() * (first - second)).sum(dim=1)
