"""MTEB without Ray: which splits and subsets of a task are asked for, when a kept result is whole, prompts, metadata."""

from __future__ import annotations

from pathlib import Path

import mteb
import pytest
from mteb.results import TaskResult

from ullme_ray.errors import DataError
from ullme_ray.evaluate import run
from ullme_ray.evaluate.mteb_model import model_meta
from ullme_ray.evaluate.mteb_results import ResultFolder, task_score
from ullme_ray.evaluate.mteb_scores import MtebScores, TaskScore
from ullme_ray.evaluate.mteb_tasks import TaskRef, check_prompts, find_tasks, make_task
from ullme_ray.model import open_encoder
from ullme_ray.spec import JobSpec, RunFolder

STS = "STS22.v2"  # 18 subsets


def make_job(base: str, folder: Path, *tasks: object, **evaluate: object) -> JobSpec:
    model = {"base": base, "max_tokens": 48, "prompts": {"query": "question: "}}
    return JobSpec.model_validate(
        {"name": "a", "storage": str(folder), "model": model, "evaluate": {"mteb": list(tasks or [STS]), **evaluate}}
    )


def only(job: JobSpec) -> TaskRef:
    (ref,) = find_tasks(job)
    return ref


def result_of(folder: Path, **scores: float) -> dict[str, str]:
    """The file that mteb writes of the task."""
    values = {subset: {"main_score": score, "cosine_spearman": score} for subset, score in scores.items()}
    path = folder / "new.json"
    TaskResult.from_task_results(mteb.get_task(STS), {"test": values}, evaluation_time=1.0).to_disk(path)
    return {f"{STS}.json": path.read_text()}


def test_a_task_named_twice_has_what_both_entries_ask_for(tiny_base: str, tmp_path: Path) -> None:
    english, german = ({"name": STS, "languages": [language]} for language in ("eng", "deu"))
    one, other = (set(only(make_job(tiny_base, tmp_path, entry)).subsets) for entry in (english, german))
    assert "en" in one - other
    assert "de" in other - one
    job = make_job(tiny_base, tmp_path, english, german)
    assert set(only(job).subsets) == one | other
    assert set(make_task(job, only(job)).hf_subsets) == one | other
    assert make_task(job, only(job)).eval_splits == ["test"]


def test_a_result_of_fewer_subsets_is_not_done_and_one_of_more_is_not_counted(tiny_base: str, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path)
    folder, whole = ResultFolder(job, model_meta(job)), only(job)
    german = only(make_job(tiny_base, tmp_path, {"name": STS, "languages": ["deu"]}))
    english = TaskRef(0, 0, STS, "", ("test",), ("en",))
    folder.write(result_of(tmp_path, en=0.5))
    assert folder.read(english) is not None
    assert folder.read(whole) is None
    folder.write(result_of(tmp_path, **dict.fromkeys(german.subsets, 0.9)))
    assert folder.read(whole) is None
    for ref, score in ((english, 0.5), (german, 0.9)):  # the file holds both
        found = folder.read(ref)
        assert found is not None
        assert task_score(found, ref, "x", "cosine_spearman", "STS").score == pytest.approx(score)
    assert folder.read(TaskRef(0, 0, STS, "", ("test", "train"), ("en",))) is None
    folder.write(result_of(tmp_path, **dict.fromkeys(whole.subsets, 0.7)))
    assert folder.read(whole) is not None


def test_prompts_of_unknown_tasks_are_refused(tiny_base: str, tmp_path: Path) -> None:
    good = {"NFCorpus-query": "a", "STS": "b", "Retrieval-document": "c", "query": "d", STS: "e"}
    job = make_job(tiny_base, tmp_path, mteb_prompts=good)
    check_prompts(job, find_tasks(job))
    ours = make_job(tiny_base, tmp_path, mteb_prompts={"faq-query": "a"})
    check_prompts(ours, [TaskRef(0, 0, "faq", "1", ("test",), ("default",))])
    for name, near in (("NFCorpsu-query", "NFCorpus"), ("Retrieva", "Retrieval"), ("faq-query", "see `mteb")):
        job = make_job(tiny_base, tmp_path, mteb_prompts={name: "a"})
        with pytest.raises(DataError, match=rf"evaluate\.mteb_prompts: {name} is no task or type of mteb.*{near}"):
            run.preflight(job)


def test_metadata_hold_what_is_known_and_nothing_else(tiny_base: str, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path)
    meta = model_meta(job)
    backbone = open_encoder(job, device="cpu").backbone
    assert meta.n_parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert meta.n_embedding_parameters == 300 * 32
    assert meta.memory_usage_mb == pytest.approx(meta.n_parameters * 4 / 2**20, abs=0.05)
    assert (meta.embed_dim, meta.max_tokens, str(meta.similarity_fn_name.value)) == (32, 48, "cosine")
    assert meta.adapted_from is None  # a folder's path is no name
    assert (meta.languages, meta.license, meta.open_weights, meta.training_datasets) == (None, None, None, None)


def test_a_failed_task_is_told_once_all_else_is_measured(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_base, tmp_path, "NFCorpus", STS)
    done: list[str] = []

    def run_mteb(job: JobSpec) -> MtebScores:
        done.append("mteb")
        score = TaskScore(STS, "STS", 0.5, "cosine_spearman", 1.0, "x")
        return MtebScores("m", "r", "mteb", (score,), {"NFCorpus": "the task NFCorpus cannot be run"})

    monkeypatch.setattr(run, "measure_sets", lambda *_: done.append("sets") or ())
    monkeypatch.setattr("ullme_ray.evaluate.mteb_run.run_mteb", run_mteb)
    with pytest.raises(DataError, match=r"the task NFCorpus cannot be run; all else is measured"):
        run.run_evaluate(job)
    assert done == ["sets", "mteb"]
    assert '"score": 0.5' in (Path(RunFolder.of(job).evaluation) / "report.json").read_text()
