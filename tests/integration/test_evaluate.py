"""The evaluate stage with a real encoder in real Ray actors, on a small set with real texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.torch import load_file, save_file

from ullme_ray import storage
from ullme_ray.errors import DataError, ModelError
from ullme_ray.evaluate import encoding, preflight, run_evaluate
from ullme_ray.model import encoder_fingerprint, open_encoder
from ullme_ray.progress import Progress
from ullme_ray.retrieval.metrics import mean_scores, score_run
from ullme_ray.sample_data import ensure_dataset
from ullme_ray.spec import JobSpec, RunFolder

pytestmark = pytest.mark.usefixtures("ray_local")


def make_job(base: str, root: str, **model: object) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "small",
            "storage": root,
            "model": {"base": base, "max_tokens": 64, "prompts": {"query": "question: "}, **model},
            "dataset": {"name": "aws_api_docs", "heldout_queries": 20, "max_pairs": 120},
            "evaluate": {"local": [{"path": "run:data/heldout"}], "k": 5},
        }
    )


@pytest.fixture
def job(tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.setattr(encoding, "CHUNK_TEXTS", 32)  # several chunks
    monkeypatch.setattr(encoding, "MAX_CPU_ACTORS", 1)  # starting one takes seconds
    job = make_job(tiny_base, str(tmp_path))
    ensure_dataset(job)
    return job


def expected_measures(job: JobSpec) -> dict[str, float]:
    """The same by the simplest means: encode everything here, sort every score."""
    from ullme_ray.retrieval.local_set import read_local_set

    heldout = read_local_set(f"{RunFolder.of(job).data}/heldout")
    encoder = open_encoder(job)
    queries = encoder.encode(list(heldout.queries.values()), "query")
    passages = encoder.encode(list(heldout.passages.values()), "passage")
    scores = queries @ passages.T
    run = {query: dict(zip(heldout.passages, row.tolist())) for query, row in zip(heldout.queries, scores)}
    return mean_scores(score_run(heldout.qrels, run, ["ndcg@5", "recall@5", "mrr@5"]))


def test_report_holds_the_measures_of_a_plain_search(job, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_CPU_ACTORS", 2)
    report = run_evaluate(job)
    (scores,) = report.sets
    assert (scores.num_queries, scores.num_passages) == (20, 120)
    base, bm25 = scores.models
    assert (base.model, bm25.model) == ("base", "bm25")
    assert base.fingerprint == encoder_fingerprint(job)
    assert base.measures == pytest.approx(expected_measures(job), abs=1e-6)
    assert bm25.measures["recall@5"] > base.measures["recall@5"], "random weights cannot beat word matching"
    written = json.loads(storage.read_text(f"{RunFolder.of(job).evaluation}/report.json"))
    assert written == json.loads(json.dumps(report.as_dict()))
    assert f"{bm25.measures['ndcg@5']:.4f}" in report.to_text()
    assert "20 queries, 120 passages" in report.to_text()


def test_the_model_before_and_after_training_is_measured_in_the_same_actors(job, tiny_base):
    train = {"objective": "cl", "data": [{"path": "run:data/train.jsonl"}]}
    trained_job = JobSpec.model_validate({**job.model_dump(), "train": train})
    export = Path(RunFolder.of(job).export)
    shutil.copytree(tiny_base, export)
    weights = load_file(export / "model.safetensors")
    save_file({name: weight.flip(0).contiguous() for name, weight in weights.items()}, export / "model.safetensors")
    (export / "modules.json").write_text("[]")
    (scores,) = run_evaluate(trained_job).sets
    base, trained, _ = scores.models
    assert (base.model, trained.model) == ("base", "trained")
    assert base.measures == pytest.approx(expected_measures(job), abs=1e-6)
    assert trained.measures == pytest.approx(expected_measures(trained_job), abs=1e-6)
    assert base.measures != trained.measures


def test_a_rerun_encodes_nothing_and_another_model_or_set_does(job, tiny_base, tmp_path, monkeypatch):
    first = run_evaluate(job, models=("base",))
    real_load, loaded = encoding.EncoderPool.load, []

    def counted(pool: encoding.EncoderPool, which: encoding.Which, fingerprint: str) -> None:
        loaded.append(fingerprint)
        real_load(pool, which, fingerprint)

    monkeypatch.setattr(encoding.EncoderPool, "load", counted)
    assert run_evaluate(job, models=("base",)) == first
    assert loaded == []
    other_pooling = make_job(tiny_base, str(tmp_path), pooling="lasttoken")
    assert run_evaluate(other_pooling, models=("base",)) != first
    assert len(loaded) == 1
    queries = Path(RunFolder.of(job).data) / "heldout" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("AWS", "Aws"))
    run_evaluate(job, models=("base",))
    assert len(loaded) == 2


def test_the_same_passage_twice_is_found_twice(job):
    corpus = Path(RunFolder.of(job).data) / "heldout" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    twins = [{**row, "_id": row["_id"] + "-twin"} for row in rows]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *twins]))
    (scores,) = run_evaluate(job, models=("base",)).sets
    assert scores.num_passages == 240
    assert scores.models[0].measures == pytest.approx(expected_measures(job), abs=1e-6)


def test_evaluation_goes_on_where_every_core_is_taken(job, monkeypatch):
    monkeypatch.setattr(encoding, "SETTLE_S", 0.5)

    @ray.remote(num_cpus=4)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    try:
        assert ray.get(holder.ready.remote())
        (scores,) = run_evaluate(job, models=("base",)).sets
    finally:
        ray.kill(holder)
    assert scores.models[0].measures == pytest.approx(expected_measures(job), abs=1e-6)


def test_a_killed_actor_costs_nothing_but_time(job, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_CPU_ACTORS", 2)
    texts = [f"a bucket with {number} objects and a policy" for number in range(300)]
    with (
        encoding.EncoderPool(job, num_texts=len(texts)) as pool,
        Progress("test", len(texts)) as progress,
    ):
        pool.load("base", encoder_fingerprint(job))
        vectors = np.zeros((len(texts), 32), np.float32)
        for chunk, (rows, found) in enumerate(pool.encode(texts, "passage", progress)):
            vectors[rows] = found
            if chunk == 1:
                ray.kill(pool._actors[0], no_restart=False)
    assert chunk == 9
    np.testing.assert_allclose(vectors, open_encoder(job).encode(texts), atol=1e-6)


def test_an_actor_that_keeps_dying_is_an_error_of_ours(job, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_RESTARTS", 0)
    with encoding.EncoderPool(job, num_texts=1) as pool, Progress("test", 1) as progress:
        pool.load("base", encoder_fingerprint(job))
        ray.kill(pool._actors[0])
        with pytest.raises(ModelError, match="a process that encodes died, also after 0 restarts"):
            list(pool.encode(["a"], "passage", progress))


def test_errors_inside_actors_arrive_as_they_were_raised(job, tmp_path):
    fingerprint = encoder_fingerprint(job)
    with encoding.EncoderPool(job, num_texts=1) as pool, Progress("test", 1) as progress:
        pool.load("base", "0" * 64)
        with pytest.raises(ModelError, match=f"loads another model .*{fingerprint[:12]}"):
            list(pool.encode(["a"], "passage", progress))
    missing = make_job(str(tmp_path / "gone"), str(tmp_path))
    with encoding.EncoderPool(missing, num_texts=1) as pool, Progress("test", 1) as progress:
        pool.load("base", fingerprint)
        with pytest.raises(ModelError, match=r"model\.base = .*gone is not a folder"):
            list(pool.encode(["a"], "passage", progress))


def test_the_whole_stage_on_s3(s3, tiny_base):
    job = make_job(tiny_base, s3.bucket("evaluate-test"))
    ensure_dataset(job)
    preflight(job)
    report = run_evaluate(job)
    assert [found.model for found in report.sets[0].models] == ["base", "bm25"]
    stored = storage.list_files(f"{RunFolder.of(job).evaluation}/**")
    assert sorted(Path(file.path).name == "report.json" for file in stored) == [False, False, True]


def test_preflight_names_a_missing_and_a_broken_set(job, tmp_path):
    preflight(job)  # the data set's own folder is taken on trust
    elsewhere = job.model_copy(update={"dataset": None})
    preflight(elsewhere)
    qrels = Path(RunFolder.of(job).data) / "heldout" / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text() + "q-x\ty\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv line 22: query q-x is not in queries\.jsonl"):
        preflight(elsewhere)
    qrels.unlink()
    with pytest.raises(DataError, match=r"test\.tsv does not exist"):
        preflight(elsewhere)


def test_a_scratch_model_is_measured_before_any_training(job):
    tree = job.model_dump()
    scratch = {"base": "scratch", "max_tokens": 64, "scratch": {"hidden_size": 32, "layers": 1, "vocab_size": 400}}
    train = {"objective": "cl", "data": [{"path": "run:data/train.jsonl"}]}
    untrained = JobSpec.model_validate({**tree, "model": scratch, "train": train})
    (scores,) = run_evaluate(untrained, models=("base",)).sets
    (base,) = scores.models
    assert base.fingerprint == encoder_fingerprint(untrained, which="base")
    assert 0 <= base.measures["recall@5"] <= 1


def test_a_job_that_is_not_trained_yet_fails_before_anything_is_encoded(job, monkeypatch):
    train = {"objective": "cl", "data": [{"path": "run:data/train.jsonl"}]}
    untrained = JobSpec.model_validate({**job.model_dump(), "train": train})
    monkeypatch.setattr("ullme_ray.evaluate.run.EncoderPool", None)  # starting it would be a TypeError
    with pytest.raises(ModelError, match="holds no trained model yet"):
        run_evaluate(untrained)
