"""Embeddings tables as `ullme-ray embed` writes them, without a model: for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

from ullme_ray.embed.parquet import parquet_bytes
from ullme_ray.table import PROVENANCE_KEY, find_table
from ullme_ray.vectors import VectorFormat

FINGERPRINT = "f" * 64


def make_vectors(count: int, width: int = 64, seed: int = 0) -> np.ndarray:
    """(count, width) float32 of unit length, with dimensions of unlike size as those of a language model."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(count, width)) * np.geomspace(1, 8, width) + np.linspace(-1, 1, width)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def write_table(
    folder: Path,
    form: VectorFormat,
    vectors: np.ndarray,
    columns: dict[str, Any],
    *,
    fingerprint: str = FINGERPRINT,
    job: str = "docs",
    num_parts: int = 2,
    chunks: list[int] | None = None,
) -> None:
    """The next version of the table, holding just these rows, in parts of which the last is empty.

    Args:
        columns: the id column first, then those passed through; Arrow arrays or lists.
        chunks: the number of each row's chunk; absent means that no document is split.
    """
    form = form.calibrated(vectors) if form.is_scaled and not form.ranges_data else form
    stored = form.encode(vectors)
    id_name, *others = columns
    rows = pa.table(
        {
            id_name: columns[id_name],
            "chunk": pa.array(chunks or [0] * len(vectors), pa.int32()),
            "embedding": form.to_arrow(stored),
            "content_hash": [hashlib.sha256(str(i).encode()).hexdigest() for i in columns[id_name]],
            "num_tokens": pa.array([len(str(i)) for i in columns[id_name]], pa.int32()),
            "truncated": [False] * len(vectors),
            **{name: columns[name] for name in others},
        }
    )
    noted = {"job": job, "fingerprint": fingerprint, "vectors": form.provenance(stored.shape[1])}
    rows = rows.replace_schema_metadata({PROVENANCE_KEY: json.dumps(noted)})
    cuts = [len(vectors) * part // num_parts for part in range(num_parts + 1)] + [len(vectors)]
    folder.mkdir(parents=True, exist_ok=True)
    actions = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        name = f"part-{time.time_ns()}-{number}.parquet"
        data = parquet_bytes(rows.slice(start, stop - start))
        (folder / name).write_bytes(data)
        statistics = json.dumps({"numRecords": stop - start})
        actions.append(AddAction(name, len(data), {}, time.time_ns() // 1_000_000, True, statistics))
    place = rows.schema.get_field_index("embedding")
    schema = Schema.from_arrow(rows.schema.remove_metadata().set(place, pa.field("embedding", form.delta_type)))
    table = find_table(str(folder))
    if table is None:
        create_table_with_add_actions(str(folder), schema, actions, name=job)
    else:
        table.create_write_transaction(actions, "overwrite", schema)
