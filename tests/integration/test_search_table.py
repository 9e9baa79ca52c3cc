"""From corpus to answer: rows embedded by the embed stage are found through a running server, and without one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ullme_ray.embed import run_embed
from ullme_ray.errors import ServeError
from ullme_ray.evaluate.search import search
from ullme_ray.sample_data import ensure_dataset
from ullme_ray.serve import start_server
from ullme_ray.serve.keys import LOOK_AGAIN_S
from ullme_ray.spec import JobSpec

pytestmark = pytest.mark.usefixtures("ray_local")
QUESTION = "how do I make a bucket private"


def make_job(base: str, root: str, keys: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "ask",
            "storage": root,
            "model": {"base": base, "max_tokens": 64, "prompts": {"query": "question: "}},
            "dataset": {"name": "aws_api_docs", "heldout_queries": 5, "max_pairs": 40},
            "embed": {"input": {"path": "run:data/corpus.jsonl", "id": "id", "columns": ["title", "text"]}},
            "serve": {"port": 0, "api_keys": f"file:{keys}"},
        }
    )


def test_a_server_and_this_process_find_the_same_rows(s3, tiny_base, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("first-key, second-key\n")
    job = make_job(tiny_base, s3.bucket("search-test"), str(keys))
    ensure_dataset(job)
    run_embed(job)
    alone = search(job, QUESTION, top_k=5)
    assert len({hit.id for hit in alone}) == 5
    assert all(hit.columns["title"] and hit.columns["text"] for hit in alone)
    with start_server(job) as server:
        served = search(job, QUESTION, top_k=5, url=server.url)
        old = tmp_path / "old"
        old.write_text("first-key")
        keys.write_text("another-key\n")
        time.sleep(LOOK_AGAIN_S)
        rotated = search(job, QUESTION, top_k=5, url=server.url)  # both sides read the new key
        with pytest.raises(ServeError, match="answered /info with 401: the API key is not valid"):
            search(job, QUESTION, top_k=5, url=server.url, key=f"file:{old}")
    assert [hit.id for hit in rotated] == [hit.id for hit in served]
    assert [hit.id for hit in served] == [hit.id for hit in alone]
    assert [hit.score for hit in served] == pytest.approx([hit.score for hit in alone], abs=1e-5)
