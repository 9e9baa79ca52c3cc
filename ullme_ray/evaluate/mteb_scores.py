"""MTEB scores as the report has them, without loading mteb, which takes seconds.

`mteb` in report.json:

    model, revision, folder (relative to evaluation/)
    tasks    a list: task, type, score (its main score, the mean over splits and subsets), measure, seconds, file
    failed   task -> why it could not be run
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskScore:
    task: str
    type: str
    score: float
    measure: str
    seconds: float
    file: str


@dataclass(frozen=True)
class MtebScores:
    model: str
    revision: str
    folder: str
    tasks: tuple[TaskScore, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
