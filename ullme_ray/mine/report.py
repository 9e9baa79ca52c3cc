"""What mining did, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MineReport:
    """Scores are cosines. `rows_without` of the `rows_short` have no negative at all; they are written all the same."""

    rows: int
    queries: int
    passages: int
    negatives: int
    rows_short: int
    rows_without: int
    mean_positive_score: float
    mean_negative_score: float
    rows_rejected: int
    corpus_rejected: int
    encoder: str
    fingerprint: str
    seconds: float
    outputs: tuple[str, ...]
