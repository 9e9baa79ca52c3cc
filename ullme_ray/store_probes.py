"""What an object store is asked before a run relies on it, and what is cleared away there. Each costs a request or a few."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from datetime import UTC, datetime, timedelta

from ullme_ray import storage
from ullme_ray.errors import StorageError

_STALE = timedelta(days=1)
_TIMEOUT_S = 120.0


def keeps_exclusive_puts(folder: str) -> bool:
    """Whether the store refuses to replace a file by one put "only if it is new", which commits of several writers rely on.

    Local disks do. False means that the store ignores the condition: one writer at a time then.

    Raises:
        StorageError: the store refuses such puts altogether, so no table can be committed there.
    """
    if not storage.is_remote(folder):
        return True
    probe, store = storage.join(folder, f"exclusive-check-{uuid.uuid4().hex}.tmp"), storage.filesystem(folder)

    def put(data: bytes) -> bool:
        try:
            store.pipe_file(probe, data, mode="create", timeout=_TIMEOUT_S)
        except OSError as error:
            if error.errno == errno.ENOSYS:  # 501
                raise StorageError(
                    f"the store of {folder} has no conditional puts (If-None-Match answers: {error}), and without them no "
                    f"table can be committed; use a store that has them, or a newer version of it"
                ) from error
            if isinstance(error, FileExistsError) or error.errno == errno.EINVAL:  # 412, which s3fs knows by either
                return False
            raise
        return True

    with storage.explained("write", probe):
        try:
            put(b"1")  # one that was tried twice may find its own file: the name is new, so its content is right all the same
            return not put(b"2") and store.cat_file(probe) == b"1"
        finally:
            with contextlib.suppress(Exception):
                store.rm_file(probe)


def put_if_absent(path: str, data: bytes) -> bool:
    """Creates a file; False where one of that name exists. Only where `keeps_exclusive_puts`.

    Raises:
        StorageError: it cannot be written.
    """
    with storage.explained("write", path):
        if not storage.is_remote(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            whole = f"{path}.{uuid.uuid4().hex}.tmp"
            try:
                with open(whole, "xb") as stream:
                    stream.write(data)
                os.link(whole, path)  # with its content, or not at all
            except FileExistsError:
                return False
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(whole)
            return True
        try:
            storage.filesystem(path).pipe_file(path, data, mode="create", timeout=_TIMEOUT_S)
        except OSError as error:
            if isinstance(error, FileExistsError) or error.errno == errno.EINVAL:  # 412, which s3fs knows by either
                return storage.read_bytes(path) == data  # a request that was tried twice meets itself
            raise
        return True


def abort_stale_uploads(folder: str, *, older_than: timedelta = _STALE) -> int:
    """Ends multipart uploads below `folder` that nobody will complete: invisible, but stored and paid for.

    A store that cannot list them has none ended.

    Args:
        older_than: since they began; younger ones may belong to another run.

    Returns:
        How many were ended.
    """
    if not storage.is_remote(folder):
        return 0
    store = storage.filesystem(folder)
    bucket, _, prefix = folder.partition("://")[2].rstrip("/").partition("/")
    ended, marker = 0, dict[str, str]()
    with contextlib.suppress(Exception):  # rubbish that stays is no reason to fail
        while True:
            found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marker)
            for upload in found.get("Uploads", ()):
                if datetime.now(UTC) - upload["Initiated"] >= older_than:
                    store.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                    ended += 1
            if not found.get("IsTruncated"):
                break
            marker = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}
    return ended
