"""The generation checks: log-probabilities of transformers' own loss, measures by hand, candidates seeded and clean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ullme_ray.errors import DataError
from ullme_ray.evaluate.generation import read_candidates, summarise
from ullme_ray.evaluate.generation_model import GenerationModel, why_not
from ullme_ray.model import open_tokenizer
from ullme_ray.retrieval.statistics import ratio_interval
from ullme_ray.spec import JobSpec, RunFolder

ROWS = [
    {"query": f"the bucket {n}", "positive": f"makes the object {n} private", "negatives": [f"lists the key {n}", "a query"]}
    for n in range(12)
]


def make_job(base: str, folder: Path, rows: list[dict] = ROWS, **settings: object) -> JobSpec:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checks = {"path": str(folder / "rows.jsonl"), **settings}
    model = {"base": base, "max_tokens": 48, "prompts": {"query": "the question: "}}
    return JobSpec.model_validate({"name": "a", "storage": str(folder), "model": model, "evaluate": {"generation": checks}})


def test_scores_are_the_loss_of_transformers_own_model(tiny_base, tmp_path):
    job = make_job(tiny_base, tmp_path)
    scored = GenerationModel(job, "base", 48, "cpu").score([(row["query"], row["negatives"]) for row in ROWS[:3]])
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base).eval(), open_tokenizer(job)
    for row, found in zip(ROWS, scored):
        for passage, (total, length) in zip(row["negatives"], found):
            tokens = tokenizer.tokenize_generation(row["query"], passage, max_tokens=48)
            ids = torch.tensor([tokens.input_ids])
            labels = ids.clone()
            labels[:, : -tokens.passage_length] = -100
            with torch.no_grad():
                loss = float(lm(input_ids=ids, labels=labels).loss)
            assert length == tokens.passage_length
            assert total == pytest.approx(-loss * length, rel=1e-4)


def test_measures_of_a_case_computed_by_hand():
    first = {
        "num_positives": 1,
        "num_negatives": 2,
        "cosines": [0.9, 0.5, 0.1],
        "logps": [-2.0, -9.0, -3.0],
        "lengths": [2, 3, 1],
    }
    second = {
        "num_positives": 2,
        "num_negatives": 1,
        "cosines": [0.3, 0.2, 0.1],
        "logps": [-4.0, -1.0, -2.0],
        "lengths": [4, 1, 2],
    }
    alone = {"num_positives": 1, "num_negatives": 0, "cosines": [0.1, 0.2], "logps": [-3.0, -1.0], "lengths": [3, 1]}
    found = summarise([first, second, alone])
    assert found["perplexity"] == pytest.approx(np.exp((2 + 5 + 3) / (2 + 5 + 3)))
    # Per token: -1 beats -3 and -3; then -1 and -1 tie with -1. Summed: -2 beats -9 and -3; -4 loses to -2, -1 wins.
    assert found["preference_accuracy"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["preference_accuracy_summed"] == pytest.approx((1.0 + 0.5) / 2)
    # tau-b: first (1 and two pairs concordant, one tied): 2 / sqrt(3 * 2); the others all tied on one side.
    assert found["kendall_tau"] == pytest.approx(2 / np.sqrt(6) / 3)
    assert summarise([alone])["preference_accuracy"] is None


def test_opposite_rankings_have_tau_minus_one():
    row = {
        "num_positives": 1,
        "num_negatives": 0,
        "cosines": [0.1, 0.2, 0.3],
        "logps": [-1.0, -2.0, -3.0],
        "lengths": [1, 1, 1],
    }
    assert summarise([row])["kendall_tau"] == pytest.approx(-1.0)
    assert summarise([{**row, "cosines": [0.3, 0.2, 0.1]}])["kendall_tau"] == pytest.approx(1.0)


def test_the_interval_of_a_ratio_weighs_queries_by_their_tokens():
    sums, counts = np.array([10.0, 1.0, 1.0, 1.0]), np.array([10, 1, 1, 1])
    assert ratio_interval(sums, counts) == (1.0, 1.0)
    low, high = ratio_interval(np.array([20.0, 1.0, 1.0, 1.0]), counts)
    assert low == pytest.approx(1.0)
    assert 1.7 < high <= 2.0


def test_candidates_are_seeded_and_no_stranger_is_an_own_passage(tiny_base, tmp_path):
    job = make_job(tiny_base, tmp_path, max_rows=5, max_passages=6)
    rows = read_candidates(job)
    assert read_candidates(job) == rows
    assert read_candidates(job.model_copy(update={"seed": 14})) != rows
    assert len(rows) == 5
    for row in rows:
        assert (row.num_positives, row.num_negatives, len(row.passages)) == (1, 2, 6)
        assert len(set(row.passages)) == 6
        number = row.query.split()[-1]
        assert row.passages[0] == f"makes the object {number} private"


def test_what_cannot_be_ranked_or_is_not_exported_is_told(tiny_base, tmp_path):
    with pytest.raises(DataError, match="gives a query a single passage"):
        read_candidates(make_job(tiny_base, tmp_path, [{"query": "a", "positive": "b"}]))
    job = make_job(tiny_base, tmp_path)
    assert why_not(job, "base") == ""
    tree = job.model_dump() | {"train": {"data": [{"path": "x.jsonl"}]}}
    trained = JobSpec.model_validate(tree)
    export = Path(RunFolder.of(trained).export)
    shutil.copytree(tiny_base, export)
    (export / "modules.json").write_text("[]")
    assert why_not(trained, "trained") == ""
    separate = JobSpec.model_validate({**tree, "model": {**tree["model"], "lora": {"adapters": "separate"}}})
    assert "is not exported" in why_not(separate, "trained")
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "leaves out the language-model head" in why_not(trained, "trained")
