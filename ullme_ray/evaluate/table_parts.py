"""The parts of an embeddings table as what searches it sees them."""

from __future__ import annotations

import json
from typing import Any

from deltalake import DeltaTable

from ullme_ray.errors import EmbedError
from ullme_ray.table import PROVENANCE_KEY

EMBEDDING_COLUMN = "embedding"


def sorted_parts(table: DeltaTable) -> list[Any]:
    """The table's Parquet files as pyarrow's fragments, in name order, so that equal tables give equal answers."""
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
