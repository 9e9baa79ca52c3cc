"""What the generation checks found, as the report has it.

`generation` in report.json:

    path, version, num_rows, num_passages (query-passage pairs scored)
    models   a list, base and trained:
      model, fingerprint, note (empty, or why nothing was measured: then all below is null)
      perplexity            of the positives' tokens given the query, and `perplexity_interval` [low, high], 95 % bootstrap
      preference_accuracy   share of (positive, own negative) pairs in which the positive has the higher log-probability per
                            token; 1/2 for a tie; and `preference_interval`; null where no row has negatives of its own
      preference_accuracy_summed  the same by summed log-probability, as DPO compares them
      kendall_tau           tau-b between a query's passages ranked by cosine and by log-probability per token, mean over the
                            queries; and `tau_interval`
      results               file of the values per query: {..., "per_query": [{query, cosines, logps, lengths, num_positives,
                            num_negatives}]}, passages in the order positives, own negatives, of other rows
"""

from __future__ import annotations

from dataclasses import dataclass

Bounds = tuple[float, float]


@dataclass(frozen=True)
class GenerationScores:
    model: str
    fingerprint: str
    note: str = ""
    perplexity: float | None = None
    perplexity_interval: Bounds | None = None
    preference_accuracy: float | None = None
    preference_interval: Bounds | None = None
    preference_accuracy_summed: float | None = None
    kendall_tau: float | None = None
    tau_interval: Bounds | None = None
    results: str = ""


@dataclass(frozen=True)
class GenerationReport:
    path: str
    version: str
    num_rows: int
    num_passages: int
    models: tuple[GenerationScores, ...]
