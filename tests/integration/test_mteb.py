"""MTEB on a real Ray, offline, on real texts: five types of task, killed in the middle, read back by the loader of mteb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mteb
import numpy as np
import pytest
import ray
from mteb_folders import write_folders

from ullme_ray.errors import DataError
from ullme_ray.evaluate import encoding, preflight, run_evaluate
from ullme_ray.evaluate.mteb_model import register
from ullme_ray.evaluate.mteb_results import ResultFolder
from ullme_ray.evaluate.mteb_tasks import find_tasks, make_task
from ullme_ray.sample_data import ensure_dataset
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.run_folder import dump_job


@pytest.fixture(scope="module")
def job(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    root = tmp_path_factory.mktemp("mteb")
    tree = {
        "name": "small",
        "storage": str(root / "runs"),
        "model": {"base": tiny_base, "max_tokens": 64, "prompts": {"query": "question: "}},
        "dataset": {"name": "aws_api_docs", "heldout_queries": 20, "max_pairs": 120},
        "evaluate": {"local": [{"path": "run:data/heldout"}]},
    }
    ensure_dataset(JobSpec.model_validate(tree))
    folders = write_folders(root / "runs" / "small" / "data", root / "tasks")
    tasks = [{"folder": str(folder), "type": kind} for kind, folder in folders.items()]
    return JobSpec.model_validate({**tree, "evaluate": {"mteb": tasks, "mteb_prompts": {"STS": "the same as: "}}})


def results_of(job: JobSpec) -> dict[str, Path]:
    return {path.stem: path for path in Path(RunFolder.of(job).evaluation).glob("mteb/results/*/*/Aws*.json")}


def test_killed_in_the_middle_it_goes_on_and_mteb_reads_the_results(
    job: JobSpec, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray.get_runtime_context().gcs_address
    (tmp_path / "job.yaml").write_text(dump_job(job))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ullme_ray", "evaluate", str(tmp_path / "job.yaml"), f"cluster.address={address}"]
    with (tmp_path / "told.txt").open("wb") as stream:
        driver = subprocess.Popen(command, env=environment, start_new_session=True, stdout=stream, stderr=stream)
    while not results_of(job):
        assert driver.poll() is None, (tmp_path / "told.txt").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = {name: path.stat().st_mtime_ns for name, path in results_of(job).items()}
    assert 0 < len(kept) < 5, "it must die in mid-run for this test to mean anything"

    monkeypatch.setattr(encoding, "MAX_CPU_ACTORS", 1)
    preflight(job)
    scores = run_evaluate(job).mteb
    assert scores is not None
    assert {name: path.stat().st_mtime_ns for name, path in results_of(job).items()}.items() >= kept.items()
    assert [found.type for found in scores.tasks] == ["Retrieval", "STS", "PairClassification", "Classification", "Clustering"]

    loaded = mteb.ResultCache(Path(RunFolder.of(job).evaluation) / "mteb").load_results(include_remote=False)
    (model,) = loaded.model_results
    assert (model.model_name, model.model_revision) == ("ullme_ray/small", scores.revision)
    theirs = {result.task_name: result.get_score() for result in model.task_results}
    assert theirs == pytest.approx({found.task: found.score for found in scores.tasks})
    settings = (results_of(job)["AwsSts"].parent / "run_settings.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["task"] for line in settings) == sorted(theirs)

    # The model in this process, which the run has put in mteb's registry, gets the same scores from mteb alone.
    alone = mteb.get_model(scores.model)
    for ref in find_tasks(job)[:3]:
        result = mteb.evaluate(alone, make_task(job, ref), cache=None, co2_tracker=False, show_progress_bar=False)
        assert result.task_results[0].get_score() == pytest.approx(theirs[ref.name], abs=1e-6)

    # Once more: nothing is run. A changed folder would be: its data is another.
    before = {name: path.stat().st_mtime_ns for name, path in results_of(job).items()}
    assert run_evaluate(job).mteb == scores
    assert {name: path.stat().st_mtime_ns for name, path in results_of(job).items()} == before
    assert job.evaluate is not None
    changed = Path(str(job.evaluate.mteb[1].folder)) / "test.jsonl"
    changed.write_text("".join(changed.read_text().splitlines(keepends=True)[:-3]))
    folder = ResultFolder(job, register(job))
    assert [ref.name for ref in find_tasks(job) if folder.read(ref) is None] == ["AwsSts"]

    # A task that fails keeps the one behind it from nothing.
    (tmp_path / "Broken").mkdir()
    (tmp_path / "Broken" / "README.md").write_text("---\nconfigs: []\n---\n")
    broken = job.model_dump()
    broken["evaluate"]["mteb"] = [{"folder": str(tmp_path / "Broken"), "type": "sts"}, *broken["evaluate"]["mteb"]]
    with pytest.raises(DataError, match=r"evaluate\.mteb\.0: the task Broken cannot be run .* all else is measured"):
        run_evaluate(JobSpec.model_validate(broken))
    assert folder.read(find_tasks(job)[1]) is not None
    written = json.loads((Path(RunFolder.of(job).evaluation) / "report.json").read_text())["mteb"]
    assert (list(written["failed"]), len(written["tasks"])) == (["Broken"], 5)


def test_prompts_follow_mteb_s_order(job: JobSpec) -> None:
    """By task name, then type, then query or document; texts that are neither have none."""
    retrieval, sts, pairs, *_ = (make_task(job, ref).metadata for ref in find_tasks(job))
    model = mteb.get_model(str(register(job).name))
    seen: list[str] = []

    def encode(texts: list[str], prompt: str) -> np.ndarray:
        seen.append(prompt)
        return np.zeros((len(texts), 2))

    model._encode = encode
    query, document = mteb.types.PromptType.query, mteb.types.PromptType.document
    for task, kind in ((retrieval, query), (retrieval, document), (sts, None), (pairs, None)):
        model.encode([{"text": ["a"]}], task_metadata=task, hf_split="test", hf_subset="default", prompt_type=kind)
    assert seen == ["question: ", "", "the same as: ", ""]


def test_names_benchmarks_types_and_languages_are_found_without_a_network(job: JobSpec) -> None:
    def names(*tasks: object) -> list[str]:
        return [ref.name for ref in find_tasks(JobSpec.model_validate({**tree, "evaluate": {"mteb": list(tasks)}}))]

    tree = job.model_dump()
    assert names("NFCorpus", "STS12", "NFCorpus") == ["NFCorpus", "STS12"]
    whole = names("MTEB(eng, v2)")
    assert len(whole) > 30
    only = names({"name": "MTEB(eng, v2)", "types": ["STS"]})
    assert 5 < len(only) < len(whole)
    assert set(only) < set(whole)
    german = names({"types": ["Retrieval"], "languages": ["deu"]})
    assert "GermanQuAD-Retrieval" in german
    with pytest.raises(DataError, match=r"evaluate\.mteb\.1 = NFCorpsu is neither a task .* near it are NFCorpus"):
        names("NFCorpus", "NFCorpsu")
    with pytest.raises(DataError, match=r"evaluate\.mteb\.0\.folder = .*gone"):
        names({"folder": "/gone", "type": "sts"})
