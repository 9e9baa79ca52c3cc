"""What a crash may leave of a run's files, and how the next start takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ullme_ray import storage
from ullme_ray.errors import ModelError, TrainingError
from ullme_ray.model import ensure_base
from ullme_ray.spec import JobSpec
from ullme_ray.train.checkpoint import list_checkpoints
from ullme_ray.train.metrics import MetricsLog


def make_job(folder: Path, **changes: Any) -> JobSpec:
    (folder / "pairs.jsonl").write_text(json.dumps({"query": "how", "positive": "so", "negative": "not so"}) + "\n")
    scratch = {"hidden_size": 32, "layers": 1, "heads": 4, "vocab_size": 300}
    job = {
        "name": "t",
        "storage": str(folder),
        "model": {"base": "scratch", "max_tokens": 32, "scratch": scratch},
        "train": {"data": [{"path": str(folder / "pairs.jsonl")}]},
    }
    return JobSpec.model_validate(job | changes)


@pytest.mark.parametrize("torn", ['{"step": 4, "los', '{"st', "4", "\x00\x00", '{"loss": 1.0}'])
def test_a_metrics_line_cut_off_by_a_crash_is_dropped(tmp_path: Path, torn: str) -> None:
    log = MetricsLog(str(tmp_path), steps_done=0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    file = tmp_path / "train.jsonl"
    with file.open("a") as stream:
        stream.write(torn)
    resumed = MetricsLog(str(tmp_path), steps_done=2)
    resumed.write({"step": 3, "loss": 0.25})
    resumed.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]


def write_checkpoint(job: JobSpec, folder: Path, step: int) -> Path:
    path = folder / job.name / "checkpoints" / f"step-{step:08d}"
    storage.write_text(str(path / "state" / "weights.pt"), "x")
    storage.write_text(str(path / "checkpoint.json"), json.dumps({"step": step}))
    return path


@pytest.mark.parametrize("name", ["plain", "with [1] and *"])
def test_checkpoints_are_found_in_any_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    job = make_job(folder)
    write_checkpoint(job, folder, 10)
    write_checkpoint(job, folder, 9)
    (write_checkpoint(job, folder, 11) / "checkpoint.json").unlink()
    assert [c.step for c in list_checkpoints(job)] == [9, 10]


def test_a_checkpoint_that_another_process_removes_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    write_checkpoint(job, tmp_path, 4)
    gone = write_checkpoint(job, tmp_path, 8)
    read_text = storage.read_text

    def read_late(path: str) -> str:
        if path.startswith(str(gone)):
            storage.remove(str(gone))
        return read_text(path)

    monkeypatch.setattr(storage, "read_text", read_late)
    assert [c.step for c in list_checkpoints(job)] == [4]


@pytest.mark.parametrize("content", ["", '{"step": 8, "wor', "[]", "{}"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    job = make_job(tmp_path)
    path = write_checkpoint(job, tmp_path, 8)
    (path / "checkpoint.json").write_text(content)
    with pytest.raises(TrainingError, match=r"step-00000008/checkpoint\.json is damaged .*remove .*step-00000008 "):
        list_checkpoints(job)


def test_scratch_model_of_another_shape_is_not_taken_for_this_one(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ensure_base(job)
    before = storage.list_files(str(tmp_path / "t" / "base"))
    ensure_base(job)
    assert storage.list_files(str(tmp_path / "t" / "base")) == before
    for changed in (
        make_job(tmp_path, seed=1),
        make_job(tmp_path, model={**job.model.model_dump(exclude={"max_tokens"}), "max_tokens": 64}),
        make_job(tmp_path, model={**job.model.model_dump(exclude={"scratch"}), "scratch": {"hidden_size": 64}}),
    ):
        with pytest.raises(ModelError, match=r"other values of model\.scratch.*another name"):
            ensure_base(changed)
