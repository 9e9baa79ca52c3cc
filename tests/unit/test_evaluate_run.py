"""The evaluate stage without Ray: an actor vouches for its model, GPUs are free before they are asked for, runs are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ullme_ray.errors import ModelError
from ullme_ray.evaluate import generation
from ullme_ray.evaluate.contenders import Contender
from ullme_ray.evaluate.encoding import _EncodeActor
from ullme_ray.evaluate.sets import measure_sets
from ullme_ray.model import encoder_fingerprint
from ullme_ray.spec import JobSpec, RunFolder

ROWS = [
    {"query": f"the bucket {n}", "positive": f"makes the object {n} private", "negatives": [f"a key {n}"]} for n in range(4)
]


def make_job(base: str, folder: Path, **evaluate: object) -> JobSpec:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = {"base": base, "max_tokens": 48}
    return JobSpec.model_validate({"name": "a", "storage": str(folder), "model": model, "evaluate": evaluate})


def test_an_actor_gives_no_vector_of_another_model(tiny_base: str, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path)
    actor, fingerprint = _EncodeActor(job, "cpu"), encoder_fingerprint(job)
    assert actor.encode_prompted("base", fingerprint, ["a key"], "").shape == (1, 32)
    for encode in (actor.encode, actor.encode_prompted):
        with pytest.raises(ModelError, match=rf"loads another model \(fingerprint {fingerprint[:12]}\)"):
            encode("base", "0" * 64, ["a key"], "query")


class Pool:
    """Stands for the actors that encode; tells whether they still hold their GPUs."""

    is_open = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Pool:
        Pool.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        Pool.is_open = False

    def load(self, *_: Any) -> None: ...

    def encode(self, texts: list[str], *_: Any) -> Any:
        yield np.arange(len(texts)), np.eye(len(texts), 8, dtype=np.float32)


def test_the_generation_pass_starts_once_the_vectors_are_done_and_their_actors_gone(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_base, tmp_path, generation={"path": str(tmp_path / "rows.jsonl"), "max_passages": 3})
    held: list[bool] = []

    def logps(job: JobSpec, which: str, rows: list[generation.Candidates]) -> list[list[tuple[float, int]]]:
        held.append(Pool.is_open)
        return [[(-1.0 - number, 2) for number, _ in enumerate(row.passages)] for row in rows]

    monkeypatch.setattr(generation, "EncoderPool", Pool)
    monkeypatch.setattr(generation, "_logps", logps)
    models = [Contender("base", "f", "base")]
    report = generation.measure_generation(job, models)
    assert held == [False]
    assert report.models[0].perplexity == pytest.approx(np.exp(0.5))
    assert generation.measure_generation(job, models) == report
    assert len(held) == 1  # kept


def test_the_run_of_a_renamed_model_is_where_the_report_says(tiny_base: str, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, local=[{"path": str(tmp_path / "rows.jsonl")}])
    folder = Path(RunFolder.of(job).evaluation)
    for name in ("words", "plain-words"):
        (found,) = measure_sets(job, [Contender(name, "f", None)])
        assert name in found.models[0].run
        assert (folder / found.models[0].run).is_file()
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    again = make_job(tiny_base, tmp_path, local=[{"path": str(tmp_path / "moved.jsonl")}])
    (found,) = measure_sets(again, [Contender("words", "f", None)])
    assert (folder / found.models[0].run).is_file()
