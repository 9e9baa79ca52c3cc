"""Mining on a real Ray, into a local folder and into a real S3 store, against a full sort of all cosines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3Server
from typer.testing import CliRunner

from ullme_ray import storage
from ullme_ray.cli import app
from ullme_ray.errors import DataError, ModelError
from ullme_ray.mine import preflight, run_mine
from ullme_ray.mine.texts import BLOCK_TEXTS
from ullme_ray.model import open_encoder
from ullme_ray.pairs import read_sources
from ullme_ray.spec.job import JobSpec

pytestmark = pytest.mark.usefixtures("ray_local")

NUM_ROWS = BLOCK_TEXTS + 60  # more than one block of queries and of passages
WORDS = ["bucket", "object", "policy", "access", "makes", "private", "public", "deletes", "key", "table", "query", "value"]


@pytest.fixture
def base(s3: S3Server) -> str:
    return s3.bucket(f"mine-{os.getpid()}")


def rows_of(seed: int, count: int) -> list[dict[str, Any]]:
    """Every tenth query comes a second time, with another positive."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        words = generator.choice(WORDS, 7).tolist()
        query = rows[-1]["query"] if n % 10 == 9 else f"{n} {' '.join(words[:3])}"
        rows.append({"query": query, "positive": f"{seed} {n} {' '.join(words)}", "negatives": [f"{seed} {n} {words[0]}"]})
    return rows


def write(path: str, rows: list[dict[str, Any]]) -> str:
    storage.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_text(path).splitlines()]


def make_job(base: str, model: str, paths: list[str], **mine: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "mined",
            "storage": f"{base}/runs",
            "model": {"base": model, "max_tokens": 64, "prompts": {"query": "the query "}},
            "train": {"data": [{"path": path} for path in paths]},
            "mine": mine,
        }
    )


def test_two_sources_are_mined_exactly(base: str, tiny_base: str) -> None:
    first, second = rows_of(1, NUM_ROWS), rows_of(2, 40)
    paths = [write(f"{base}/in/a.jsonl", [*first, {"query": "no positive"}]), write(f"{base}/in/b.jsonl", second)]
    settings = {"skip_first": 5, "depth": 20, "negatives_per_query": 3, "margin": 0.001, "choose": "top"}
    job = make_job(base, tiny_base, paths, **settings)
    preflight(job)
    report = run_mine(job)

    rows = first + second
    queries = list(dict.fromkeys(row["query"] for row in rows))
    passages = list(dict.fromkeys(text for row in rows for text in (row["positive"], *row["negatives"])))
    encoder = open_encoder(job, which="base", device="cpu")
    cosines = encoder.encode(queries, "query") @ encoder.encode(passages, "passage").T
    place = {text: n for n, text in enumerate(passages)}
    positives: dict[str, list[int]] = {}
    for row in rows:
        positives.setdefault(row["query"], []).append(place[row["positive"]])

    outputs = [f"{base}/runs/mined/mined/train-{n}.jsonl" for n in (0, 1)]
    assert list(report.outputs) == outputs
    mined = [read(path) for path in outputs]
    assert [[row["query"] for row in part] for part in mined] == [[row["query"] for row in part] for part in (first, second)]
    short = without = 0
    for row, found in zip(rows, mined[0] + mined[1]):
        own, scores = positives[row["query"]], cosines[queries.index(row["query"])]
        best = [n for n in np.argsort(-scores) if n not in own][:20]
        limit = scores[own].min() - 0.001
        expected = [scores[n] for n in best if scores[n] < limit][5:8]
        assert found["positives"] == [row["positive"]]
        assert found["scores"][0] == pytest.approx(scores[place[row["positive"]]], abs=1e-5)
        np.testing.assert_allclose(found["scores"][1:], expected, atol=1e-5)
        np.testing.assert_allclose([scores[place[text]] for text in found["negatives"]], expected, atol=1e-5)
        assert not {place[text] for text in found["negatives"]} & set(own)
        short += len(expected) < 3
        without += not expected
    assert 0 < without < short < len(rows), "the data should have rows of every kind"
    counted = (report.rows, report.queries, report.passages, report.rows_short, report.rows_without, report.rows_rejected)
    assert counted == (len(rows), len(queries), len(passages), short, without, 1)
    assert report.fingerprint == encoder.fingerprint
    assert json.loads(storage.read_text(f"{base}/runs/mined/mined/_train.report.json"))["negatives"] == report.negatives

    before = [storage.read_bytes(path) for path in outputs]
    run_mine(make_job(base, tiny_base, paths, **settings, actors={"min": 2, "max": 2}))
    assert [storage.read_bytes(path) for path in outputs] == before, "the number of actors changes nothing"

    trained = make_job(base, tiny_base, [f"{base}/runs/mined/mined/*.jsonl"])
    (source,) = read_sources(trained)
    assert len(source.pairs) == len(rows)
    assert source.rejected == {}
    assert [pair.negatives for pair in source.pairs] == [tuple(row["negatives"]) for row in mined[0] + mined[1]]
    assert [list(pair.scores) for pair in source.pairs] == [row["scores"] for row in mined[0] + mined[1]]


def test_command_corpus_and_another_encoder(tmp_path: Path, tiny_base: str) -> None:
    rows = rows_of(3, 30)
    data = write(str(tmp_path / "pairs.jsonl"), [{"query": row["query"], "positive": row["positive"]} for row in rows])
    corpus = [f"{n} bucket policy" for n in range(50)] + [rows[0]["positive"]]
    write(str(tmp_path / "corpus.jsonl"), [{"title": "t", "text": text} for text in corpus] + [{"title": "no text"}])
    (tmp_path / "job.yaml").write_text(
        f"name: other\nstorage: {tmp_path}/runs\nmodel: {{base: /no/such/model}}\n"
        f"train: {{data: [{{path: {data}}}], missing_negatives: reject}}\n"
        f"mine:\n  encoder: {{base: {tiny_base}, prompts: {{query: 'the query '}}}}\n"
        f"  corpus: {{path: {tmp_path}/corpus.jsonl}}\n  output: {tmp_path}/out/mined.jsonl\n"
    )
    done = CliRunner().invoke(app, ["mine", str(tmp_path / "job.yaml"), "--json", "mine.skip_first=2"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["rows"], report["passages"], report["corpus_rejected"], report["rows_short"]) == (30, 51, 1, 0)
    mined = read(str(tmp_path / "out" / "mined.jsonl"))
    assert [row["query"] for row in mined] == [row["query"] for row in rows]
    for row in mined:
        assert len(set(row["negatives"])) == 4
        assert set(row["negatives"]) <= set(corpus) - set(row["positives"])
    assert "negatives for 30 rows" in CliRunner().invoke(app, ["mine", str(tmp_path / "job.yaml")]).stdout


def test_what_fails_on_ray_is_told_in_words_and_nothing_is_written(tmp_path: Path, tiny_base: str) -> None:
    paths = [write(str(tmp_path / "pairs.jsonl"), rows_of(4, 10))]
    with pytest.raises(DataError, match=r"none of 10 rows got a negative out of 20 passages; lower mine\.skip_first = 30"):
        run_mine(make_job(str(tmp_path), tiny_base, paths))
    torn = tmp_path / "torn"
    shutil.copytree(tiny_base, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="torn"):
        run_mine(make_job(str(tmp_path), tiny_base, paths, encoder=str(torn), skip_first=0))
    assert not (tmp_path / "runs" / "mined" / "mined").exists()
