"""A Lance dataset, which LanceDB opens as a table: one write in overwrite mode, so readers see the old version or the new.

Vectors go in as the table stores them (FixedSizeList of float, int8 or uint8), the mark into the schema's metadata. Every
version is a full copy; an older one goes once the one after it has stood for `embed.output.retention_hours`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pyarrow as pa

from ullme_ray import storage
from ullme_ray.errors import ExportError
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.table import PROVENANCE_KEY, delta_options
from ullme_ray.vector_stores.snapshot import Mark, Snapshot, Stored, load_client

logger = logging.getLogger(__name__)

_MARK = b"ullme_ray_export"


def export(snapshot: Snapshot, target: str, secret: SecretRef | None) -> Stored:
    lance = load_client("lance", "pylance")
    if secret is not None:
        raise ExportError("--secret is not used by lance: a local folder needs none, and s3:// reads the AWS_* variables")
    target = target if storage.is_remote(target) else os.path.abspath(target)
    options = {name.lower(): value for name, value in delta_options(target).items()}
    known = _open(lance, target, options)
    if known is not None:
        mark = Mark.parse((known.schema.metadata or {}).get(_MARK))
        if mark is None or mark.job != snapshot.mark.job:
            raise ExportError(f"{target} holds a dataset that this job did not write; choose another --target")
        if mark == snapshot.mark:
            _remove_old_versions(known, snapshot.retention_hours, datetime.now())
            return Stored(known.count_rows(), written=False)
    schema = _schema(snapshot)
    try:
        written = lance.write_dataset(
            pa.RecordBatchReader.from_batches(schema, _batches(snapshot, schema)),
            target,
            mode="create" if known is None else "overwrite",
            storage_options=options or None,
        )
    except OSError as error:
        raise ExportError(f"cannot write the Lance dataset {target} ({str(error).splitlines()[0]})") from error
    _remove_old_versions(written, snapshot.retention_hours, datetime.now())
    return Stored(written.count_rows())


def _remove_old_versions(dataset: Any, retention_hours: int | None, now: datetime) -> None:
    """Removes those that another one replaced long enough ago. Costs the list of versions."""
    if retention_hours is None:
        return
    before = now - timedelta(hours=retention_hours)
    old = [one["version"] for one, after in pairwise(dataset.versions()) if after["timestamp"] < before]
    if not old:
        return
    try:
        dataset.cleanup_old_versions(versions=old, error_if_tagged_old_versions=False)
    except OSError as error:
        logger.warning("old versions of %s cannot be removed: %s", dataset.uri, str(error).splitlines()[0])


def _open(lance: Any, target: str, options: dict[str, str]) -> Any:
    """The dataset at `target`, None where there is nothing but rows of a first export that broke off."""
    try:
        return lance.dataset(target, storage_options=options or None)
    except (ValueError, OSError) as error:
        names = [info.path.removeprefix(target + "/") for info in storage.list_files(target)]
        if all(name.startswith("data/") and name.endswith(".lance") for name in names):
            return None
        reason = str(error).splitlines()[0]
        raise ExportError(f"{target} holds files that are no Lance dataset ({reason}); choose another --target") from error


def _schema(snapshot: Snapshot) -> pa.Schema:
    width = snapshot.dims // 8 if snapshot.form.is_packed else snapshot.dims
    vectors = pa.field("embedding", pa.list_(pa.from_numpy_dtype(snapshot.form.stored_type), width))
    noted = json.dumps({"fingerprint": snapshot.fingerprint, "vectors": snapshot.form.provenance(width)})
    return snapshot.columns.append(vectors).with_metadata({_MARK: snapshot.mark.dump(), PROVENANCE_KEY: noted})


def _batches(snapshot: Snapshot, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in snapshot.batches():
        vectors = snapshot.form.to_arrow(batch.stored).cast(schema.field("embedding").type)
        yield pa.RecordBatch.from_arrays([*batch.columns.columns, vectors], schema=schema)
