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
from ullme_ray.errors import DataError, ModelError, StorageError
from ullme_ray.evaluate import encoding, preflight, run_evaluate, table_run
from ullme_ray.evaluate.generation import read_candidates
from ullme_ray.evaluate.generation_model import GenerationModel
from ullme_ray.model import encoder_fingerprint, open_encoder
from ullme_ray.progress import Progress
from ullme_ray.retrieval.local_set import read_local_set
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
    heldout = read_local_set(f"{RunFolder.of(job).data}/heldout")
    encoder = open_encoder(job)
    queries = encoder.encode(list(heldout.queries.values()), "query")
    texts = sorted(set(heldout.passages.values()))  # each once: equal texts must have equal scores to the last bit
    scores = queries @ encoder.encode(texts, "passage").T
    run = {}
    for query, row in zip(heldout.queries, scores):
        score_of = dict(zip(texts, row.tolist()))
        run[query] = {id_: score_of[text] for id_, text in heldout.passages.items()}
    run = {query: dict(sorted(found.items(), key=lambda hit: (hit[1], hit[0]))[-100:]) for query, found in run.items()}
    return mean_scores(score_run(heldout.qrels, run, ["ndcg@5", "recall@5", "recall@100", "mrr@5", "map@100"]))


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
    for found in scores.models:
        low, high = found.intervals["ndcg@5"]
        assert low < found.measures["ndcg@5"] < high
    (difference,) = scores.comparisons
    assert (difference.better, difference.worse, difference.measure) == ("bm25", "base", "ndcg@5")
    assert difference.difference == pytest.approx(bm25.measures["ndcg@5"] - base.measures["ndcg@5"])
    assert difference.p_value < 0.01
    assert "bm25 over base" in report.to_text()
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


def test_the_run_of_a_model_in_trec_format_gives_trec_eval_the_same_measures(job):
    import pytrec_eval

    (scores,) = run_evaluate(job, models=("base", "bm25")).sets
    heldout = read_local_set(f"{RunFolder.of(job).data}/heldout")
    for found in scores.models:
        with (Path(RunFolder.of(job).evaluation) / found.run).open() as stream:
            run = pytrec_eval.parse_run(stream)
        theirs = pytrec_eval.RelevanceEvaluator(heldout.qrels, {"ndcg_cut.5", "recall.5", "map_cut.100"}).evaluate(run)
        for ours, name in (("ndcg@5", "ndcg_cut_5"), ("recall@5", "recall_5"), ("map@100", "map_cut_100")):
            mean = sum(theirs.get(query, {}).get(name, 0.0) for query in heldout.qrels) / len(heldout.qrels)
            assert found.measures[ours] == pytest.approx(mean, abs=1e-6), (found.model, ours)


def test_any_sentence_transformers_model_stands_beside_ours(job, tiny_base, tmp_path):
    """The same weights through that library attend one way: another model, whose measures it gives itself."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    backbone = Transformer(tiny_base)
    other = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "lasttoken")], device="cpu")
    other.save(str(tmp_path / "some-model"))
    models = [str(tmp_path / "some-model"), {"base": str(tmp_path / "some-model"), "prompts": {"query": "question: "}}]
    tree = job.model_dump()
    both = JobSpec.model_validate({**tree, "evaluate": {**tree["evaluate"], "models": models, "bm25": False}})
    preflight(both)
    (scores,) = run_evaluate(both).sets
    assert [found.model for found in scores.models] == ["base", "some-model", "some-model-2"]
    heldout = read_local_set(f"{RunFolder.of(job).data}/heldout")
    passages = other.encode(list(heldout.passages.values()), normalize_embeddings=True)
    for found, prompt in zip(scores.models[1:], ("", "question: ")):
        queries = other.encode(list(heldout.queries.values()), prompt=prompt, normalize_embeddings=True)
        run = {q: dict(zip(heldout.passages, row.tolist())) for q, row in zip(heldout.queries, queries @ passages.T)}
        expected = mean_scores(score_run(heldout.qrels, run, ["ndcg@5", "mrr@5"]))
        assert {name: found.measures[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert scores.models[1].measures != scores.models[2].measures
    assert len(scores.comparisons) == 3
    missing = JobSpec.model_validate({**tree, "evaluate": {**tree["evaluate"], "models": [str(tmp_path / "gone")]}})
    with pytest.raises(ModelError, match=r"evaluate\.models: .*gone is not a folder"):
        preflight(missing)


def test_queries_over_the_embeddings_table_find_what_a_search_of_the_corpus_finds(job, tiny_base, monkeypatch):
    """In whole documents as the set's own corpus; in chunks by each document's best."""
    from ullme_ray.embed import run_embed

    monkeypatch.setattr(table_run, "_PARTS_PER_TASK", 1)
    tree = job.model_dump()
    source = {"path": "run:data/heldout/corpus.jsonl", "id": "_id", "text": ["title", "text"]}
    tree["evaluate"] = {"local": [{"path": "run:data/heldout", "table": True}, {"path": "run:data/heldout"}], "k": 5}
    tree["embed"] = {"input": source, "rows_per_unit": 32}
    whole = JobSpec.model_validate(tree)
    assert whole.stages == ("embed", "evaluate")
    with pytest.raises(StorageError, match="holds no embeddings table yet"):
        run_evaluate(whole, models=("base",))
    run_embed(whole)
    over_table, over_corpus = run_evaluate(whole).sets
    assert [found.model for found in over_table.models] == ["base"]
    assert [found.model for found in over_corpus.models] == ["base", "bm25"]
    assert over_table.num_passages == over_corpus.num_passages == 120
    assert over_table.models[0].measures == pytest.approx(over_corpus.models[0].measures, abs=1e-6)

    tree["embed"] = {"input": {**source, "chunks": {"tokens": 16, "overlap": 4}}}
    chunked = JobSpec.model_validate(tree)
    run_embed(chunked)
    over_chunks, _ = run_evaluate(chunked, models=("base",)).sets
    assert over_chunks.num_passages > 240
    encoder, heldout = open_encoder(job), read_local_set(f"{RunFolder.of(job).data}/heldout")
    queries, run = encoder.encode(list(heldout.queries.values()), "query"), {query: {} for query in heldout.queries}
    for id_, text in heldout.passages.items():
        tokens, _ = encoder.tokenizer.tokenize_chunks([text], "passage", chunk_tokens=16, overlap=4)
        best = (queries @ encoder.embed_tokens(tokens).T).max(axis=1)
        for query, score in zip(heldout.queries, best.tolist()):
            run[query][id_] = score
    expected = mean_scores(score_run(heldout.qrels, run, ["ndcg@5", "recall@5", "mrr@5"]))
    found = over_chunks.models[0].measures
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_generation_checks_of_the_model_before_and_after_training(job, tiny_base, tmp_path):
    """In Ray actors as in this process; what was scored is kept. Other weights give other numbers."""
    rows = tmp_path / "rows.jsonl"
    lines = (Path(RunFolder.of(job).data) / "train.jsonl").read_text().splitlines()[:12]
    rows.write_text("\n".join(lines))
    train = {"objective": "cl", "data": [{"path": "run:data/train.jsonl"}]}
    checks = {"path": str(rows), "max_passages": 5}
    checked = JobSpec.model_validate({**job.model_dump(), "train": train, "evaluate": {"generation": checks}})
    export = Path(RunFolder.of(job).export)
    shutil.copytree(tiny_base, export)
    weights = load_file(export / "model.safetensors")
    save_file({name: weight.flip(0).contiguous() for name, weight in weights.items()}, export / "model.safetensors")
    (export / "modules.json").write_text("[]")
    preflight(checked)
    report = run_evaluate(checked)
    assert report.generation is not None
    assert (report.generation.num_rows, report.generation.num_passages) == (12, 60)
    base, trained = report.generation.models
    model = GenerationModel(checked, "base", 64, "cpu")
    candidates = read_candidates(checked)
    scored = [found[0] for found in model.score([(row.query, row.passages) for row in candidates])]
    expected = np.exp(-sum(total for total, _ in scored) / sum(length for _, length in scored))
    assert base.perplexity == pytest.approx(expected, rel=1e-4)
    assert base.perplexity != trained.perplexity
    assert -1 <= base.tau_interval[0] <= base.kendall_tau <= base.tau_interval[1] <= 1
    assert 0 <= base.preference_interval[0] <= base.preference_accuracy <= base.preference_interval[1] <= 1
    assert f"{base.perplexity:.2f}" in report.to_text()
    kept = Path(RunFolder.of(job).evaluation) / base.results
    before = kept.stat().st_mtime_ns
    assert run_evaluate(checked).generation == report.generation
    assert kept.stat().st_mtime_ns == before


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
    assert sorted(Path(file.path).suffix for file in stored) == [".json", ".json", ".json", ".trec", ".trec"]


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
    monkeypatch.setattr("ullme_ray.evaluate.sets.EncoderPool", None)  # starting it would be a TypeError
    with pytest.raises(ModelError, match="holds no trained model yet"):
        run_evaluate(untrained)
