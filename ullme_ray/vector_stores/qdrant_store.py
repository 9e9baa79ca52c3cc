"""A Qdrant collection of cosine vectors: points go in under UUIDs made of id and chunk, then those of older versions go out.

Every point's payload says which version it is of, so that a point is written again and not twice, an export that broke off is
made whole by the next, and readers find all rows meanwhile. Quantised tables are scaled back, for Qdrant quantises by itself.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ullme_ray import storage
from ullme_ray.errors import ExportError
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.vector_stores.snapshot import Batch, Snapshot, Stored, load_client, plain_values

POINTS_PER_REQUEST = 256
_TIMEOUT_S = 120
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "ullme_ray")
_PAYLOAD = "ullme_ray"  # what the payload says of the export; the rest of it are the row's columns


def export(snapshot: Snapshot, target: str, secret: SecretRef | None) -> Stored:
    load_client("qdrant_client", "qdrant-client")
    place, _, collection = target.rpartition("/")
    if not place.strip(":/") or place in ("http:/", "https:/") or not collection:
        raise ExportError(f"--target {target} names no collection; use http(s)://HOST:6333/COLLECTION or FOLDER/COLLECTION")
    client = _connect(place, secret)
    try:
        return _upload(client, collection, snapshot, target)
    except ExportError:
        raise
    except Exception as error:  # the client raises httpx's errors, its own, and grpc's
        raise ExportError(f"{target} did not take the rows ({type(error).__name__}: {_first_line(error)})") from error
    finally:
        client.close()


def point_id(row_id: Any, chunk: int) -> str:
    """The same row has the same point in every export."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps([plain_values(row_id), chunk])))


def _connect(place: str, secret: SecretRef | None) -> Any:
    from qdrant_client import QdrantClient

    if urlsplit(place).scheme in ("http", "https"):
        key = secret.reveal().get_secret_value() if secret else None
        return QdrantClient(url=place, api_key=key, timeout=_TIMEOUT_S, check_compatibility=False)
    if storage.is_remote(place):
        raise ExportError(f"--target {place}/... is neither a server nor a local folder")
    if secret is not None:
        raise ExportError("--secret is not used by a local folder")
    return QdrantClient(path=place)


def _upload(client: Any, collection: str, snapshot: Snapshot, target: str) -> Stored:
    from qdrant_client import models

    def having(key: str, value: str) -> Any:
        return models.FieldCondition(key=f"{_PAYLOAD}.{key}", match=models.MatchValue(value=value))

    def count(**conditions: Any) -> int:
        return int(client.count(collection, count_filter=models.Filter(**conditions), exact=True).count)

    this_version = having("mark", snapshot.mark.dump())
    if client.collection_exists(collection):
        _check_owner(client.get_collection(collection), count(must_not=[having("job", snapshot.mark.job)]), snapshot, target)
        if count(must=[this_version]) == count() == snapshot.num_rows:
            return Stored(snapshot.num_rows, written=False)
    else:
        client.create_collection(collection, models.VectorParams(size=snapshot.dims, distance=models.Distance.COSINE))
        if not client.init_options["path"]:  # a local folder has no indexes, and warns
            for key in ("job", "mark"):
                client.create_payload_index(collection, f"{_PAYLOAD}.{key}", models.PayloadSchemaType.KEYWORD)
    for batch in snapshot.batches():
        for points in _points(snapshot, batch, models):
            client.upsert(collection, points, wait=True)
    client.delete(collection, models.FilterSelector(filter=models.Filter(must_not=[this_version])), wait=True)
    return Stored(count())


def _check_owner(info: Any, strangers: int, snapshot: Snapshot, target: str) -> None:
    vectors = info.config.params.vectors
    size = getattr(vectors, "size", None)  # None: several vectors a point, under names
    if strangers:
        raise ExportError(f"{target} holds {strangers:,} points that this job did not write; choose another collection")
    if size != snapshot.dims:
        raise ExportError(
            f"{target} is made for vectors of {size or 'several'} numbers, and the table's have {snapshot.dims}; "
            f"delete the collection, or choose another"
        )


def _points(snapshot: Snapshot, batch: Batch, models: Any) -> Iterator[Any]:
    """The batch in requests of a size that a server takes at once."""
    vectors = snapshot.form.decode(batch.stored)  # (n, D)
    noted = {"job": snapshot.mark.job, "mark": snapshot.mark.dump()}
    for start in range(0, len(vectors), POINTS_PER_REQUEST):
        rows = [plain_values(row) for row in batch.columns.slice(start, POINTS_PER_REQUEST).to_pylist()]
        yield models.Batch(
            ids=[point_id(row[snapshot.id_name], row["chunk"]) for row in rows],
            vectors=vectors[start : start + POINTS_PER_REQUEST].tolist(),
            payloads=[{**row, _PAYLOAD: noted} for row in rows],
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
