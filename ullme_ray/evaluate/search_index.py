"""An index of the table for a fast first pass: sign bits, or one that FAISS makes. What it finds is scored again in float.

It lies in the run's folder, `search_index/KIND/`: `bits.npy` or `index.faiss`, the whole vectors for the second scoring as
`vectors.npy`, float32 (N, D), and `index.json`, written last, which says of what version of the table it is. A first pass over
bits reads 1/32 of what the vectors take; FAISS reads what it needs. Another version of the table makes the index anew, which
costs a read of the whole table, and the vectors' size on disk.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ullme_ray import storage
from ullme_ray.errors import EmbedError
from ullme_ray.evaluate.table_parts import TableRows
from ullme_ray.progress import Progress
from ullme_ray.retrieval.topk import best_of
from ullme_ray.spec import JobSpec, RunFolder

_LAST = "index.json"
_BLOCK_ROWS = 65_536
_LEAST_TRAINED = 10_000  # rows from which on FAISS splits them into cells; below, it compares all
_TRAIN_ROWS = 100_000
_FEW_ROWS = 10_000  # that a filter may leave to be scored without a first pass


@dataclass(frozen=True)
class SearchIndex:
    """An index of one version of the table, on this machine's disk."""

    kind: str
    folder: Path
    num_rows: int

    def find(self, question: np.ndarray, k: int, keep: np.ndarray | None, oversample: int) -> list[tuple[int, float]]:
        """(row, score) of the best rows, best first: `k * oversample` come out of the first pass and are scored in float.

        Args:
            question: (D,) unit length.
            keep: (N,) bool, rows that may be found; None: all.
        """
        wanted = min(self.num_rows, k * oversample)
        if keep is not None and keep.sum() <= max(wanted, _FEW_ROWS):
            candidates = np.flatnonzero(keep)  # an index would look in cells that hold none of them
        elif self.kind == "bits":
            candidates = self._bits(question, wanted, keep)
        else:
            candidates = self._faiss(question, wanted, keep)
        vectors = np.load(self.folder / "vectors.npy", mmap_mode="r")
        scores = np.asarray(vectors[candidates], np.float32) @ question
        rows, best = best_of(-candidates, scores, k)  # of equal scores the first row
        return list(zip((-rows).tolist(), best.tolist()))

    def _bits(self, question: np.ndarray, wanted: int, keep: np.ndarray | None) -> np.ndarray:
        """Rows whose signs differ from the question's in the fewest places."""
        bits = np.load(self.folder / "bits.npy", mmap_mode="r")  # (N, D / 8)
        asked = np.packbits(question > 0)
        rows = np.empty(0, np.int64)
        scores = np.empty(0, np.int32)
        for start in range(0, self.num_rows, _BLOCK_ROWS):
            block = np.asarray(bits[start : start + _BLOCK_ROWS])
            found = np.arange(start, start + len(block))
            if keep is not None:
                block, found = block[keep[found]], found[keep[found]]
            differing = np.bitwise_count(block ^ asked).sum(axis=1, dtype=np.int32)
            rows, scores = best_of(np.concatenate([rows, -found]), np.concatenate([scores, -differing]), wanted)
        return -rows

    def _faiss(self, question: np.ndarray, wanted: int, keep: np.ndarray | None) -> np.ndarray:
        faiss = load_faiss()
        index = faiss.read_index(str(self.folder / "index.faiss"), faiss.IO_FLAG_MMAP)
        given: dict[str, Any] = {}
        if keep is not None:
            given["sel"] = faiss.IDSelectorBitmap(np.packbits(keep, bitorder="little"))
        parameters = None
        if isinstance(faiss.downcast_index(index), faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=max(8, index.nlist // 8), **given)
        elif given:
            parameters = faiss.SearchParameters(**given)
        _, rows = index.search(question[None], wanted, params=parameters)
        return np.sort(rows[0][rows[0] >= 0])


def open_index(job: JobSpec, table: TableRows, kind: str) -> SearchIndex:
    """The index of this version of the table; made first where there is none.

    Raises:
        EmbedError: the package it needs is not installed.
    """
    if kind == "faiss":
        load_faiss()
    target = storage.join(RunFolder.of(job).root, "search_index", kind)
    wanted = {"table": table.version, "rows": table.num_rows, "kind": kind}
    if _mark(target) != wanted:
        with tempfile.TemporaryDirectory(dir=storage.cache_folder()) as draft:
            _build(table, kind, Path(draft))
            (Path(draft) / _LAST).write_text(json.dumps(wanted) + "\n")
            storage.put_folder(draft, target, last=_LAST)
    return SearchIndex(kind, Path(storage.fetch_folder(target)), table.num_rows)


def _mark(target: str) -> dict[str, Any] | None:
    try:
        mark: dict[str, Any] = json.loads(storage.read_text(storage.join(target, _LAST)))
    except (FileNotFoundError, ValueError):
        return None
    return mark


def _build(table: TableRows, kind: str, folder: Path) -> None:
    """Writes the vectors in slices, then what searches them; memory holds a slice, and FAISS what it makes."""
    rows = 0
    with Progress("search index", table.num_rows, unit="rows") as progress, (folder / "vectors.npy").open("xb") as stream:
        for numbers, vectors in table.vectors():
            if not rows:
                shape = (table.num_rows, vectors.shape[1])
                np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
            assert numbers[0] == rows, "rows must come in the table's order"
            stream.write(np.ascontiguousarray(vectors, "<f4").data)
            rows += len(numbers)
            progress.update(rows)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    blocks: Sequence[range] = [range(s, min(s + _BLOCK_ROWS, rows)) for s in range(0, rows, _BLOCK_ROWS)]
    if kind == "bits":
        width = -(-vectors.shape[1] // 8)
        with (folder / "bits.npy").open("xb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                stream.write(np.packbits(vectors[block.start : block.stop] > 0, axis=1).data)
        return
    faiss = load_faiss()
    cells = 2 ** round(math.log2(4 * math.sqrt(rows))) if rows >= _LEAST_TRAINED else 0
    factory = f"IVF{cells},SQ8" if cells else "SQ8"
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).permutation(rows)[:_TRAIN_ROWS])
    index.train(np.ascontiguousarray(vectors[sample]))
    for block in blocks:
        index.add(np.ascontiguousarray(vectors[block.start : block.stop]))
    faiss.write_index(index, str(folder / "index.faiss"))


def load_faiss() -> Any:
    """Raises EmbedError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise EmbedError(
            f"search.index = faiss needs faiss-cpu, which cannot be imported ({error}); pip install faiss-cpu"
        ) from None
    return faiss
