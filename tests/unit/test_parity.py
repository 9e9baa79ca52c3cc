"""What the proof of equal vectors compares with: the table's vectors of whole passages, whatever their dtype."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from stored_table import make_vectors, write_table

from ullme_ray.parity import Parity, _texts_and_table_vectors, min_cosine
from ullme_ray.spec import JobSpec
from ullme_ray.vectors import VectorFormat

TEXTS = ["first", "second", "third"]


@pytest.mark.parametrize("dtype", ["float32", "int8", "ubinary"])
def test_whole_passages_are_compared_and_those_in_chunks_are_not(dtype: str, tmp_path: Path) -> None:
    vectors, form = make_vectors(4), VectorFormat(dtype)
    form = form.calibrated(vectors) if form.is_scaled else form
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in TEXTS))
    ids = ["third", "first", "second", "second"]  # content hashes are those of the ids here, which are the texts
    write_table(tmp_path / "docs" / "embeddings", form, vectors, {"id": ids}, chunks=[0, 0, 0, 1])
    embed = {"input": {"path": str(tmp_path / "in.jsonl"), "id": "id"}}
    job = JobSpec.model_validate({"name": "docs", "storage": str(tmp_path), "model": {"base": "m"}, "embed": embed})
    texts, table, found = _texts_and_table_vectors(job)
    assert texts == ["first", "third"]
    assert (found.dtype, found.ranges_data) == (form.dtype, form.ranges_data)
    expected = form.decode(form.encode(vectors[[1, 0]]))
    np.testing.assert_array_equal(table, expected)
    assert min_cosine(table, expected) > 0.999999
    assert min_cosine(table, expected[::-1]) < form.least_cosine, "control: another passage's vector"


def test_nothing_to_compare_is_said() -> None:
    assert "not compared" in Parity(0, {}).to_text()
    assert Parity(3, {("served", "table"): 0.5}).to_text().endswith("served = table 0.500000")
