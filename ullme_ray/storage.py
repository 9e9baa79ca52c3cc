"""Local folders and object stores behind one set of functions. A file appears whole or not at all.

Paths are absolute local paths or `s3://bucket/key`. S3 is reached through s3fs with the usual AWS_* environment
(AWS_ENDPOINT_URL for other stores); no credentials pass through here.

A request that fails for a reason that may pass (500, 503, a connection that is refused, reset or silent) is tried again for
about half a minute, long enough for a store to restart. Uploads have a deadline of their own, since no other timeout bounds the
sending of a body to a store that stopped reading.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ullme_ray.errors import StorageError
from ullme_ray.reach import ROOTS, refused_path

_COPY_BYTES = 2**22
_AHEAD_BYTES = 2**23  # fetched beyond what is read; the client's own 50 MB would cost a reader of a part most of the rest
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 30  # for the first byte of an answer, and between two of its parts
_REQUEST_ATTEMPTS = 7  # botocore waits up to 1, 2, 4, 8, 16, 20 s between them, half of that on average
_CALL_ATTEMPTS = 4  # s3fs's own, also of answers that break off; each of _REQUEST_ATTEMPTS
_UPLOAD_ATTEMPTS = 2
_UPLOAD_FLOOR_S = 120.0  # an upload's deadline: this, for retries after an outage, and its bytes at the slowest rate
_SLOWEST_UPLOAD_BYTES_PER_S = 2**20
_HIDDEN = (".", "_")  # how names of hidden files and folders begin
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # files that a process is writing, or that a killed one was
_UNFINISHED_S = 24 * 3600.0  # a younger one may still be written


@dataclass(frozen=True)
class FileInfo:
    """A file and what tells it from another version of itself: its etag, or its size and modification time."""

    path: str
    num_bytes: int
    version: str
    modified_s: float = 0.0  # since 1970, by the clock of its machine or store


def is_remote(path: str) -> bool:
    return "://" in path


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


@lru_cache(maxsize=8)
def _remote(scheme: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """One client for each store that the AWS_* variables have named so far; they are read when a client is made."""
    if scheme != "s3":
        raise StorageError(f"scheme {scheme}:// is not supported; use a local path or s3://")
    import s3fs

    store = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retries": {"max_attempts": _REQUEST_ATTEMPTS, "mode": "standard"},
        },
    )
    store.retries = _CALL_ATTEMPTS
    return store


def filesystem(path: str) -> Any:
    """The fsspec file system of a remote path."""
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _remote(path.partition("://")[0], environment)


@contextlib.contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turns the many errors of object stores into one that names the path. A missing file stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:  # botocore's errors share no base with OSError
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        hint = ""
        if path.startswith("s3://"):
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
            hint = f"; endpoint is {endpoint}: check AWS_ENDPOINT_URL, the bucket's name and the credentials"
        raise StorageError(f"cannot {action} {path} ({reason}){hint}") from error


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with explained("look up", path):
        return bool(filesystem(path).exists(path))


def read_bytes(path: str) -> bytes:
    """Raises FileNotFoundError for a missing file, StorageError for any other fault."""
    with explained("read", path):
        if not is_remote(path):
            return Path(path).read_bytes()
        return bytes(filesystem(path).cat_file(path))


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8")


@contextlib.contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """A seekable binary stream. What goes wrong inside the `with` block comes out as it is, but for the store's own errors."""
    with explained("read", path):
        remote = filesystem(path) if is_remote(path) else None
        stream = remote.open(path, "rb", block_size=_AHEAD_BYTES) if remote else Path(path).open("rb")  # noqa: SIM115
    with stream:
        if remote is None:
            yield stream
            return
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError

        try:
            yield stream
        except (BotoCoreError, ClientError, OSError) as error:
            if isinstance(error, OSError) and error.errno is None:
                raise  # of one who makes sense of the bytes; those of a store have a number
            with explained("read", path):
                raise error


def write_bytes(path: str, data: bytes) -> None:
    """Publishes `data` at `path` in one operation: readers see the old content or the new, never a part."""
    with explained("write", path):
        if is_remote(path):
            _upload(path, len(data), lambda deadline_s: filesystem(path).pipe_file(path, data, timeout=deadline_s))
            return
        with _new_local_file(path) as stream:
            stream.write(data)


def write_text(path: str, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def put_file(local: str | Path, path: str) -> None:
    """Publishes a local file at `path` in one operation (a multipart upload shows nothing until it is complete)."""
    with explained("write", path):
        if is_remote(path):
            num_bytes = os.path.getsize(local)
            _upload(path, num_bytes, lambda deadline_s: filesystem(path).put_file(str(local), path, timeout=deadline_s))
            return
        with open(local, "rb") as source, _new_local_file(path) as stream:
            shutil.copyfileobj(source, stream, _COPY_BYTES)


def _upload(path: str, num_bytes: int, put: Callable[[float], Any]) -> None:
    """Runs an upload under a deadline, once more on a new connection when it passes.

    A multipart upload that is given up stays in the store, unseen, until `store_probes.abort_stale_uploads`.
    """
    from fsspec.exceptions import FSTimeoutError

    deadline_s = _UPLOAD_FLOOR_S + num_bytes / _SLOWEST_UPLOAD_BYTES_PER_S
    for _ in range(_UPLOAD_ATTEMPTS):
        try:
            put(deadline_s)
            return
        except FSTimeoutError:
            continue
    raise TimeoutError(f"the store did not take {num_bytes:,} bytes in {_UPLOAD_ATTEMPTS} attempts of {deadline_s:.0f} s")


@contextlib.contextmanager
def _new_local_file(path: str) -> Iterator[IO[bytes]]:
    """A stream whose content stands at `path` once the block ends well; any number of processes and threads may write one path.

    The content is on disk before the name is: a crash of the machine cannot leave a name without its content.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"  # as _UNFINISHED; mkstemp's are closed to all other users
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_unfinished(folder: str) -> None:
    """Removes what killed processes left of the files that they were writing below a local folder."""
    if is_remote(folder):
        return  # a put shows nothing until it is complete
    with explained("clear", folder):
        for path in _walk(folder):
            with contextlib.suppress(FileNotFoundError):
                if _UNFINISHED.fullmatch(os.path.basename(path)) and os.stat(path).st_mtime < time.time() - _UNFINISHED_S:
                    os.unlink(path)


def put_folder(local: str | Path, path: str, *, last: str | None = None) -> None:
    """Publishes every file of a local folder below `path`, one by one.

    Args:
        last: name of the file whose presence means that the folder is complete: removed first and put back last.
    """
    names = sorted(file.relative_to(local).as_posix() for file in Path(local).rglob("*") if file.is_file())
    if last is not None:
        names.remove(last)
        names.append(last)
        remove(join(path, last))
    for name in names:
        put_file(Path(local) / name, join(path, name))


def list_files(pattern: str, *, hidden: bool = False) -> list[FileInfo]:
    """The files that a path, folder or glob (`*`, `**`) names, sorted by path; hidden ones (see `is_hidden`) left out.

    Args:
        hidden: give those too.

    Raises:
        StorageError: the store cannot be listed. An empty list is no error here.
    """
    with explained("list", pattern):
        if not is_remote(pattern):
            # A name that exists is that name, whatever characters it has; only then may `[`, `*`, `?` mean more.
            names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
            found = [f for name in names for f in ([name] if os.path.isfile(name) else _walk(name))]
            infos = [info for name in dict.fromkeys(found) if (info := _local_info(name)) is not None]
        else:
            store = filesystem(pattern)
            try:
                details = (store.glob if glob.has_magic(pattern) else store.find)(pattern, detail=True).values()
            except FileNotFoundError as error:  # an empty prefix is no error to a store, a missing bucket is
                raise StorageError(f"cannot list {pattern} ({error}); check the bucket's name and AWS_ENDPOINT_URL") from error
            infos = [_remote_info(pattern, detail) for detail in details if detail["type"] == "file"]
    return sorted((info for info in infos if hidden or not is_hidden(info.path, pattern)), key=lambda info: info.path)


def is_hidden(path: str, pattern: str) -> bool:
    """Whether a file that a pattern names is `.x` or `_x`, or lies in such a folder, as what is unfinished does.

    A folder that the pattern itself names that way is none.
    """
    *folders, file = path.split("/")
    odd = [name for name in folders if name.startswith(_HIDDEN)]
    if file.startswith(_HIDDEN) or not odd:
        return file.startswith(_HIDDEN)
    named = (pattern if is_remote(pattern) else os.path.abspath(pattern)).split("/")
    globs = [name for name in named if name.startswith(_HIDDEN)]  # `*` alone names no hidden folder
    return not all(name in named or any(fnmatchcase(name, one) for one in globs) for name in odd)


def _walk(folder: str) -> list[str]:
    return [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]


def _local_info(name: str) -> FileInfo | None:
    try:
        stat = os.stat(name)
    except FileNotFoundError:
        if os.path.islink(name):
            raise  # a link to nothing is no file that vanished
        return None  # removed by another process since it was listed
    if (ROOTS in os.environ or os.path.islink(name)) and (refused := refused_path(name)):
        raise StorageError(f"{name} {refused}")
    return FileInfo(os.path.abspath(name), stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}", stat.st_mtime)


def _remote_info(pattern: str, detail: dict[str, Any]) -> FileInfo:
    path = f"{pattern.partition('://')[0]}://{detail['name']}"
    etag = str(detail.get("ETag", "")).strip('"')
    modified = detail.get("LastModified")
    version = etag or f"{detail['size']}-{modified}"
    return FileInfo(path, int(detail["size"]), version, modified.timestamp() if modified is not None else 0.0)


def remove(path: str) -> None:
    """Removes a file, or a folder with all below it; a missing one is no error."""
    with explained("remove", path):
        if not is_remote(path):
            while os.path.lexists(path):
                with contextlib.suppress(FileNotFoundError):  # another process may be removing the same
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            return
        store = filesystem(path)
        for name in store.find(path):  # one by one: some stores refuse bulk deletes without Content-MD5
            store.rm_file(name)


def cache_folder() -> Path:
    """A folder of this user on this machine's disk, below TMPDIR, for what can be made again."""
    folder = Path(tempfile.gettempdir()) / f"ullme_ray_cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def get_file(file: FileInfo, local: str | Path) -> None:
    """Copies a remote file to a local path.

    Raises:
        StorageError: it cannot be read, or is no longer as it was listed.
    """
    try:
        with explained("read", file.path):
            filesystem(file.path).get_file(file.path, str(local))
    except FileNotFoundError as error:
        raise StorageError(f"{file.path} vanished since it was listed; run again") from error
    if os.path.getsize(local) != file.num_bytes:
        raise StorageError(f"{file.path} changed while it was read; run again")


def fetch_folder(path: str) -> str:
    """A local folder with the files of `path`: itself if local, else a cached copy keyed by the files' versions.

    Raises:
        StorageError: the folder is missing or empty.
    """
    if not is_remote(path):
        if not os.path.isdir(path):
            raise StorageError(f"folder {path} does not exist")
        return path
    files = list_files(path.rstrip("/"))
    if not files:
        raise StorageError(f"folder {path} is empty or does not exist")
    key = hashlib.sha256(repr([(f.path, f.version) for f in files]).encode()).hexdigest()[:24]
    target = cache_folder() / key
    if target.is_dir():
        return str(target)
    partial = tempfile.mkdtemp(dir=target.parent, prefix=".partial-")
    prefix = path.rstrip("/") + "/"
    try:
        with explained("fetch", path):
            for file in files:
                local = Path(partial) / file.path.removeprefix(prefix)
                local.parent.mkdir(parents=True, exist_ok=True)
                filesystem(path).get_file(file.path, str(local))
        with contextlib.suppress(OSError):  # another process was faster; its copy is the same
            os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def check_writable(folder: str) -> None:
    """Writes and removes a small file below `folder`, so that a run fails before its work and not after it.

    Raises:
        StorageError: with the reason.
    """
    probe = join(folder, f"write-check-{os.getpid()}.tmp")
    if folder.startswith("s3://"):
        _knock(folder)
    try:
        write_bytes(probe, b"ok")
    except FileNotFoundError as error:  # a bucket, or a parent that nothing can be made in, such as /proc
        raise StorageError(f"cannot write below {folder} ({error}); check that the folder or bucket can exist") from error
    remove(probe)


def _knock(path: str) -> None:
    """Opens the port of AWS_ENDPOINT_URL once, for a mistyped address is tried for minutes, as a store that restarts is."""
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    through_proxy = getproxies().get(endpoint.scheme) and not proxy_bypass(endpoint.hostname or "")
    if endpoint.hostname and not through_proxy:
        with explained("reach the store of", path):
            port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
            socket.create_connection((endpoint.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
