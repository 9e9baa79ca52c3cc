"""Uploads and downloads through a proxy that spoils them: what is published is whole, and what fails says so."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from proxy import Fate, Proxy, Spoil
from s3_server import S3Server

from ullme_ray import storage, table
from ullme_ray.embed.commit import commit
from ullme_ray.errors import StorageError
from ullme_ray.store_probes import abort_stale_uploads, keeps_exclusive_puts

DATA = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(2**15)) * 16  # 16 MiB, past socket buffers


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(s3.port) as proxy:
        s3.bucket("spoiled")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("fate", ["error", "cut", "lost"])
@pytest.mark.parametrize("how", ["write_bytes", "put_file"])
def test_a_spoiled_upload_is_tried_again_and_whole(proxy: Proxy, fate: str, how: str, tmp_path: Path) -> None:
    path = f"s3://spoiled/again-{fate}-{how}"
    (tmp_path / "local").write_bytes(DATA)
    proxy.spoil(Spoil((fate,), share=0.6))  # type: ignore[arg-type]
    storage.write_bytes(path, DATA) if how == "write_bytes" else storage.put_file(tmp_path / "local", path)
    proxy.spoil(None)
    assert storage.read_bytes(path) == DATA
    assert "PUT" in {request.method for request in proxy.log}


def test_an_upload_cut_every_time_publishes_nothing(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    path = "s3://spoiled/cut"
    storage.write_bytes(path, b"old")
    proxy.spoil(Spoil(("cut",)))
    with pytest.raises(StorageError, match=r"cannot write s3://spoiled/cut .*check AWS_ENDPOINT_URL"):
        storage.write_bytes(path, DATA)
    proxy.spoil(None)
    assert len([request for request in proxy.log if request.fate == "cut"]) >= 2
    assert storage.read_bytes(path) == b"old"


def test_a_store_that_stops_reading_ends_an_upload_at_its_deadline(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout of the client bounds the sending of a body."""
    hurried(monkeypatch)
    monkeypatch.setattr(storage, "_UPLOAD_FLOOR_S", 1.0)
    monkeypatch.setattr(storage, "_SLOWEST_UPLOAD_BYTES_PER_S", 16 * 2**20)
    proxy.spoil(Spoil(("stall",)))
    with pytest.raises(StorageError, match=r"the store did not take 16,777,216 bytes in 2 attempts of 2 s"):
        storage.write_bytes("s3://spoiled/stalled", DATA)
    proxy.spoil(None)
    assert not storage.exists("s3://spoiled/stalled")


def test_a_download_that_breaks_off_is_read_again_or_named(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "s3://spoiled/download"
    storage.write_bytes(path, DATA)
    proxy.spoil(Spoil(("cut",), share=0.5))
    with storage.open_read(path) as stream:
        assert stream.read() == DATA
    assert any(request.fate == "cut" for request in proxy.log)
    hurried(monkeypatch)
    proxy.spoil(None)

    def read_until_spoiled(fate: Fate) -> None:
        with storage.open_read(path) as stream:
            assert stream.read(10) == DATA[:10]
            proxy.spoil(Spoil((fate,)))
            stream.seek(12 * 2**20)
            stream.read()

    fates: tuple[Fate, ...] = ("cut", "error")
    for fate in fates:
        with pytest.raises(StorageError, match="cannot read s3://spoiled/download"):
            read_until_spoiled(fate)
        proxy.spoil(None)


def test_an_error_of_the_caller_passes_a_remote_stream_as_it_is(proxy: Proxy) -> None:
    storage.write_bytes("s3://spoiled/some", b"x")
    with pytest.raises(ValueError, match="mine"), storage.open_read("s3://spoiled/some"):
        raise ValueError("mine")


def test_stores_that_keep_refuse_and_ignore_conditional_puts_are_told_apart(proxy: Proxy, tmp_path: Path) -> None:
    assert keeps_exclusive_puts(str(tmp_path))
    assert keeps_exclusive_puts("s3://spoiled/probe")
    proxy.spoil(Spoil(("careless",)))
    assert not keeps_exclusive_puts("s3://spoiled/probe")
    proxy.spoil(Spoil(("unsupported",)))
    with pytest.raises(StorageError, match=r"the store of s3://spoiled/probe has no conditional puts"):
        keeps_exclusive_puts("s3://spoiled/probe")
    proxy.spoil(Spoil(("lost",), share=0.5))
    assert keeps_exclusive_puts("s3://spoiled/probe")
    proxy.spoil(None)
    assert storage.list_files("s3://spoiled/probe") == []


def test_a_table_is_opened_through_answers_that_break_off(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """deltalake tries them but once."""
    path = "s3://spoiled/table"
    write_deltalake(path, pa.table({"a": [1]}), storage_options=table.delta_options(path))
    proxy.spoil(Spoil(("cut",), share=0.2))
    assert all(table.find_table(path) is not None for _ in range(5))
    assert any(request.fate == "cut" for request in proxy.log)
    monkeypatch.setattr(table, "_READ_ATTEMPTS", 1)
    proxy.spoil(Spoil(("cut",)))
    with pytest.raises(StorageError, match=r"cannot read the table s3://spoiled/table \(.*reset by peer"):
        table.find_table(path)


@pytest.mark.parametrize("fate", ["lost", "cut", "error"])
def test_a_commit_whose_put_fails_or_whose_answer_is_lost_is_made_once(proxy: Proxy, fate: Fate) -> None:
    path = f"s3://spoiled/commit-{fate}"
    proxy.spoil(Spoil((fate,)))
    healed = threading.Timer(1.5, proxy.spoil, [None])
    healed.start()
    commit(path, {}, pa.schema([("id", pa.string())]), job_name="docs", fingerprint="f1")
    healed.join()
    assert fate in {request.fate for request in proxy.log}
    assert table.open_table(path).version() == 0
    assert table.open_table(path).metadata().name == "docs"


def test_only_old_uploads_below_the_folder_are_ended(s3: S3Server) -> None:
    store = storage.filesystem("s3://")
    s3.bucket("uploads")
    for key in ("table/part-1", "table/deep/part-2", "tables/part-3"):
        store.call_s3("create_multipart_upload", Bucket="uploads", Key=key)

    def pending() -> list[str]:
        found = store.call_s3("list_multipart_uploads", Bucket="uploads")
        return sorted(upload["Key"] for upload in found.get("Uploads", ()))

    assert len(pending()) == 3
    assert abort_stale_uploads("s3://uploads/table") == 0
    assert abort_stale_uploads("s3://uploads/table", older_than=timedelta(0)) == 2
    assert pending() == ["tables/part-3"]


def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up at once, made anew."""
    monkeypatch.setattr(storage, "_REQUEST_ATTEMPTS", 1)
    monkeypatch.setattr(storage, "_CALL_ATTEMPTS", 2)
    monkeypatch.setenv("AWS_TEST_CLIENT", "hurried")  # another environment is another client
