"""Training on a real Ray with real ranks: the same losses when killed, under any ZeRO stage, on disk and on S3."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from ullme_ray import storage
from ullme_ray.errors import DataError, ModelError, TrainingError
from ullme_ray.model import open_encoder
from ullme_ray.spec import JobSpec
from ullme_ray.spec.run_folder import RunFolder, dump_job
from ullme_ray.train import preflight, run_train
from ullme_ray.train.checkpoint import list_checkpoints

WORDS = ["bucket", "object", "policy", "access", "private", "public", "list", "key", "table", "query", "value", "request"]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 rows; a passage shares its query's first word, so there is something to learn."""
    generator = random.Random(1)
    path = tmp_path_factory.mktemp("pairs") / "train.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        for row in range(40):
            topic = WORDS[row % len(WORDS)]
            text = [" ".join([topic, *generator.choices(WORDS, k=6)]) for _ in range(3)]
            stream.write(
                json.dumps({"query": text[0], "positive": text[1], "negatives": [" ".join(text[2].split()[1:])]}) + "\n"
            )
    return str(path)


def make_job(name: str, folder: Path | str, pairs: str, *, model: dict[str, Any] | None = None, **train: Any) -> JobSpec:
    settings = {
        "objective": "grl",
        "data": [{"path": pairs}],
        "global_batch_size": 8,
        "chunk_size": 3,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "checkpoint_every_steps": 4,
        "workers": {"num_workers": 2},
        **train,
    }
    scratch = {"hidden_size": 32, "layers": 2, "heads": 4, "vocab_size": 300}
    shape = {"base": "scratch", "max_tokens": 32, "scratch": scratch, **(model or {})}
    return JobSpec.model_validate({"name": name, "storage": str(folder), "model": shape, "train": settings})


def losses(job: JobSpec, folder: Path | str) -> dict[int, list[float]]:
    text = storage.read_text(storage.join(str(folder), job.name, "metrics", "train.jsonl"))
    records = [json.loads(line) for line in text.splitlines()]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1)), "a step is missing or logged twice"
    names = ("loss", "contrastive_loss", "generation_loss", "alignment_loss", "grad_norm")
    return {r["step"]: [r[name] for name in names] for r in records}


def assert_same_losses(one: dict[int, list[float]], other: dict[int, list[float]]) -> None:
    assert one.keys() == other.keys()
    for step, values in one.items():
        np.testing.assert_allclose(other[step], values, rtol=1e-5, atol=1e-6, err_msg=f"step {step}")


@pytest.fixture(scope="module")
def unbroken(ray_local: None, pairs_file: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobSpec, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    job = make_job("unbroken", folder, pairs_file, deepspeed={"zero_stage": 1})
    preflight(job)
    result = run_train(job)
    assert not result.already_done
    assert result.final["step"] == 12
    return job, folder


def test_run_learns_exports_and_does_nothing_twice(unbroken: tuple[JobSpec, Path]) -> None:
    job, folder = unbroken
    curve = losses(job, folder)
    assert len(curve) == 12
    assert all(np.isfinite(curve[step]).all() for step in curve)
    # Three distinct terms are really trained, not one of them thrice or never.
    assert len({tuple(np.round(values[1:4], 6)) for values in curve.values()}) == 12
    assert all(min(values[1:4]) > 0 for values in curve.values())
    trained, base = open_encoder(job), open_encoder(job, which="base")
    assert trained.fingerprint != base.fingerprint
    assert float(trained.encode(["bucket"])[0] @ base.encode(["bucket"])[0]) < 0.9999
    assert list((folder / job.name / "metrics" / "tensorboard").glob("events.*"))
    assert [c.step for c in list_checkpoints(job)] == [8, 12]
    assert run_train(job).already_done


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_gives_the_same_losses(
    unbroken: tuple[JobSpec, Path], pairs_file: str, tmp_path: Path, stage: int
) -> None:
    job = make_job("unbroken", tmp_path, pairs_file, deepspeed={"zero_stage": stage})
    run_train(job)
    assert_same_losses(losses(*unbroken), losses(job, tmp_path))
    ours, theirs = open_encoder(job).encode(WORDS), open_encoder(unbroken[0]).encode(WORDS)
    assert (ours * theirs).sum(axis=1).min() > 0.999999


def test_one_rank_and_another_chunk_size_give_the_same_losses(
    unbroken: tuple[JobSpec, Path], pairs_file: str, tmp_path: Path
) -> None:
    job = make_job("unbroken", tmp_path, pairs_file, workers={"num_workers": 1}, chunk_size=8)
    run_train(job)
    assert_same_losses(losses(*unbroken), losses(job, tmp_path))


def test_run_on_s3_gives_the_same_losses(unbroken: tuple[JobSpec, Path], pairs_file: str, s3: Any) -> None:
    bucket = s3.bucket("train")
    job = make_job("unbroken", bucket, pairs_file)
    preflight(job)
    run_train(job)
    assert_same_losses(losses(*unbroken), losses(job, bucket))
    ours, theirs = open_encoder(job).encode(WORDS), open_encoder(unbroken[0]).encode(WORDS)
    assert (ours * theirs).sum(axis=1).min() > 0.999999


def test_lora_in_bfloat16_under_zero_3_trains_and_exports(
    ray_local: None, tiny_base: str, pairs_file: str, tmp_path: Path
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    for stage in (1, 3):
        model = {"base": tiny_base, "lora": lora, "dtype": "bfloat16"}
        job = make_job(f"lora-{stage}", tmp_path, pairs_file, model=model, deepspeed={"zero_stage": stage}, max_steps=4)
        run_train(job)
        assert (tmp_path / job.name / "adapter" / "adapter_model.safetensors").is_file()
        before, after = open_encoder(job, which="base").encode(WORDS), open_encoder(job).encode(WORDS)
        assert (before * after).sum(axis=1).min() < 0.9999
    assert losses(job, tmp_path)[1][0] == pytest.approx(
        losses(make_job("lora-1", tmp_path, pairs_file), tmp_path)[1][0], rel=2e-2
    )


def wait_for_step(metrics: Path, step: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")


def test_killed_rank_is_survived_with_the_same_losses(ray_local: None, pairs_file: str, tmp_path: Path) -> None:
    import threading

    whole = make_job("whole", tmp_path, pairs_file, max_steps=40)
    run_train(whole)
    job = make_job("killed", tmp_path, pairs_file, max_steps=40)
    killed: list[int] = []
    metrics = tmp_path / "killed" / "metrics" / "train.jsonl"
    before: list[str] = []

    def kill_a_rank() -> None:
        wait_for_step(metrics, 6)
        before.extend(metrics.read_text().splitlines()[:4])
        ranks = [p for p in psutil.process_iter(["name", "cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
        own = [p for p in ranks if ray_owns(p)]
        victim = own[0]
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    thread = threading.Thread(target=kill_a_rank)
    thread.start()
    run_train(job)
    thread.join()
    assert len(killed) == 1
    # The records hold times, which no second run of a step would repeat: the checkpoint's steps were not done again.
    assert metrics.read_text().splitlines()[:4] == before
    assert_same_losses(losses(whole, tmp_path), losses(job, tmp_path))
    ours, theirs = open_encoder(job).encode(WORDS), open_encoder(whole).encode(WORDS)
    assert (ours * theirs).sum(axis=1).min() > 0.999999


def ray_owns(process: psutil.Process) -> bool:
    """Whether a process belongs to this test's Ray and not to another one on the machine."""
    session = ray._private.worker._global_node.get_session_dir_path()
    raylets = [p for p in process.parents() if "raylet" in p.name()]
    return any(session in " ".join(p.cmdline()) for p in raylets)


def test_killed_driver_resumes_with_the_same_losses(unbroken: tuple[JobSpec, Path], pairs_file: str, tmp_path: Path) -> None:
    whole = make_job("whole", tmp_path, pairs_file, max_steps=40)
    run_train(whole)
    job = make_job("driver", tmp_path, pairs_file, max_steps=40)
    job_file = tmp_path / "job.yaml"
    job_file.write_text(dump_job(job))
    command = [sys.executable, "-m", "ullme_ray", "train", str(job_file)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    tree: list[psutil.Process] = []
    try:
        wait_for_step(tmp_path / "driver" / "metrics" / "train.jsonl", 7)
        tree = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        _, alive = psutil.wait_procs(tree, timeout=60)
        assert not [p for p in alive if "RayTrainWorker" in " ".join(p.cmdline())], "ranks outlive their driver"
    finally:
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    steps_at_kill = len((tmp_path / "driver" / "metrics" / "train.jsonl").read_text().splitlines())
    assert 7 <= steps_at_kill < 40, "the driver must die in mid-run for this test to mean anything"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumes after step" in again.stderr
    assert_same_losses(losses(whole, tmp_path), losses(job, tmp_path))


def test_resume_under_other_settings_is_refused_by_name(unbroken: tuple[JobSpec, Path], pairs_file: str) -> None:
    _, folder = unbroken
    changed = make_job("unbroken", folder, pairs_file, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"train\.learning_rate: 0\.003 -> 0\.001.*another name"):
        preflight(changed)
    with pytest.raises(TrainingError, match=r"train\.learning_rate"):
        run_train(changed)
    faster = make_job("unbroken", folder, pairs_file, chunk_size=1, checkpoint_every_steps=5, max_failures=0)
    preflight(faster)  # these change no number of the run


def test_damaged_or_incomplete_checkpoints(unbroken: tuple[JobSpec, Path], pairs_file: str, tmp_path: Path) -> None:
    job = make_job("damaged", tmp_path, pairs_file, max_steps=8)
    run_train(job)
    newest = Path(list_checkpoints(job)[-1].path)
    # A folder without its manifest is what a crash in mid-write leaves: it does not count.
    (newest / "checkpoint.json").unlink()
    assert [c.step for c in list_checkpoints(job)] == [4]
    storage.remove(str(tmp_path / "damaged" / "model"))
    assert run_train(job).steps == 8  # goes on from step 4
    part = next(newest.rglob("*.pt"))
    part.write_bytes(part.read_bytes()[:-1])
    storage.remove(str(tmp_path / "damaged" / "model"))
    with pytest.raises(TrainingError, match=f"{part.name} is damaged"):
        run_train(job)


def test_rows_left_out_are_told(ray_local: None, pairs_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = tmp_path / "mixed.jsonl"
    with gzip.open(pairs_file, "rt") as stream:
        mixed.write_text(stream.read() + '{"query": "x"}\nnot json\n')
    job = make_job("told", tmp_path, str(mixed), max_steps=1, workers={"num_workers": 1})
    run_train(job)
    assert "2 of 42 rows left out (1 x has no positive passage; 1 x is not JSON)" in capsys.readouterr().err
    rejects = [json.loads(line) for line in Path(RunFolder.of(job).rejects).read_text().splitlines()]
    assert [(r["file"], r["row"]) for r in rejects] == [(str(mixed), 41), (str(mixed), 42)]


def test_errors_come_before_long_work(ray_local: None, tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.data\.0\.path = .*nowhere.* matches no data file"):
        preflight(make_job("a", tmp_path, str(tmp_path / "nowhere*.jsonl")))
    with pytest.raises(ModelError, match="is not a folder"):
        preflight(make_job("b", tmp_path, pairs_file, model={"base": "/no/such/model"}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "x"}\nnot json\n')
    with pytest.raises(DataError, match="holds no usable row; all 2 were left out"):
        run_train(make_job("c", tmp_path, str(bad)))
    # An error inside the ranks that no restart can cure comes home as it is, and at once.
    with pytest.raises(DataError, match="has fewer hard negatives than"):
        run_train(make_job("d", tmp_path, pairs_file, missing_negatives="reject", negatives_per_query=3))
