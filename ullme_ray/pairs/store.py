"""Checked rows on local disk: a source is read once per machine into Arrow files, and any row then comes from there.

The cache lies below TMPDIR and takes about the size of the uncompressed texts, twice while it is made. Its key is every file's
path and version, so changed data are read anew. One process makes it while others wait; a folder is there whole or not at all.
Making it takes 8 bytes of memory per positive, to find hard negatives that another row of the same query calls positive.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ullme_ray import storage
from ullme_ray.errors import DataError, StorageError
from ullme_ray.pairs.readers import read_rows
from ullme_ray.pairs.rows import NO_SCORES, TOO_FEW_NEGATIVES, Pair, parse_row
from ullme_ray.row_files import BadRow

_VERSION = 1  # raise it when the same files would give other rows
_BATCH_ROWS = 1024
_BATCH_BYTES = 8 * 2**20
_SHOWN_CHARACTERS = 200

_ROWS = pa.schema(
    [
        ("query", pa.string()),
        ("positives", pa.list_(pa.string())),
        ("negatives", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
    ]
)
_DRAFT = pa.schema([*_ROWS, ("negative_keys", pa.list_(pa.uint64())), ("file", pa.int32()), ("row", pa.int64())])


@dataclass(frozen=True)
class SourceFiles:
    """What to read for one source, and what its rows must have."""

    files: tuple[storage.FileInfo, ...]
    least_negatives: int
    needs_scores: bool


@dataclass(frozen=True)
class StoredSource:
    """One source as it was read."""

    pairs: PairTable
    rejected: dict[str, int]  # reason -> rows
    dropped_negatives: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        return len(self.pairs) + sum(self.rejected.values())

    @property
    def reasons(self) -> str:
        """The commonest reasons for which rows were left out."""
        reasons = sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{number} x {reason}" for reason, number in reasons[:3])


@dataclass(frozen=True)
class Store:
    """All sources of a job; `rejects` is a local JSONL file, None where no row was rejected."""

    sources: tuple[StoredSource, ...]
    rejects: str | None


class PairTable(Sequence[Pair]):
    """Rows of one source, read from a memory-mapped file when asked for."""

    def __init__(self, path: Path, batch_rows: list[int]) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._starts = [0, *np.cumsum(batch_rows, dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, row: int) -> Pair: ...
    @overload
    def __getitem__(self, row: slice) -> list[Pair]: ...
    def __getitem__(self, row: int | slice) -> Pair | list[Pair]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        number = bisect.bisect_right(self._starts, row) - 1
        return next(_pairs(self._reader.get_batch(number).slice(row - self._starts[number], 1)))

    def __iter__(self) -> Iterator[Pair]:
        for number in range(self._reader.num_record_batches):
            yield from _pairs(self._reader.get_batch(number))


def open_store(sources: Sequence[SourceFiles]) -> Store:
    """Opens the rows of all sources; reads them first unless this machine's cache has them.

    Raises:
        DataError: a file cannot be read to its end, or changed meanwhile.
        StorageError: a remote file cannot be fetched, or the cache cannot be written.
    """
    key = hashlib.sha256(repr((_VERSION, sources)).encode()).hexdigest()[:24]
    cache = storage.cache_folder()
    folder = cache / f"pairs-{key}"
    with (cache / f"pairs-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees it when this process ends, however it ends
        if not folder.is_dir():
            draft = cache / f"pairs-{key}.partial"
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
            try:
                draft.mkdir()
                _build(sources, draft)
                os.rename(draft, folder)
            except OSError as error:
                raise StorageError(
                    f"cannot write the cache of training rows below {cache} ({error}); set TMPDIR to a larger disk"
                ) from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    stored = [
        StoredSource(PairTable(folder / f"source-{i}.arrow", facts.pop("batch_rows")), **facts)
        for i, facts in enumerate(json.loads((folder / "sources.json").read_text()))
    ]
    rejects = folder / "rejects.jsonl"
    return Store(tuple(stored), str(rejects) if rejects.stat().st_size else None)


def _pairs(batch: pa.RecordBatch) -> Iterator[Pair]:
    for row in batch.to_pylist():
        scores = row["scores"]
        yield Pair(row["query"], tuple(row["positives"]), tuple(row["negatives"]), None if scores is None else tuple(scores))


def _build(sources: Sequence[SourceFiles], folder: Path) -> None:
    """Two passes: read and check every row, then take out the hard negatives that the first pass saw as positives."""
    known = array("Q")  # keys of (query, positive) over all sources
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as stream:
        rejects = [_Rejects(stream, source) for source in sources]
        for i, source in enumerate(sources):
            _read(source, folder / f"draft-{i}.arrow", known, rejects[i])
        positives = np.sort(np.frombuffer(known, dtype=np.uint64))
        facts = []
        for i, source in enumerate(sources):
            draft = folder / f"draft-{i}.arrow"
            facts.append(_finish(source, draft, folder / f"source-{i}.arrow", positives, rejects[i]))
            draft.unlink()
    (folder / "sources.json").write_text(json.dumps(facts))
    for path in folder.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())  # before the folder gets its name


class _Rejects:
    """Counts and lists the rows of a source that were left out."""

    def __init__(self, stream: IO[str], source: SourceFiles) -> None:
        self._stream = stream
        self._source = source
        self.counts: Counter[str] = Counter()

    def add(self, file: int, number: int, reason: str, start: str) -> None:
        self.counts[reason] += 1
        row = {"file": self._source.files[file].path, "row": number, "reason": reason, "start": start[:_SHOWN_CHARACTERS]}
        self._stream.write(json.dumps(row) + "\n")


class _Writer:
    """Gathers rows into batches of bounded size; the batches depend on the rows alone, not on the files they came from."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pa.ipc.new_file(str(path), schema)
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    def add(self, row: dict[str, Any], num_characters: int) -> None:
        self._rows.append(row)
        self._num_bytes += 4 * num_characters
        if len(self._rows) == _BATCH_ROWS or self._num_bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, self._schema))
        self._rows, self._num_bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _read(source: SourceFiles, path: Path, known: array[int], rejects: _Rejects) -> None:
    writer = _Writer(path, _DRAFT)
    for position, file in enumerate(source.files):
        for number, row in file_rows(file):
            pair = parse_row(row)
            if isinstance(pair, Pair) and source.needs_scores and pair.scores is None:
                pair = NO_SCORES
            if isinstance(pair, str):
                rejects.add(position, number, pair, row.start if isinstance(row, BadRow) else _shown(row))
                continue
            query_key = hashlib.blake2b(pair.query.encode(), digest_size=16).digest()
            known.extend(_passage_key(query_key, text) for text in pair.positives)
            record = {
                "query": pair.query,
                "positives": pair.positives,
                "negatives": pair.negatives,
                "scores": pair.scores,
                "negative_keys": [_passage_key(query_key, text) for text in pair.negatives],
                "file": position,
                "row": number,
            }
            writer.add(record, len(pair.query) + sum(map(len, pair.positives)) + sum(map(len, pair.negatives)))
    writer.close()


def _passage_key(query_key: bytes, passage: str) -> int:
    """64 bits for a passage under a query: two that differ share one with a chance of n^2 / 4e19 among n."""
    return int.from_bytes(hashlib.blake2b(passage.encode(), digest_size=8, key=query_key).digest(), "little")


def _shown(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=repr)
    except RecursionError:
        return "nested too deeply to be shown"


def file_rows(file: storage.FileInfo) -> Iterator[tuple[int, Any]]:
    """A remote file is copied first: then what fails is either the store or the file, and a retry reads nothing twice."""
    if storage.is_remote(file.path):
        with tempfile.TemporaryDirectory(dir=storage.cache_folder()) as folder:
            storage.get_file(file, f"{folder}/file")
            yield from read_rows(f"{folder}/file", file.path)
        return
    yield from read_rows(file.path, file.path)
    if storage.list_files(file.path) != [file]:
        raise DataError(f"{file.path} changed while it was read; run again")


def _finish(source: SourceFiles, draft: Path, path: Path, positives: np.ndarray, rejects: _Rejects) -> dict[str, Any]:
    """Writes the final rows; returns what `sources.json` says of them."""
    content, batch_rows, dropped = hashlib.sha256(), [], 0
    with pa.memory_map(str(draft)) as mapped, pa.ipc.new_file(str(path), _ROWS) as writer:
        reader = pa.ipc.open_file(mapped)
        for i in range(reader.num_record_batches):
            batch, taken = _without_false_negatives(reader.get_batch(i), positives)
            dropped += taken
            if source.least_negatives:
                enough = pc.greater_equal(pc.list_value_length(batch["negatives"]), source.least_negatives)
                for row in batch.filter(pc.invert(enough)).to_pylist():
                    shown = _shown({name: row[name] for name in _ROWS.names})
                    rejects.add(row["file"], row["row"], TOO_FEW_NEGATIVES, shown)
                batch = batch.filter(enough)
            if batch.num_rows:
                batch = batch.select(_ROWS.names)
                writer.write_batch(batch)
                batch_rows.append(batch.num_rows)
                for row in batch.to_pylist():
                    content.update(repr(tuple(row.values())).encode())
    return {
        "batch_rows": batch_rows,
        "rejected": dict(rejects.counts),
        "dropped_negatives": dropped,
        "fingerprint": content.hexdigest(),
    }


def _without_false_negatives(batch: pa.RecordBatch, positives: np.ndarray) -> tuple[pa.RecordBatch, int]:
    """The batch without hard negatives among `positives` (sorted keys), and how many were taken out."""
    keys = batch["negative_keys"].flatten().to_numpy()
    if not len(keys) or not len(positives):
        return batch, 0
    places = np.minimum(np.searchsorted(positives, keys), len(positives) - 1)
    false = set(keys[positives[places] == keys].tolist())
    if not false:
        return batch, 0
    rows, taken = batch.to_pylist(), 0
    for row in rows:
        keep = [key not in false for key in row["negative_keys"]]
        taken += keep.count(False)
        row["negatives"] = [text for text, kept in zip(row["negatives"], keep) if kept]
        if row["scores"] is not None:
            row["scores"] = [s for s, kept in zip(row["scores"], [True] * len(row["positives"]) + keep) if kept]
    return pa.RecordBatch.from_pylist(rows, _DRAFT), taken
