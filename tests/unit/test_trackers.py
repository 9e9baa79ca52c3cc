"""The real clients, offline: W&B's files and an MLflow file store hold what train.jsonl holds, once, over a resume too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from ullme_ray.errors import TrainingError
from ullme_ray.spec import JobSpec
from ullme_ray.train.trackers import Trackers, check_trackers

SECRET = "a-value-that-nobody-may-see"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both services on this machine only."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("HUB_TOKEN_OF_TEST", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET * 2)
    return f"file://{tmp_path}/mlruns"


def make_job(folder: Path, *trackers: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "tracked",
            "storage": str(folder),
            "model": {"base": "scratch", "hub_token": "env:HUB_TOKEN_OF_TEST"},
            "train": {"data": [{"path": "x.jsonl"}], "learning_rate": 0.00123, "trackers": list(trackers)},
        }
    )


def write_records(job: JobSpec, folder: Path, steps: range) -> list[dict[str, Any]]:
    """As rank 0 does: the records up to the checkpoint stand in train.jsonl when a run resumes."""
    records = [{"step": step, "loss": 1.0 / step, "validation_ndcg": 0.1 * step, "note": "text"} for step in steps]
    path = folder / job.name / "metrics" / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def history(store: str, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("ullme-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])  # one, however often it was resumed
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_has_each_record_once_over_a_crash_and_a_resume(tmp_path: Path, store: str) -> None:
    job = make_job(tmp_path, "mlflow")
    records = write_records(job, tmp_path, range(1, 7))
    notes: list[str] = []

    def crash() -> None:
        with Trackers(job, notes.append, steps_done=0) as trackers:
            for record in [*records[:4], *records[2:4]]:  # ranks that restart repeat steps 3 and 4
                trackers.write(record)
            raise KeyError

    with pytest.raises(KeyError):
        crash()
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("ullme-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.params["train.learning_rate"] == "0.00123"
    with Trackers(job, notes.append, steps_done=6) as trackers:  # step 5 and 6 were never sent, 7 is new
        trackers.write({"step": 7, "loss": 0.5})
    expected = [(record["step"], record["loss"]) for record in records]
    assert history(store, "loss") == [*expected, (7, 0.5)]
    assert [step for step, _ in history(store, "validation_ndcg")] == [1, 2, 3, 4, 5, 6]
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert sum("mlflow: run" in note for note in notes) == 2


def test_wandb_keeps_one_id_and_offline_files(tmp_path: Path, store: str) -> None:
    job = make_job(tmp_path, "wandb")
    records = write_records(job, tmp_path, range(1, 4))
    notes: list[str] = []
    for steps_done in (0, 3):
        with Trackers(job, notes.append, steps_done=steps_done) as trackers:
            for record in records:
                trackers.write(record)
    metrics = tmp_path / "tracked" / "metrics"
    run_id = json.loads((metrics / "trackers.json").read_text())["wandb"]
    files = sorted((metrics / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    content = b"".join(file.read_bytes() for file in files)
    assert b"validation_ndcg" in content
    assert b"train.learning_rate" in content
    assert all(str(metrics / "wandb") in note and "(offline)" in note for note in notes)


def test_no_secret_reaches_a_service(tmp_path: Path, store: str) -> None:
    job = make_job(tmp_path, "wandb", "mlflow")
    with Trackers(job, lambda note: None, steps_done=0) as trackers:
        trackers.write({"step": 1, "loss": 1.0})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = b"\n".join(path.read_bytes() for path in written)
    assert len(written) > 10
    assert b"train.learning_rate" in content  # the control: what is sent can be seen in these files
    assert SECRET.encode() not in content
    assert b"HUB_TOKEN_OF_TEST" not in content


def test_nothing_is_sent_unasked(tmp_path: Path, store: str) -> None:
    with Trackers(make_job(tmp_path), lambda note: None, steps_done=0) as trackers:
        trackers.write({"step": 1, "loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_service_that_fails_in_mid_run_is_left_out_with_a_note(tmp_path: Path, store: str) -> None:
    job = make_job(tmp_path, "mlflow")
    notes: list[str] = []
    with Trackers(job, notes.append, steps_done=0) as trackers:
        trackers.write({"step": 1, "loss": 1.0})
        (run_folder,) = (path.parent for path in (tmp_path / "mlruns").glob("*/*/meta.yaml"))
        (run_folder / "meta.yaml").unlink()  # the store lost the run
        for step in (2, 3):
            trackers.write({"step": step, "loss": 1.0})
    assert sum("takes nothing from step 2 on" in note for note in notes) == 1
    assert all("step 3" not in note for note in notes)
    with pytest.raises(TrainingError, match=r"mlflow cannot be started \(its run is .*; remove .*trackers\.json"):
        Trackers(job, notes.append, steps_done=0)


def test_a_missing_client_is_named_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, and with a folder of its name instead, such as the one W&B makes where it runs."""
    (tmp_path / "wandb").mkdir()
    without = [entry for entry in sys.path if not (Path(entry) / "wandb" / "__init__.py").is_file()]
    assert len(without) < len(sys.path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *without])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(TrainingError, match=r"names wandb, which is not installed.*pip install wandb, or remove it"):
        check_trackers(make_job(tmp_path, "wandb"))


def test_wandb_needs_a_key_or_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    wandb.teardown()
    with pytest.raises(TrainingError, match=r"WANDB_API_KEY.*WANDB_MODE=offline"):
        check_trackers(make_job(tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    check_trackers(make_job(tmp_path, "wandb"))


def test_mlflow_must_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrainingError, match=r"mlflow cannot be used.*MLFLOW_TRACKING_URI"):
        check_trackers(make_job(tmp_path, "mlflow"))
