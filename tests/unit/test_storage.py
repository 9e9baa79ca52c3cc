"""Local storage under crashes and races: a file appears whole or not at all, and never fails another process."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ullme_ray import storage
from ullme_ray.errors import StorageError


def test_two_threads_may_put_the_same_path(tmp_path: Path) -> None:
    sources = []
    for number in range(4):
        source = tmp_path / f"source-{number}"
        source.write_bytes(bytes([number]) * 2**20)
        sources.append(source)
    target = tmp_path / "out" / "file"
    errors: list[Exception] = []

    def put(source: Path) -> None:
        try:
            for _ in range(20):
                storage.put_file(source, str(target))
        except Exception as error:  # noqa: BLE001 - told by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=put, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert target.read_bytes() in {source.read_bytes() for source in sources}
    assert os.listdir(target.parent) == ["file"], "no temporary file stays"


@pytest.mark.parametrize("how", ["put_file", "write_bytes"])
def test_content_is_on_disk_before_its_name(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle: int) -> None:
        events.append("fsync")
        fsync(handle)

    def recorded_replace(old: str, new: str) -> None:
        events.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    source = tmp_path / "source"
    source.write_bytes(b"x")
    target = str(tmp_path / "target")
    if how == "put_file":
        storage.put_file(source, target)
    else:
        storage.write_bytes(target, b"x")
    assert storage.read_bytes(target) == b"x"
    assert events == ["fsync", "replace"]


def test_published_files_are_readable_as_any_new_file_is(tmp_path: Path) -> None:
    """A folder on a shared disk belongs to a team; files open to their writer alone would shut it out."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    storage.write_bytes(str(tmp_path / "written"), b"x")
    storage.put_file(plain, str(tmp_path / "put"))
    assert (tmp_path / "written").stat().st_mode == plain.stat().st_mode == (tmp_path / "put").stat().st_mode


def test_failed_put_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out" / "file"
    storage.write_bytes(str(target), b"old")
    with pytest.raises(FileNotFoundError):
        storage.put_file(tmp_path / "missing", str(target))
    (tmp_path / "out" / "folder" / "x").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot write"):  # a folder cannot be replaced by a file
        storage.write_bytes(str(tmp_path / "out" / "folder"), b"new")
    assert sorted(os.listdir(tmp_path / "out")) == ["file", "folder"]
    assert target.read_bytes() == b"old"


def test_names_with_glob_characters_are_names_first(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    folder.mkdir()
    (folder / "a*.jsonl").write_text("{}")
    (folder / "ab.jsonl").write_text("{}")
    assert [os.path.basename(f.path) for f in storage.list_files(str(folder))] == ["a*.jsonl", "ab.jsonl"]
    assert [os.path.basename(f.path) for f in storage.list_files(str(folder / "a*.jsonl"))] == ["a*.jsonl"]


def test_what_lies_in_a_hidden_folder_is_hidden_unless_the_pattern_names_it(tmp_path: Path) -> None:
    corpus = tmp_path / "_mine" / "corpus"
    for name in ("a/x.parquet", "_temporary/0/b.parquet", "a/.cache/c.parquet", "_SUCCESS", "a/_d.parquet"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text("x")

    def listed(pattern: str) -> list[str]:
        return [f.path.removeprefix(f"{corpus}/") for f in storage.list_files(f"{corpus}/{pattern}".rstrip("/"))]

    assert listed("") == listed("**/*.parquet") == ["a/x.parquet"]
    assert (
        listed("_temporary") == listed("_temporary/**/*.parquet") == listed("_temp*/0/*.parquet") == ["_temporary/0/b.parquet"]
    )
    assert listed("a/.cache/*") == ["a/.cache/c.parquet"]
    assert len(storage.list_files(str(corpus), hidden=True)) == 5
    for name in ("_temporary/0/b.parquet", ".x/b.parquet"):
        assert storage.is_hidden(f"s3://b/_c/{name}", "s3://b/_c/**")
        assert not storage.is_hidden(f"s3://b/_c/{name}", f"s3://b/_c/{name.split('/')[0]}")


def test_a_file_removed_while_it_is_listed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stays").write_text("x")
    (tmp_path / "goes").write_text("x")
    walk = os.walk

    def walk_then_remove(folder: str) -> object:
        found = list(walk(folder))
        (tmp_path / "goes").unlink()
        return found

    monkeypatch.setattr(os, "walk", walk_then_remove)
    assert [os.path.basename(f.path) for f in storage.list_files(str(tmp_path))] == ["stays"]


def test_two_threads_may_remove_the_same_folder(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def remove() -> None:
        try:
            storage.remove(str(tmp_path / "folder"))
        except Exception as error:  # noqa: BLE001 - told by the assertion below
            errors.append(error)

    for _ in range(5):
        for number in range(300):
            path = tmp_path / "folder" / f"{number % 10}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        threads = [threading.Thread(target=remove) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not (tmp_path / "folder").exists()
    assert errors == []


def test_folder_counts_as_complete_only_with_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, target = tmp_path / "local", tmp_path / "target"
    for name in ("a/config.json", "modules.json", "tokenizer.json"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text("new")
    (target / "a").mkdir(parents=True)
    (target / "modules.json").write_text("old")
    put_file = storage.put_file
    marked: list[bool] = []

    def watched(source: str | Path, path: str) -> None:
        marked.append((target / "modules.json").exists())
        put_file(source, path)

    monkeypatch.setattr(storage, "put_file", watched)
    storage.put_folder(local, str(target), last="modules.json")
    assert marked == [False, False, False]
    assert sorted(f.path.removeprefix(f"{target}/") for f in storage.list_files(str(target))) == [
        "a/config.json",
        "modules.json",
        "tokenizer.json",
    ]
    assert (target / "modules.json").read_text() == "new"


def test_a_fetch_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        """Its second file breaks off."""

        def find(self, pattern: str, *, detail: bool) -> dict[str, dict[str, object]]:
            return {name: {"name": f"b/m/{name}", "size": 1, "ETag": name, "type": "file"} for name in ("one", "two")}

        def get_file(self, path: str, local: str) -> None:
            Path(local).write_bytes(b"x")
            if path.endswith("two"):
                raise TimeoutError("the store went silent")

    monkeypatch.setattr(storage, "filesystem", lambda path: Store())
    monkeypatch.setattr(storage, "cache_folder", lambda: tmp_path)
    with pytest.raises(StorageError, match="cannot fetch s3://b/m"):
        storage.fetch_folder("s3://b/m")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(Store, "get_file", lambda self, path, local: Path(local).write_bytes(b"x"))
    assert sorted(os.listdir(storage.fetch_folder("s3://b/m"))) == ["one", "two"]
    assert len(os.listdir(tmp_path)) == 1
