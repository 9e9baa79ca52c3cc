"""Ids that stand for more than one row of the corpus: found over the whole table, on the cluster, after a run that changed it.

Costs one read of the id column. Ids are compared by 64-bit hashes, spread over as many tasks as keep each within memory; the
driver holds the duplicates alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from ullme_ray import storage
from ullme_ray.embed.flow import STAGE
from ullme_ray.embed.parts import Part, PartKey, reading_part
from ullme_ray.embed.reading import find_duplicates, id_hashes
from ullme_ray.embed.steps import EmbedContext
from ullme_ray.ray_data import explained
from ullme_ray.table import id_column

_PARTS_PER_TASK = 32
_ROWS_PER_TASK = 20_000_000
_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Duplicates:
    num_ids: int | None = 0
    examples: tuple[str, ...] = ()


def find_duplicate_ids(context: EmbedContext, parts: Mapping[PartKey, Part]) -> Duplicates:
    """How many ids stand for more than one row of the corpus, and some of them.

    Raises:
        UllmeError: a part of the table cannot be read.
    """
    if context.settings.input.id is None:
        return Duplicates()  # ids made of file and row differ by themselves
    column = id_column(context.settings.input)
    names = sorted(part.name for part in parts.values() if part.num_rows)
    num_groups = 1 + sum(part.num_rows for part in parts.values()) // _ROWS_PER_TASK
    read = ray.remote(_hashes_by_group).options(num_cpus=1, num_returns=num_groups)
    batches = [names[start : start + _PARTS_PER_TASK] for start in range(0, len(names), _PARTS_PER_TASK)]
    hashed: list[Any] = [read.remote(context.folder, batch, column, num_groups) for batch in batches]
    by_group = zip(*hashed) if num_groups > 1 else [hashed]
    repeated = ray.remote(_repeated).options(num_cpus=1)
    try:
        found = np.concatenate([np.empty(0, np.uint64), *ray.get([repeated.remote(*group) for group in by_group])])
    except ray.exceptions.RayError as error:
        raise explained(STAGE, error) from error
    return Duplicates(len(found), _examples(context.folder, names, column, found[:_NUM_EXAMPLES]) if len(found) else ())


def _hashes_by_group(folder: str, names: list[str], column: str, num_groups: int) -> Any:
    hashes = np.concatenate([id_hashes(_ids(folder, name, column)) for name in names])
    groups = [hashes[hashes % np.uint64(num_groups) == group] for group in range(num_groups)]
    return groups if num_groups > 1 else groups[0]


def _ids(folder: str, name: str, column: str) -> pa.ChunkedArray:
    """The ids of a part's documents, once each: not of all their chunks."""
    with reading_part(storage.join(folder, name)) as stream:
        rows = pq.read_table(stream, columns=[column, "chunk"])
    return rows.filter(pc.equal(rows["chunk"], 0))[column]


def _repeated(*pieces: np.ndarray) -> np.ndarray:
    return find_duplicates(pieces)


def _examples(folder: str, names: list[str], column: str, wanted: np.ndarray) -> tuple[str, ...]:
    """Reads parts until each of the hashes has been met."""
    found: dict[int, str] = {}
    for name in names:
        ids = _ids(folder, name, column)
        hashes = id_hashes(ids)
        for row in np.flatnonzero(np.isin(hashes, wanted)):
            found.setdefault(int(hashes[row]), str(ids[int(row)].as_py()))
        if len(found) == len(wanted):
            break
    return tuple(sorted(found.values()))
