"""The jobs on S3, run as they stand on a real store: only the model is a smaller one, and CPUs take the GPUs' place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server

from ullme_ray import storage

ROOT = Path(__file__).parents[2]
BUCKET = "s3://bucket"  # as in the job files
KEYS = "canary-51c0ffee,second-key"
NUM_ROWS = 300
ON_CPUS = ["model.dtype=float32", "cluster.address=null", "embed.actors.gpus_per_actor=0", "embed.actors.cpus_per_actor=1"]


def put_corpus(s3: S3Server, folder: Path, changed: range = range(0)) -> None:
    s3.bucket("bucket")
    for part in range(2):
        rows: list[dict[str, Any]] = [
            {"doc_id": f"d{n}", "title": f"key {n}", "body": ("the policy of a bucket " * (n % 40) + str(n in changed))}
            for n in range(part, NUM_ROWS, 2)
        ]
        (folder / f"p{part}").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"p{part}" / "rows.parquet")
    storage.put_folder(folder, f"{BUCKET}/corpus")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ULLME_API_KEYS": KEYS, "ULLME_WEBHOOK": "http://127.0.0.1:9/", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "ullme_ray", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert not any(key in result.stdout + result.stderr for key in KEYS.split(","))
    return result


def report(*words: str) -> Any:
    return json.loads(command(*words, "--json").stdout)


@pytest.fixture
def corpus(s3: S3Server, tmp_path: Path) -> Path:
    put_corpus(s3, tmp_path)
    return tmp_path


def test_a_table_follows_its_corpus(s3: S3Server, corpus: Path, tiny_base: str) -> None:
    given = ["jobs/embed_s3.yaml", f"model.base={tiny_base}", *ON_CPUS, "embed.actors.max=2", "embed.output.dims=16"]
    given += ["embed.input.chunks.tokens=64", "embed.input.chunks.overlap=8"]  # the stand-in takes 128 tokens
    plan = report("embed", *given, "--dry-run")
    assert (plan["files_new"], plan["rows"]) == (2, NUM_ROWS)
    first = report("embed", *given)
    assert first["rows_embedded"] == NUM_ROWS
    assert first["table_rows"] > NUM_ROWS  # long ones are in chunks
    put_corpus(s3, corpus, changed=range(5))
    second = report("embed", *given)
    assert (second["rows_embedded"], second["rows_copied"]) == (5, NUM_ROWS - 5)
    assert report("embed", *given)["tokens"] == 0
    assert report("table", *given, "--verify", "100")["verified"]["lowest_cosine"] > 0.99999


def test_a_night_and_a_server_over_it(s3: S3Server, corpus: Path, tiny_base: str) -> None:
    given = ["jobs/nightly.yaml", f"model.base={tiny_base}", *ON_CPUS, "embed.actors.max=1"]
    given += [f"embed.output.path={BUCKET}/nights"]  # the other job has its table where this one has its own
    command("run", *given, "--stages", "embed")
    served = [
        "serve.gpus_per_replica=0",
        "serve.replicas.max=1",
        "serve.host=127.0.0.1",
        "serve.port=0",
        "serve.keep_running=false",
    ]
    told = command("run", *given, *served, "search.questions=[key 7]").stdout
    assert "Q: key 7" in told
    assert "same vectors everywhere" in told
    assert "embed" in command("runs", *given).stdout
