"""Every error that a user can meet. Each says what, the value, where in the job, and what to do.

Errors travel between processes (Ray pickles them), so each keeps its constructor arguments in `args`.
"""

from __future__ import annotations

from dataclasses import dataclass


class UllmeError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job file: `where` is a dotted path, `line` counts from 1 (None: set on the command line)."""

    where: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line is not None else ""
        return f"{place}{self.where} {self.message}" if self.where else f"{place}{self.message}"


class JobFileError(UllmeError):
    """A job file that cannot be run as written; holds every problem found, not just the first."""

    exit_code = 2

    def __init__(self, source: str, problems: list[Problem]) -> None:
        super().__init__(source, problems)
        self.source = source
        self.problems = sorted(problems, key=lambda p: (p.line is None, p.line or 0, p.where))

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.source}: {count} problem{'s' if count != 1 else ''}"
        return "\n".join([head, *(f"  {p}" for p in self.problems)])


class StorageError(UllmeError):
    """A folder or object store that cannot be read or written as the job needs."""


class ModelError(UllmeError):
    """A model that cannot be loaded, or cannot do what an embedder must (bidirectional attention, for one)."""


class DataError(UllmeError):
    """Training, evaluation or corpus rows that cannot be used."""


class TrainingError(UllmeError):
    """Training that must not go on, such as a loss that is no longer finite."""


class CollectiveError(TrainingError):
    """An operation of all ranks that some of them did not answer in time, or any more."""


class EmbedError(UllmeError):
    """An embedding run that cannot be completed or committed."""


class ExportError(UllmeError):
    """A vector store that cannot take the table."""


class MineError(UllmeError):
    """Mining of hard negatives that cannot be completed."""


class ServeError(UllmeError):
    """A server that cannot start, or whose vectors differ from the export's."""
