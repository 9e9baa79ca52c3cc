"""What a job file may not name: the kernel's folders, folders outside the roots, metadata services in any spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from ullme_ray import storage
from ullme_ray.errors import JobFileError, StorageError
from ullme_ray.reach import refused_host, refused_path, refused_url
from ullme_ray.spec import parse_job


def job(path: str, extra: str = "") -> bytes:
    return f'name: a\nmodel: {{base: m/m}}\nembed: {{input: {{path: "{path}"}}}}\n{extra}'.encode()


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/environ",
        "file:///proc/1/environ",
        "/proc/*/environ",
        "/sys/class",
        "/dev/mem",
        "/data/../proc/self/environ",
        "/var/run/secrets/kubernetes.io/serviceaccount/token",
        "/run/secrets/x",
    ],
)
def test_folders_of_the_kernel_and_of_tokens_are_refused(path: str) -> None:
    with pytest.raises(JobFileError, match=r"embed\.input\.path = .* leads to .*, which is no place for data"):
        parse_job(job(path))


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "corpus").symlink_to("/proc/self")
    assert refused_path(f"{tmp_path}/corpus/environ")
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/environ")
    with pytest.raises(StorageError, match="no place for data"):
        storage.list_files(str(tmp_path))


def test_without_roots_any_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULLME_ROOTS", raising=False)
    parse_job(job(f"file://{tmp_path}/corpus.jsonl"))
    parse_job(job("../elsewhere/*.jsonl"))


def test_with_roots_local_paths_lie_below_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.jsonl").write_text("{}")
    (inside / "rows.jsonl").write_text("{}")
    monkeypatch.setenv("ULLME_ROOTS", f"{inside}:/mnt/ullme")
    extra = f"storage: {inside}/runs\n"
    parse_job(job(f"file://{inside}/*.jsonl", extra))
    parse_job(job("s3://bucket/corpus", extra))
    for path in (f"file://{outside}/secret.jsonl", f"{inside}/../outside/secret.jsonl", f"{inside}2/x", "/etc/passwd"):
        with pytest.raises(JobFileError, match=r"embed\.input\.path = .* leads to .*, outside of .*inside, /mnt/ullme"):
            parse_job(job(path, extra))
    with pytest.raises(JobFileError, match="storage = "):
        parse_job(job(f"{inside}/x", f"storage: {outside}\n"))
    with pytest.raises(JobFileError, match=r"model\.base = /etc"):
        parse_job(job(f"{inside}/x", extra).replace(b"m/m", b"/etc"))
    assert len(storage.list_files(str(inside))) == 1
    (inside / "link.jsonl").symlink_to(outside / "secret.jsonl")  # made after the job file was read
    with pytest.raises(StorageError, match="outside of"):
        storage.list_files(str(inside))


EVERYWHERE = """
name: everywhere
storage: runs
model: {base: /proc/1/a}
train: {data: [{path: /proc/1/b}], validation: {path: /proc/1/c}}
mine: {output: /proc/1/d.jsonl, corpus: {path: /proc/1/e}, encoder: {base: /proc/1/f}}
evaluate:
  local: [{path: /proc/1/g, corpus: [/proc/1/h]}]
  mteb: [{folder: /proc/1/i, type: retrieval}]
  models: [{name: other, base: /proc/1/j}]
  generation: {path: /proc/1/k}
embed: {input: {path: /proc/1/l}, output: {path: /proc/1/m}}
serve: {models: [{name: second, base: /proc/1/n}], adapters: [{name: third, path: /proc/1/o}]}
"""


def test_every_place_of_a_job_file_is_looked_at() -> None:
    with pytest.raises(JobFileError) as refused:
        parse_job(EVERYWHERE.encode())
    missing = [letter for letter in "abcdefghijklmno" if f"/proc/1/{letter}" not in str(refused.value)]
    assert missing == []


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.1.1",
        "0xA9FEA9FE",
        "2852039166",
        "169.254.43518",
        "fe80::1",
        "[fe80::1%eth0]",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "metadata.google.internal",
        "METADATA",
        "instance-data.",
        "100.100.100.200",
    ],
)
def test_metadata_services_are_refused_in_any_spelling(host: str) -> None:
    assert refused_host(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "127.0.0.1", "localhost", "169.253.1.1", "example.org", "::1", "2001:db8::1"])
def test_other_hosts_are_not(host: str) -> None:
    assert refused_host(host) is None


def test_urls_and_addresses() -> None:
    assert refused_url("http://169.254.169.254/latest/meta-data")
    assert refused_url("http://user@[fe80::1]:80/x")
    assert refused_url("169.254.169.254:6379")
    assert refused_url("ray://10.0.0.1:10001") is None
    with pytest.raises(JobFileError, match=r"cluster\.address = 169\.254\.169\.254:6379"):
        parse_job(job("c.jsonl", "cluster: {address: 169.254.169.254:6379}\n"))


def test_a_name_is_judged_by_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(2, 1, 6, "", ("169.254.169.254", 0))])
    assert refused_url("https://hooks.example/x", resolve=True)
