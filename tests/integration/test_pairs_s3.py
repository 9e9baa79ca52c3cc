"""Training on a real S3 server: rows the same as from disk, its troubles told apart from broken files, one driver per run."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ullme_ray import storage
from ullme_ray.errors import DataError, StorageError, TrainingError
from ullme_ray.pairs import Pair, check_sources, data_fingerprint, read_sources
from ullme_ray.spec import JobSpec
from ullme_ray.store_probes import put_if_absent
from ullme_ray.train.lock import RunLock


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))


def make_job(bucket: str, *paths: str, **train: Any) -> JobSpec:
    settings = {"data": [{"path": path} for path in paths], "objective": "cl", **train}
    return JobSpec.model_validate({"name": "t", "storage": f"{bucket}/runs", "model": {"base": "m"}, "train": settings})


def test_rows_from_s3_are_those_on_disk_and_rejects_go_to_the_run_folder(s3: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    bucket = s3.bucket("pairs")
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(500)]
    lines = [json.dumps(row) + "\n" for row in rows]
    parts = {
        "part-0.jsonl": "".join(lines[:200]).encode(),
        "part-1.jsonl.gz": gzip.compress("".join(lines[200:]).encode() + b"x\n"),
    }
    for name, content in parts.items():
        storage.write_bytes(f"{bucket}/in/{name}", content)
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    storage.put_folder(tmp_path / "saved", f"{bucket}/saved")

    job = make_job(bucket, f"{bucket}/in", f"{bucket}/in/part-*", f"{bucket}/in/part-0.jsonl", f"{bucket}/saved")
    check_sources(job)
    folder, pattern, single, saved = read_sources(job)
    expected = [Pair(row["query"], (row["positive"],), ()) for row in rows]
    assert list(folder.pairs) == list(pattern.pairs) == list(saved.pairs) == expected
    assert list(single.pairs) == expected[:200]
    (local,) = read_sources(make_job(str(tmp_path), str(tmp_path / "in")))
    assert data_fingerprint([local]) == data_fingerprint([folder])
    listed = [json.loads(line) for line in storage.read_text(f"{bucket}/runs/t/rejects.jsonl").splitlines()]
    assert [(r["file"], r["row"], r["reason"]) for r in listed] == [(f"{bucket}/in/part-1.jsonl.gz", 301, "is not JSON")] * 2

    storage.write_bytes(f"{bucket}/in/part-0.jsonl", "".join(lines[:199]).encode())
    assert len(read_sources(job)[0].pairs) == 499, "a new version of an object is read anew"


def test_broken_and_missing_objects(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket("broken-pairs")
    storage.write_bytes(f"{bucket}/cut.jsonl.gz", gzip.compress(b'{"query": "q", "positive": "p"}\n' * 9)[:-9])
    with pytest.raises(DataError, match=rf"{bucket}/cut\.jsonl\.gz cannot be read past line"):
        read_sources(make_job(bucket, f"{bucket}/cut.jsonl.gz"))
    with pytest.raises(DataError, match="matches no data file"):
        read_sources(make_job(bucket, f"{bucket}/missing/"))
    with pytest.raises(StorageError, match="no-such-bucket"):
        read_sources(make_job(bucket, "s3://no-such-bucket-here/x.jsonl"))
    (listed,) = storage.list_files(f"{bucket}/cut.jsonl.gz")
    storage.write_bytes(f"{bucket}/cut.jsonl.gz", b"short")
    with pytest.raises(StorageError, match="changed while it was read"):
        storage.get_file(listed, str(tmp_path / "copy"))
    storage.remove(f"{bucket}/cut.jsonl.gz")
    with pytest.raises(StorageError, match="vanished since it was listed"):
        storage.get_file(listed, str(tmp_path / "copy"))


HOLD = """
import sys, time
from ullme_ray.spec import parse_job
from ullme_ray.train.lock import RunLock
with RunLock(parse_job(sys.argv[1].encode()), print, beat_s=0.2):
    print("held", flush=True)
    time.sleep(120)
"""


def test_one_driver_at_a_time_trains_in_a_run_folder_on_s3(s3: Any) -> None:
    """Of drivers that start at once one gets the lock; a second is refused while the first lives, not once it was killed."""
    bucket = s3.bucket("locks")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: put_if_absent(f"{bucket}/race", str(number).encode()), range(8)))
    assert won.count(True) == 1
    assert storage.read_text(f"{bucket}/race") == str(won.index(True))
    job = make_job(bucket, "x.jsonl")
    text = json.dumps(job.model_dump(mode="json", exclude_unset=True))
    first = subprocess.Popen([sys.executable, "-c", HOLD, text], stdout=subprocess.PIPE)
    notes: list[str] = []
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with (
            pytest.raises(TrainingError, match=f"process {first.pid}.*wait for its end"),
            RunLock(job, notes.append, silent_s=20.0),
        ):
            pass
        assert "may be training here" in notes.pop()
    finally:
        first.kill()
        first.wait()
    with RunLock(job, notes.append, silent_s=600.0):
        assert storage.exists(f"{bucket}/runs/t/train.lock")
    assert notes == []  # seen to be dead, so nothing was waited for
    assert not storage.exists(f"{bucket}/runs/t/train.lock")
