"""Quantised and cut tables from a real run: ranges are measured once and kept, and another setting embeds all again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ullme_ray.embed import dry_run, run_embed
from ullme_ray.evaluate.search import search
from ullme_ray.model import open_encoder
from ullme_ray.spec import JobSpec
from ullme_ray.table import open_table
from ullme_ray.vectors import format_of_table

pytestmark = pytest.mark.usefixtures("ray_local")


def make_job(folder: Path, base: str, **output: Any) -> JobSpec:
    embed = {"input": {"path": f"{folder}/in", "id": "id"}, "output": output, "rows_per_unit": 10}
    return JobSpec.model_validate(
        {"name": "docs", "storage": f"{folder}/runs", "model": {"base": base, "max_tokens": 64}, "embed": embed}
    )


def write(folder: Path, name: str, texts: dict[str, str]) -> None:
    path = folder / "in" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts.items()))


def stored(folder: Path) -> dict[str, list[int]]:
    rows = open_table(f"{folder}/runs/docs/embeddings").to_pyarrow_table()
    return dict(zip(rows["id"].to_pylist(), rows["embedding"].to_pylist()))


def test_int8_keeps_its_ranges_and_other_settings_embed_all_again(tmp_path: Path, tiny_base: str) -> None:
    texts = {f"a-{n}": f"policy of bucket {n} " + "key " * (n % 7) for n in range(40)}
    write(tmp_path, "a.jsonl", texts)
    job = make_job(tmp_path, tiny_base, dtype="int8", dims=16)
    planned = dry_run(job)
    assert (planned.files_new, planned.rows_to_read, planned.rows_to_embed_estimate) == (1, 40, 40)
    assert not (tmp_path / "runs").exists(), "a dry run measures no ranges"
    assert run_embed(job, progress=False).rows_embedded == 40
    form = format_of_table(open_table(f"{tmp_path}/runs/docs/embeddings"))
    assert (form.dtype, form.dims) == ("int8", 16)
    (kept,) = (tmp_path / "runs" / "docs" / "embeddings" / "_calibration").iterdir()
    np.testing.assert_array_equal(np.load(kept), form.ranges)
    first = stored(tmp_path)
    vectors = form.cut(open_encoder(job, device="cpu").encode(list(texts.values())))  # (N, 16)
    decoded = form.decode(np.array([first[i] for i in texts], np.int8))
    assert (decoded * vectors).sum(axis=1).min() > 0.999
    assert (decoded * vectors[::-1]).sum(axis=1).min() < 0.999, "control: another row's vector"
    hits = search(job, texts["a-11"], top_k=3)
    assert hits[0].score > 0.99

    again = run_embed(job, progress=False)
    assert (again.rows_embedded, again.tokens, again.version) == (0, 0, 0)

    write(tmp_path, "b.jsonl", {"b-0": "a table of its own", **{f"b-{n}": texts[f"a-{n}"] for n in range(1, 5)}})
    more = run_embed(job, progress=False)
    assert (more.rows_embedded, more.rows_copied) == (1, 4)
    assert format_of_table(open_table(f"{tmp_path}/runs/docs/embeddings")) == form
    now = stored(tmp_path)
    assert {i: now[i] for i in first} == first
    assert [now[f"b-{n}"] for n in range(1, 5)] == [first[f"a-{n}"] for n in range(1, 5)]

    bits = make_job(tmp_path, tiny_base, dtype="ubinary")
    other = run_embed(bits, progress=False)
    assert (other.rows_embedded, other.rows_copied) == (45, 0)
    assert {len(row) for row in stored(tmp_path).values()} == {4}
    assert "b-0" in {hit.id for hit in search(bits, "a table of its own", top_k=5)}
