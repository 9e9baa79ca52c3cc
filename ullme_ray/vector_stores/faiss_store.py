"""A folder for FAISS and for plain numpy: row n of `vectors.npy` is the vector of row n of `ids.parquet`.

`vectors.npy` is float32 (int8 and uint8 tables are scaled back), for bits uint8 with 8 of them in a byte: open it with
`numpy.load(path, mmap_mode="r")`. Where faiss is installed, `index.faiss` is an exact index of them (inner product, or Hamming
distance for bits), up to a size that memory holds. `export.json` is written last and says which version of the table it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.errors import ExportError
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.vector_stores.snapshot import Batch, Mark, Snapshot, Stored, load_client

_LAST = "export.json"
_FILES = ("vectors.npy", "ids.parquet", "index.faiss", _LAST)
_MOST_INDEX_BYTES = 4 * 2**30


def export(snapshot: Snapshot, target: str, secret: SecretRef | None) -> Stored:
    if secret is not None:
        raise ExportError("--secret is not used by faiss: a local folder needs none, and s3:// reads the AWS_* variables")
    target = target if storage.is_remote(target) else os.path.abspath(target)
    if _held(snapshot, target) == snapshot.mark:
        return Stored(snapshot.num_rows, written=False)
    with _new_folder(target) as folder:
        _write_rows(snapshot, folder)
        note = _write_index(snapshot, folder)
        facts = {"fingerprint": snapshot.fingerprint, "rows": snapshot.num_rows, "dims": snapshot.dims}
        facts |= {"dtype": snapshot.form.dtype, "metric": "hamming" if snapshot.form.is_packed else "inner product"}
        (folder / _LAST).write_text(json.dumps({**json.loads(snapshot.mark.dump()), **facts}, indent=2) + "\n")
        _publish(folder, target)
    return Stored(snapshot.num_rows, note=note)


def _held(snapshot: Snapshot, target: str) -> Mark | None:
    """What the target holds a whole export of.

    Raises:
        ExportError: it holds something else.
    """
    names = {info.path.removeprefix(target + "/") for info in storage.list_files(target)}
    mark = Mark.parse(storage.read_bytes(storage.join(target, _LAST))) if _LAST in names else None
    if (names - set(_FILES)) or (mark is None and _LAST in names) or (mark is not None and mark.job != snapshot.mark.job):
        raise ExportError(f"{target} holds files that this job did not write; choose another --target")
    return mark


@contextmanager
def _new_folder(target: str) -> Iterator[Path]:
    """A folder to build in: beside a local target, so that files can be moved and not copied."""
    beside = None if storage.is_remote(target) else os.path.dirname(target)
    if beside:
        os.makedirs(beside, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=beside, prefix=".ullme_ray-export-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_rows(snapshot: Snapshot, folder: Path) -> None:
    packed = snapshot.form.is_packed
    shape = (snapshot.num_rows, snapshot.dims // 8 if packed else snapshot.dims)
    header = {"descr": "|u1" if packed else "<f4", "fortran_order": False, "shape": shape}
    rows = 0
    ids_file = pq.ParquetWriter(folder / "ids.parquet", snapshot.columns, compression="zstd")
    with (folder / "vectors.npy").open("xb") as vectors, ids_file as ids:
        np.lib.format.write_array_header_1_0(vectors, header)  # the array follows in slices, and is never in memory as a whole
        for batch in snapshot.batches():
            vectors.write(np.ascontiguousarray(_as_faiss(snapshot, batch)).data)
            ids.write_batch(batch.columns)
            rows += len(batch.stored)
    assert rows == snapshot.num_rows, f"{rows} rows came for {snapshot.num_rows}"


def _as_faiss(snapshot: Snapshot, batch: Batch) -> np.ndarray:
    if not snapshot.form.is_packed:
        return snapshot.form.decode(batch.stored)
    signed = batch.stored.dtype == np.int8
    return (batch.stored.astype(np.int16) + 128).astype(np.uint8) if signed else batch.stored


def _write_index(snapshot: Snapshot, folder: Path) -> str:
    """Says why there is none, or nothing."""
    if importlib.util.find_spec("faiss") is None:
        return "index.faiss was left out, since faiss is not installed; for one: pip install faiss-cpu"
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    if vectors.nbytes > _MOST_INDEX_BYTES:
        return (
            f"index.faiss was left out: an exact index of {vectors.nbytes / 2**30:.0f} GiB is better one that FAISS trains "
            "(IVF, PQ, HNSW) on vectors.npy"
        )
    faiss = load_client("faiss", "faiss-cpu")
    index = faiss.IndexBinaryFlat(snapshot.dims) if snapshot.form.is_packed else faiss.IndexFlatIP(snapshot.dims)
    for start in range(0, len(vectors), 65_536):
        index.add(np.ascontiguousarray(vectors[start : start + 65_536]))
    (faiss.write_index_binary if snapshot.form.is_packed else faiss.write_index)(index, str(folder / "index.faiss"))
    return ""


def _publish(folder: Path, target: str) -> None:
    if not (folder / "index.faiss").exists():
        storage.remove(storage.join(target, "index.faiss"))  # of an earlier version
    if storage.is_remote(target):
        storage.put_folder(folder, target, last=_LAST)
        return
    os.makedirs(target, exist_ok=True)
    storage.remove(storage.join(target, _LAST))
    for name in _FILES:
        if (folder / name).exists():
            os.replace(folder / name, os.path.join(target, name))
