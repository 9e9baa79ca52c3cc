"""Which texts the table holds already: content hash -> where their vectors lie, over the parts of all files.

Nightly exports come under new names, in another order and in files of other sizes, so the look-up spans the whole table. Only
parts of the same recipe count: their vectors are what the model would compute again. Building it reads the `content_hash`
column of every such part once, on the cluster. A run with nothing new or changed builds none.

Neither the index nor the vectors need to fit into memory. Each node sorts the index (36 bytes a document) into files of its
own, bucket by bucket, and its processes map them. A unit whose texts come from many parts, as when a corpus was shuffled, would
decode all of those for a few rows of each; the first such unit of a node lays them out there as records, from which rows are
read one by one.
"""

from __future__ import annotations

import logging
import mmap
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ullme_ray import storage
from ullme_ray.embed.node_folder import has_room, made_once, node_folder, remove_node_folder
from ullme_ray.embed.parts import ChunkRows, Part, reading_part
from ullme_ray.errors import EmbedError, UllmeError

logger = logging.getLogger(__name__)

_PARTS_PER_TASK = 16
_PARTS_HELD = 8  # decoded parts that a reading process keeps, since rows of one unit mostly come from few parts
_BUCKET_ENTRIES = 2**20  # sorted in memory at a time
_MAX_BUCKETS = 256  # as many files are open at a time
_CLOSE_TIMEOUT_S = 10.0
_COPIED = ["content_hash", "chunk", "embedding", "num_tokens", "truncated"]
_ENTRY = np.dtype([("first", "<u8"), ("second", "<u8"), ("part", "<i4"), ("row", "<i4"), ("count", "<i4")])


@dataclass(frozen=True)
class ContentIndex:
    """Small to send: entries lie in Ray's object store, which puts on disk what it has no room for, and in files of nodes."""

    folder: str
    names: tuple[str, ...]  # of parts, by number
    pieces: tuple[Any, ...]  # references to arrays of _ENTRY
    num_rows: int  # of all parts
    run: str  # names the folders on the nodes

    def find(self, hashes: Sequence[str]) -> Found:
        """Where the vectors of these content hashes lie.

        Raises:
            UllmeError: this node's disk has no room for the index, or a part of the table cannot be read.
        """
        return Found(self, lookup(*self._open(), hashes))

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and entries, as `write_sorted` made them, without reading them."""

        def make(folder: Path) -> None:
            write_sorted(map(_piece, self.pieces), self.num_rows, folder)

        try:
            folder = made_once(node_folder(self.run) / "index", make)
        except OSError as error:
            raise EmbedError(
                f"the index of the table's {self.num_rows:,} rows cannot be written to {tempfile.gettempdir()} ({error}); "
                f"let TMPDIR name a folder with room for {72 * self.num_rows / 2**20:,.0f} MiB on every node"
            ) from error
        return open_sorted(folder)

    def close(self) -> None:
        """Removes the run's files from all nodes that answer; what is left on others goes with their next run."""
        remove = ray.remote(remove_node_folder).options(num_cpus=0)
        with suppress(Exception):  # a Ray that is gone must not hide why the run ended
            nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
            calls = [
                remove.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote(self.run)
                for n in nodes
            ]
            ray.wait(calls, num_returns=len(calls), timeout=_CLOSE_TIMEOUT_S)


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
        scattered = len(runs) > _PARTS_HELD
        pieces = [piece for run in runs if len(run) and (piece := self._read_part(run, hashes, scattered)) is not None]
        if not pieces:
            return None
        joined = ChunkRows.join(pieces)
        return joined.take(np.argsort(joined.document, kind="stable"))

    def _read_part(self, places: np.ndarray, hashes: Sequence[str], scattered: bool) -> ChunkRows | None:
        wanted = self.entries[places]
        name = self.index.names[wanted["part"][0]]
        records = _records_on_node(self.index, name) if scattered else None
        if records is None:
            records = _open_records(storage.join(self.index.folder, name))
        rows = np.concatenate([np.arange(entry["row"], entry["row"] + entry["count"]) for entry in wanted])
        documents = np.repeat(places, wanted["count"])
        if rows.max() >= len(records):
            return None
        taken = records[rows]
        if taken["content_hash"].tolist() != [hashes[document].encode() for document in documents]:
            return None
        return ChunkRows(documents, *(np.ascontiguousarray(taken[name]) for name in _COPIED[1:]))


def _records_on_node(index: ContentIndex, name: str) -> np.ndarray | None:
    """A part's rows, mapped from a file of this node; None where its disk has no room for it."""
    folder = node_folder(index.run)
    path = folder / name.removesuffix(".parquet")

    def make(file: Path) -> None:
        records = _open_records(storage.join(index.folder, name))
        if not has_room(folder, records.nbytes):
            raise OSError("no room")
        with file.open("wb") as stream:
            np.save(stream, records)

    try:
        made_once(path, make)
    except OSError as error:
        _warn_once(f"parts of the table are decoded for every unit anew, since {folder} has no room for them ({error})")
        return None
    records = np.load(path, mmap_mode="r")
    if len(records):
        cast(mmap.mmap, records.base).madvise(mmap.MADV_RANDOM)  # else the kernel reads 32 pages for each
    return cast(np.ndarray, records)


@lru_cache
def _warn_once(text: str) -> None:
    logger.warning(text)


@lru_cache(maxsize=_PARTS_HELD)
def _open_records(path: str) -> np.ndarray:
    return _decode(path)


def _decode(path: str) -> np.ndarray:
    """A part's rows as records of the columns _COPIED; none of a part that is damaged or gone."""
    try:
        with reading_part(path) as stream:
            rows = pq.read_table(stream, columns=_COPIED).combine_chunks()
    except (EmbedError, FileNotFoundError):
        return np.empty(0, np.dtype([("content_hash", "S64")]))
    if not rows.num_rows:
        return np.empty(0, np.dtype([("content_hash", "S64")]))
    embedding = rows["embedding"].chunk(0).flatten().to_numpy().reshape(rows.num_rows, -1)  # (N, D)
    kinds = [("content_hash", "S64"), ("chunk", "<i4"), ("embedding", embedding.dtype, embedding.shape[1:])]
    records = np.empty(rows.num_rows, np.dtype([*kinds, ("num_tokens", "<i4"), ("truncated", "?")]))
    records["embedding"] = embedding
    for column in set(_COPIED) - {"embedding"}:
        records[column] = rows[column].to_numpy()
    return records


def build_index(folder: str, parts: Iterable[Part]) -> ContentIndex | None:
    """The index over these parts; None where they hold no rows."""
    rows = {part.name: part.num_rows for part in parts if part.num_rows}
    names = tuple(sorted(rows))
    if not names:
        return None
    read = ray.remote(_read_entries).options(num_cpus=1)
    pieces = tuple(read.remote(folder, names, first) for first in range(0, len(names), _PARTS_PER_TASK))
    return ContentIndex(folder, names, pieces, sum(rows.values()), uuid.uuid4().hex)


def _piece(reference: Any) -> np.ndarray:
    """What a task of `build_index` read. Ray's own error cannot be sent on, and would pass for one of this node's disk."""
    try:
        return cast(np.ndarray, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, UllmeError) else EmbedError(f"the table's parts cannot be read ({cause})") from None


def _read_entries(folder: str, names: Sequence[str], first: int) -> np.ndarray:
    pieces = []
    for number in range(first, min(first + _PARTS_PER_TASK, len(names))):
        try:
            with reading_part(storage.join(folder, names[number])) as stream:
                rows = pq.read_table(stream, columns=["content_hash", "chunk"])
        except (EmbedError, FileNotFoundError):
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


def write_sorted(pieces: Iterable[np.ndarray], num_rows: int, folder: Path) -> None:
    """Sorts entries by the first half of their hash into two files in `folder`: entries, and keys, those halves alone.

    One entry per half: of two texts with equal ones one is lost, and embedded again. Memory holds a piece, or one bucket of the
    entries, at a time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_buckets = min(_MAX_BUCKETS, 1 + num_rows // _BUCKET_ENTRIES)
    paths = [folder / f"bucket-{number}" for number in range(num_buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for piece in pieces:
            bucket = (piece["first"] >> 32) * num_buckets >> 32
            order = np.argsort(bucket, kind="stable")
            ends = np.searchsorted(bucket[order], np.arange(num_buckets), side="right")
            for file, entries in zip(files, np.split(piece[order], ends[:-1])):
                file.write(entries.tobytes())
    with (folder / "keys").open("wb") as keys, (folder / "entries").open("wb") as sorted_entries:
        for path in paths:
            entries = np.fromfile(path, _ENTRY)
            path.unlink()
            entries = entries[np.unique(entries["first"], return_index=True)[1]]
            keys.write(entries["first"].tobytes())
            sorted_entries.write(entries.tobytes())


def open_sorted(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and entries that `write_sorted` wrote, mapped and not read."""
    return _mapped(folder / "keys", np.dtype("<u8")), _mapped(folder / "entries", _ENTRY)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # nothing cannot be mapped


def lookup(keys: np.ndarray, entries: np.ndarray, hashes: Sequence[str]) -> np.ndarray:
    """One entry per hash, of count 0 where there is none."""
    if not len(keys):
        return np.zeros(len(hashes), _ENTRY)
    first, second = _split(hashes)
    found = np.array(entries[np.minimum(np.searchsorted(keys, first), len(keys) - 1)])
    found["count"][(found["first"] != first) | (found["second"] != second)] = 0
    return found


def _split(hashes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The first 128 bits of hexadecimal hashes as two columns."""
    data = np.frombuffer(bytes.fromhex("".join(text[:32] for text in hashes)), dtype=">u8").reshape(-1, 2)
    return data[:, 0].astype("<u8"), data[:, 1].astype("<u8")
