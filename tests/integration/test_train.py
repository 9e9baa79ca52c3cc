"""Training on a real Ray with real ranks: the same losses when killed, under any ZeRO stage, on disk and on S3.

What concerns a rank alone runs in this process (`train_here`): each start on Ray spends most of a minute on the imports of a
controller and its ranks.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ullme_ray import storage
from ullme_ray.errors import DataError, ModelError, TrainingError
from ullme_ray.model import open_encoder
from ullme_ray.retrieval.local_set import read_local_set
from ullme_ray.retrieval.metrics import mean_scores, score_run
from ullme_ray.spec import JobSpec
from ullme_ray.spec.run_folder import RunFolder, dump_job
from ullme_ray.train import preflight, run_train
from ullme_ray.train.checkpoint import list_checkpoints, open_checkpoint

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


def test_zero_3_gives_the_same_losses_and_tells_of_rows_left_out(
    unbroken: tuple[JobSpec, Path], pairs_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradients of all four stages on one to three ranks: test_zero_gradients.py."""
    mixed = tmp_path / "mixed.jsonl"
    with gzip.open(pairs_file, "rt") as stream:
        mixed.write_text(stream.read() + "not json\n")
    job = make_job("unbroken", tmp_path, str(mixed), deepspeed={"zero_stage": 3})
    run_train(job)
    assert "1 of 41 rows left out (1 x is not JSON)" in capsys.readouterr().err
    assert_same_losses(losses(*unbroken), losses(job, tmp_path))
    ours, theirs = open_encoder(job).encode(WORDS), open_encoder(unbroken[0]).encode(WORDS)
    assert (ours * theirs).sum(axis=1).min() > 0.999999


@pytest.mark.parametrize("stage", [0, 2])
def test_one_rank_on_s3_with_another_chunk_size_and_stage_gives_the_same_losses(
    unbroken: tuple[JobSpec, Path], pairs_file: str, s3: Any, train_here: Callable[[JobSpec], list[str]], stage: int
) -> None:
    bucket = s3.bucket(f"train-{stage}")
    job = make_job("unbroken", bucket, pairs_file, workers={"num_workers": 1}, chunk_size=8, deepspeed={"zero_stage": stage})
    preflight(job)
    train_here(job)
    assert_same_losses(losses(*unbroken), losses(job, bucket))
    ours, theirs = open_encoder(job).encode(WORDS), open_encoder(unbroken[0]).encode(WORDS)
    assert (ours * theirs).sum(axis=1).min() > 0.999999


def test_lora_in_bfloat16_under_zero_3_trains_and_exports(
    train_here: Callable[[JobSpec], list[str]], tiny_base: str, pairs_file: str, tmp_path: Path
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    for stage in (1, 3):
        model = {"base": tiny_base, "lora": lora, "dtype": "bfloat16"}
        job = make_job(f"lora-{stage}", tmp_path, pairs_file, model=model, deepspeed={"zero_stage": stage}, max_steps=2)
        train_here(job)
        assert (tmp_path / job.name / "adapter" / "adapter_model.safetensors").is_file()
        before, after = open_encoder(job, which="base").encode(WORDS), open_encoder(job).encode(WORDS)
        assert (before * after).sum(axis=1).min() < 0.9999
    assert losses(job, tmp_path)[1][0] == pytest.approx(
        losses(make_job("lora-1", tmp_path, pairs_file), tmp_path)[1][0], rel=2e-2
    )


def wait_for_step(metrics: Path, step: int, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")


def ranks_below(process: psutil.Process, *others: str) -> list[psutil.Process]:
    """The training ranks that a driver's own Ray started, and actors of `others`."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(name in " ".join(child.cmdline()) for name in ("RayTrainWorker", *others)):
                found.append(child)
    return found


def test_killed_four_times_once_with_another_number_of_ranks_ends_as_if_unbroken(
    train_here: Callable[[JobSpec], list[str]], pairs_file: str, tmp_path: Path
) -> None:
    """64 steps: a rank dies, the driver dies, one rank goes on, all is killed with it, two ranks die with their controller."""
    slow: dict[str, Any] = {"scratch": {"hidden_size": 96, "layers": 4, "heads": 4, "vocab_size": 300}}  # to be hit in mid-run
    settings = {"max_steps": 64, "checkpoint_every_steps": 3, "chunk_size": 1}
    whole = make_job("whole", tmp_path, pairs_file, model=slow, **settings)
    job = make_job("killed", tmp_path, pairs_file, model=slow, **settings)
    instants = random.Random(7)
    metrics = tmp_path / "killed" / "metrics" / "train.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    told = tmp_path / "told.txt"

    def start(job: JobSpec, *overrides: str) -> subprocess.Popen[bytes]:
        (tmp_path / f"{job.name}.yaml").write_text(dump_job(job))
        command = [sys.executable, "-m", "ullme_ray", "train", str(tmp_path / f"{job.name}.yaml"), *overrides]
        with told.open("wb") as stream:  # a pipe would stay open as long as any of Ray's processes
            return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=stream)

    def kill_driver(driver: subprocess.Popen[bytes]) -> None:
        """The driver alone: its ranks end by themselves, before the same command could be given again."""
        process = psutil.Process(driver.pid)
        tree, ranks = process.children(recursive=True), ranks_below(process)
        assert len(ranks) == 2
        driver.kill()
        driver.wait()
        assert not psutil.wait_procs(ranks, timeout=60)[1], "ranks outlive their driver"
        for left in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()

    def kill_all_of(driver: subprocess.Popen[bytes]) -> None:
        """As when the machine is lost: the driver, its Ray and the ranks."""
        tree = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait()
        assert not psutil.wait_procs(tree[1:], timeout=60)[1]

    def steps_done() -> int:
        return len(metrics.read_text().splitlines())

    mid_run = "it must die in mid-run for this test to mean anything"
    train_here(whole)

    driver = start(job)
    wait_for_step(metrics, instants.randrange(4, 8))
    before = metrics.read_text().splitlines()[:3]
    instants.choice(ranks_below(psutil.Process(driver.pid))).kill()  # survived by train.max_failures
    wait_for_step(metrics, instants.randrange(11, 15))
    assert metrics.read_text().splitlines()[:3] == before, "records hold times: the checkpoint's steps must not be done again"
    kill_driver(driver)
    assert steps_done() < 40, mid_run  # its ranks do some more before they see that it is gone

    driver = start(job, "train.workers.num_workers=1")
    wait_for_step(metrics, steps_done() + instants.randrange(3, 9))
    kill_all_of(driver)
    assert steps_done() < 58, mid_run

    driver = start(job)
    wait_for_step(metrics, steps_done() + 2)
    victims = ranks_below(psutil.Process(driver.pid), "TrainController", "PlacementGroupCleaner")
    assert len(victims) == 4
    for process in victims:  # as Ray does for want of memory
        process.kill()
    assert steps_done() < 64, mid_run
    assert driver.wait() == 0, told.read_text()[-3000:]
    assert re.search(r"Ray Train's controller died.*\(1 of 3 restarts\)", told.read_text(), re.DOTALL)
    assert "resumes after step" in told.read_text()
    assert len(losses(job, tmp_path)) == 64  # each step once
    assert_same_losses(losses(whole, tmp_path), losses(job, tmp_path))
    ours, theirs = (open_checkpoint_weights(j) for j in (job, whole))
    assert ours.keys() == theirs.keys()
    norm = sum(float(w.pow(2).sum()) for w in theirs.values())
    assert (sum(float((ours[n] - theirs[n]).pow(2).sum()) for n in ours) / norm) ** 0.5 <= 1e-5


def open_checkpoint_weights(job: JobSpec) -> dict[str, Any]:
    reader = open_checkpoint(job)
    assert reader is not None
    return dict(reader.weights())


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BEIR folder of 6 queries and 12 passages."""
    folder = tmp_path_factory.mktemp("heldout")
    (folder / "qrels").mkdir()
    passages = [{"_id": f"p{i}", "text": f"{word} object {WORDS[-i]}"} for i, word in enumerate(WORDS)]
    queries = [{"_id": f"q{i}", "text": f"{WORDS[i]} table list"} for i in range(6)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\tp{i}\t1" for i in range(6))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_validation_keeps_and_exports_the_best_and_stops_early(
    train_here: Callable[[JobSpec], list[str]], pairs_file: str, heldout: str, tmp_path: Path
) -> None:
    validation = {"path": heldout, "every_steps": 2, "patience": 2, "k": 3}
    # A learning rate that ruins the model, so that the best is not the last.
    job = make_job(
        "early", tmp_path, pairs_file, max_steps=40, learning_rate=0.3, lr_schedule="constant", keep_checkpoints=1,
        deepspeed={"zero_stage": 3}, validation=validation,
    )  # fmt: skip
    preflight(job)
    train_here(job)
    newest = list_checkpoints(job)[-1]
    steps = newest.step
    assert steps < 40
    assert newest.manifest["finished"]
    validations = dict(map(tuple, newest.manifest["validations"]))
    assert list(validations) == list(range(2, steps + 1, 2))
    best = max(validations, key=lambda step: (validations[step], -step))
    assert best == steps - 4, "two validations without a better one, then the end"
    assert {c.step for c in list_checkpoints(job)} == {best, steps}
    text = (tmp_path / "early" / "metrics" / "train.jsonl").read_text()
    logged = {r["step"]: r["validation_ndcg"] for r in map(json.loads, text.splitlines()) if "validation_ndcg" in r}
    assert 0.0 <= logged.pop(0) <= 1.0  # before training
    assert logged == validations
    # The export holds the best weights, and an independent measurement of it gives the number that was logged.
    assert measured_ndcg(job, heldout, k=3) == pytest.approx(validations[best], abs=1e-6)
    assert run_train(job).already_done
    last = make_job("last", tmp_path, pairs_file, max_steps=2, validation={**validation, "export": "last"})
    with pytest.raises(DataError, match=r"train\.validation\.path = /nowhere: .*does not exist"):
        preflight(make_job("none", tmp_path, pairs_file, validation={"path": "/nowhere"}))
    train_here(last)
    assert [c.step for c in list_checkpoints(last)] == [2]


def measured_ndcg(job: JobSpec, folder: str, *, k: int) -> float:
    encoder, sample = open_encoder(job), read_local_set(folder)
    queries = encoder.encode(list(sample.queries.values()), "query")
    passages = encoder.encode(list(sample.passages.values()), "passage")
    run = {query: dict(zip(sample.passages, map(float, row))) for query, row in zip(sample.queries, queries @ passages.T)}
    return mean_scores(score_run(sample.qrels, run, [f"ndcg@{k}"]))[f"ndcg@{k}"]


def test_precomputed_reference_gives_the_losses_of_a_frozen_copy(
    train_here: Callable[[JobSpec], list[str]], pairs_file: str, tmp_path: Path
) -> None:
    curves = []
    for reference in ("frozen_copy", "precomputed"):
        objective = {"preset": "grl", "reference": reference}
        job = make_job(reference.replace("_", "-"), tmp_path, pairs_file, objective=objective, max_steps=4)
        (tmp_path / job.name).mkdir()
        (tmp_path / job.name / "reference.npz").write_bytes(b"of a run that never reached a checkpoint")
        train_here(job)
        curves.append(losses(job, tmp_path))
    assert_same_losses(*curves)
    assert (tmp_path / "precomputed" / "reference.npz").is_file()
    none = make_job("none", tmp_path, pairs_file, objective={"preset": "grl", "reference": "none"}, max_steps=4)
    train_here(none)
    assert abs(losses(none, tmp_path)[1][2] - curves[0][1][2]) > 1e-3, "the control must fail"


def test_resume_notices_other_rows(train_here: Callable[[JobSpec], list[str]], pairs_file: str, tmp_path: Path) -> None:
    copy = tmp_path / "rows.jsonl"
    with gzip.open(pairs_file, "rt") as stream:
        copy.write_text(stream.read())
    job = make_job("rows", tmp_path, str(copy), max_steps=4, checkpoint_every_steps=2)
    train_here(job)
    storage.remove(list_checkpoints(job)[-1].path)
    storage.remove(str(tmp_path / "rows" / "model"))
    kept = copy.read_text()
    copy.write_text(kept.replace("bucket", "basket", 1))
    with pytest.raises(TrainingError, match=r"rows of train\.data are not those that this run began with 2 steps ago"):
        train_here(job)
    copy.write_text(kept)
    train_here(job)
    assert [c.step for c in list_checkpoints(job)] == [2, 4]


def test_resume_under_other_settings_is_refused_by_name(unbroken: tuple[JobSpec, Path], pairs_file: str) -> None:
    _, folder = unbroken
    changed = make_job("unbroken", folder, pairs_file, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"train\.learning_rate: 0\.003 -> 0\.001.*another name"):
        preflight(changed)
    with pytest.raises(TrainingError, match=r"train\.learning_rate"):
        run_train(changed)
    faster = make_job("unbroken", folder, pairs_file, chunk_size=1, checkpoint_every_steps=5, max_failures=0)
    preflight(faster)  # these change no number of the run


def test_damaged_or_incomplete_checkpoints(train_here: Callable[[JobSpec], list[str]], pairs_file: str, tmp_path: Path) -> None:
    job = make_job("damaged", tmp_path, pairs_file, max_steps=8)
    train_here(job)
    newest = Path(list_checkpoints(job)[-1].path)
    # A folder without its manifest is what a crash in mid-write leaves: it does not count.
    (newest / "checkpoint.json").unlink()
    assert [c.step for c in list_checkpoints(job)] == [4]
    storage.remove(str(tmp_path / "damaged" / "model"))
    train_here(job)  # goes on from step 4
    assert [c.step for c in list_checkpoints(job)] == [4, 8]
    part = next(newest.rglob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    storage.remove(str(tmp_path / "damaged" / "model"))
    with pytest.raises(TrainingError, match=f"{part.name} is damaged"):
        train_here(job)


def test_rows_left_out_are_told(train_here: Callable[[JobSpec], list[str]], pairs_file: str, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    with gzip.open(pairs_file, "rt") as stream:
        mixed.write_text(stream.read() + '{"query": "x"}\nnot json\n')
    job = make_job("told", tmp_path, str(mixed), max_steps=1, workers={"num_workers": 1})
    (note,) = train_here(job)
    assert "2 of 42 rows left out (1 x has no positive passage; 1 x is not JSON)" in note
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
