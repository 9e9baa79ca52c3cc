"""Which texts the table holds already: content hash -> where their vectors lie, over the parts of all files.

Nightly exports come under new names, in another order and in files of other sizes, so the look-up spans the whole table. Only
parts of the same recipe count: their vectors are what the model would compute again. Building it reads the `content_hash`
column of every such part once, on the cluster; it takes 28 bytes a document, in Ray's object store, and is read there by all
processes of a node without a copy. A run with nothing new or changed builds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ullme_ray import storage
from ullme_ray.embed.parts import ChunkRows, Part

_PARTS_PER_TASK = 16
_PARTS_HELD = 8  # decoded parts that a reading process keeps, since rows of one unit mostly come from few parts
_COPIED = ["content_hash", "chunk", "embedding", "num_tokens", "truncated"]
_ENTRY = np.dtype([("first", "<u8"), ("second", "<u8"), ("part", "<i4"), ("row", "<i4"), ("count", "<i4")])


@dataclass(frozen=True)
class ContentIndex:
    """Sorted by hash; small to send, for the entries lie in the object store."""

    folder: str
    names: tuple[str, ...]  # of parts, by number
    entries: Any  # reference to an array of _ENTRY

    def find(self, hashes: Sequence[str]) -> Found:
        """Where the vectors of these content hashes lie."""
        return Found(self, lookup(ray.get(self.entries), hashes))


@dataclass(frozen=True)
class Found:
    """One entry per document asked for; `count` is 0 where the table does not hold it."""

    index: ContentIndex
    entries: np.ndarray

    def read(self, hashes: Sequence[str]) -> ChunkRows | None:
        """The stored rows of all documents found, each under its place in `hashes`; None where none was found.

        A part that does not hold what the index says (damaged, or removed by a vacuum) counts as not found.
        """
        places = np.flatnonzero(self.entries["count"])
        places = places[np.argsort(self.entries["part"][places], kind="stable")]
        runs = np.split(places, np.flatnonzero(np.diff(self.entries["part"][places])) + 1)
        pieces = [piece for run in runs if len(run) and (piece := self._read_part(run, hashes)) is not None]
        if not pieces:
            return None
        joined = ChunkRows.join(pieces)
        return joined.take(np.argsort(joined.document, kind="stable"))

    def _read_part(self, places: np.ndarray, hashes: Sequence[str]) -> ChunkRows | None:
        wanted = self.entries[places]
        stored = _open_rows(storage.join(self.index.folder, self.index.names[wanted["part"][0]]))
        if stored is None:
            return None
        rows = np.concatenate([np.arange(entry["row"], entry["row"] + entry["count"]) for entry in wanted])
        documents = np.repeat(places, wanted["count"])
        if rows.max() >= len(stored.rows) or stored.hashes.take(pa.array(rows)).to_pylist() != [hashes[d] for d in documents]:
            return None
        taken = stored.rows.take(rows)
        return ChunkRows(documents, taken.chunk, taken.embedding, taken.num_tokens, taken.truncated)


@dataclass(frozen=True)
class _StoredPart:
    hashes: pa.Array
    rows: ChunkRows


@lru_cache(maxsize=_PARTS_HELD)
def _open_rows(path: str) -> _StoredPart | None:
    try:
        with storage.open_read(path) as stream:
            rows = pq.read_table(stream, columns=_COPIED).combine_chunks()
    except (pa.ArrowException, FileNotFoundError):
        return None
    if not rows.num_rows:
        return None
    embedding = rows["embedding"].chunk(0)
    return _StoredPart(
        rows["content_hash"].chunk(0),
        ChunkRows(
            np.zeros(rows.num_rows, np.int64),
            rows["chunk"].to_numpy(),
            embedding.flatten().to_numpy().reshape(rows.num_rows, -1),
            rows["num_tokens"].to_numpy(),
            rows["truncated"].to_numpy(),
        ),
    )


def build_index(folder: str, parts: Iterable[Part]) -> ContentIndex | None:
    """The index over these parts; None where they hold no rows."""
    names = tuple(sorted(part.name for part in parts if part.num_rows))
    if not names:
        return None
    read = ray.remote(_read_entries).options(num_cpus=1)
    pieces = [read.remote(folder, names, first) for first in range(0, len(names), _PARTS_PER_TASK)]
    return ContentIndex(folder, names, ray.remote(_sorted_entries).options(num_cpus=1).remote(*pieces))


def _read_entries(folder: str, names: Sequence[str], first: int) -> np.ndarray:
    pieces = []
    for number in range(first, min(first + _PARTS_PER_TASK, len(names))):
        try:
            with storage.open_read(storage.join(folder, names[number])) as stream:
                rows = pq.read_table(stream, columns=["content_hash", "chunk"])
        except (pa.ArrowException, FileNotFoundError):
            continue  # damaged, or gone with a version that nobody needs: its texts are embedded again where they are wanted
        pieces.append(entries_of(number, rows["content_hash"].to_pylist(), rows["chunk"].to_numpy()))
    return np.concatenate([np.empty(0, _ENTRY), *pieces])


def entries_of(part: int, hashes: Sequence[str], chunks: np.ndarray) -> np.ndarray:
    """Entries of one part from its columns: a document starts where the chunk number is 0."""
    starts = np.flatnonzero(chunks == 0)
    entries = np.empty(len(starts), _ENTRY)
    entries["first"], entries["second"] = _split([hashes[start] for start in starts.tolist()])
    entries["part"], entries["row"] = part, starts
    entries["count"] = np.diff(np.append(starts, len(hashes)))
    return entries


def _sorted_entries(*pieces: np.ndarray) -> np.ndarray:
    """One entry per hash, sorted by its first half; of two texts with equal first halves one is lost, and embedded again."""
    entries = np.concatenate(pieces)
    return entries[np.unique(entries["first"], return_index=True)[1]]


def lookup(entries: np.ndarray, hashes: Sequence[str]) -> np.ndarray:
    """One entry per hash, of count 0 where there is none."""
    if not len(entries):
        return np.zeros(len(hashes), _ENTRY)
    first, second = _split(hashes)
    places = np.minimum(np.searchsorted(entries["first"], first), len(entries) - 1)
    found = entries[places]
    found["count"][(found["first"] != first) | (found["second"] != second)] = 0
    return found


def _split(hashes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The first 128 bits of hexadecimal hashes as two columns."""
    data = np.frombuffer(bytes.fromhex("".join(text[:32] for text in hashes)), dtype=">u8").reshape(-1, 2)
    return data[:, 0].astype("<u8"), data[:, 1].astype("<u8")
