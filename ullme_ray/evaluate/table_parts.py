"""An embeddings table as what searches it sees it: parts in a fixed order, their rows numbered from 0 through all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from ullme_ray.errors import EmbedError
from ullme_ray.table import PROVENANCE_KEY, open_table
from ullme_ray.vectors import VectorFormat, format_of

EMBEDDING_COLUMN = "embedding"
BATCH_ROWS = 16_384


@dataclass(frozen=True)
class TableRows:
    """One version of a table."""

    path: str
    version: str  # with the table's own id: one made anew is another
    parts: tuple[Any, ...]  # pyarrow's fragments, in name order, so that equal tables give equal answers

    @classmethod
    def open(cls, path: str) -> TableRows:
        """Raises StorageError where there is no table."""
        table = open_table(path)
        return cls(path, f"{table.metadata().id}-{table.version()}", tuple(sorted_parts(table)))

    @cached_property
    def first_rows(self) -> np.ndarray:
        """(parts + 1,): the number of each part's first row, and that of all rows at the end."""
        return np.cumsum([0, *(part.count_rows() for part in self.parts)])

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])

    @property
    def form(self) -> VectorFormat:
        """How the vectors are stored: those of one version are all alike."""
        return format_of(self.parts[0].physical_schema.metadata) if self.parts else VectorFormat()

    @property
    def columns(self) -> pa.Schema:
        return self.parts[0].physical_schema if self.parts else pa.schema([])

    def check_model(self, fingerprint: str) -> None:
        for part in self.parts:
            check_model(part, fingerprint, self.path)

    def vectors(self, keep: Sequence[np.ndarray | None] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers, their vectors (n, D)), a batch at a time.

        Args:
            keep: for each part which of its rows are wanted, or None for all; a part of which none is wanted is not read.
        """
        for number, part in enumerate(self.parts):
            wanted = keep[number] if keep is not None else None
            if wanted is not None and not wanted.any():
                continue
            form, start = format_of(part.physical_schema.metadata), 0
            for batch in part.to_batches(columns=[EMBEDDING_COLUMN], batch_size=BATCH_ROWS):
                rows = np.arange(start, start + batch.num_rows)
                start += batch.num_rows
                column = batch.column(0)
                if wanted is not None:
                    rows = rows[wanted[rows]]
                    column = column.filter(pa.array(wanted[start - batch.num_rows : start]))
                if len(rows):
                    yield self.first_rows[number] + rows, form.decode(form.from_arrow(column))

    def read(self, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of some rows, in the order asked for."""
        found: dict[int, dict[str, Any]] = {}
        numbers = np.searchsorted(self.first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            mine = [row for row, part in zip(rows, numbers) if part == number]
            places = pa.array([row - int(self.first_rows[number]) for row in mine])
            found |= dict(zip(mine, self.parts[number].take(places, columns=list(names)).to_pylist()))
        return [found[row] for row in rows]


def sorted_parts(table: DeltaTable) -> list[Any]:
    return sorted(table.to_pyarrow_dataset().get_fragments(), key=lambda part: part.path)


def check_model(part: Any, fingerprint: str, path: str) -> None:
    """Raises EmbedError unless the part holds vectors of the model that made the question's."""
    provenance = (part.physical_schema.metadata or {}).get(PROVENANCE_KEY)
    if provenance is None:
        raise EmbedError(f"{path} holds {part.path}, which `ullme-ray embed` did not write; it cannot be searched")
    made_by = json.loads(provenance)["fingerprint"]
    if made_by != fingerprint:
        raise EmbedError(
            f"the table {path} was made by another model (fingerprint {made_by[:12]}) than the question's vector "
            f"({fingerprint[:12]}); run `ullme-ray embed` on this job again"
        )
