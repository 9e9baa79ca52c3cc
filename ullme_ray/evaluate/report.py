"""What an evaluation found: measures of every model on every set, as JSON and as a table of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelScores:
    """Means over the queries of one set."""

    model: str  # base | trained | bm25
    fingerprint: str
    measures: dict[str, float]


@dataclass(frozen=True)
class SetScores:
    path: str
    version: str
    num_queries: int
    num_passages: int
    models: tuple[ModelScores, ...]


@dataclass(frozen=True)
class EvaluationReport:
    job: str
    sets: tuple[SetScores, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """One table a set, a line per model."""
        return "\n\n".join(_table(scores) for scores in self.sets)


def _table(scores: SetScores) -> str:
    names = list(scores.models[0].measures) if scores.models else []
    rows = [["model", *names]]
    rows += [[found.model, *(f"{found.measures[name]:.4f}" for name in names)] for found in scores.models]
    head = f"{scores.path}: {scores.num_queries:,} queries, {scores.num_passages:,} passages"
    return "\n".join([head, *_aligned(rows)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
