"""Stores and clusters that do not answer: told before any work, with the address and without the secret."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
name: docs
model: {{base: {base}, max_tokens: 64}}
train: {{data: [{{path: pairs.jsonl}}], global_batch_size: 8, max_steps: 1}}
embed: {{input: {{path: corpus.jsonl}}}}
"""


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, base: str, override: str, **environment: str) -> str:
    """What the command says on stderr; it must fail."""
    (folder / "job.yaml").write_text(JOB.format(base=base))
    (folder / "pairs.jsonl").write_text((json.dumps({"query": "q", "positive": "p", "negative": "n"}) + "\n") * 64)
    (folder / "corpus.jsonl").write_text(json.dumps({"text": "t"}) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    done = subprocess.run(
        [sys.executable, "-m", "ullme_ray", "run", "job.yaml", override],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=kept | environment,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("override", ["train.data.0.path=s3://bucket/pairs.jsonl", "embed.input.path=s3://bucket/corpus"])
def test_unreachable_s3_is_told_before_any_work(tmp_path: Path, tiny_base: str, closed_port: int, override: str) -> None:
    message = run(
        tmp_path,
        tiny_base,
        override,
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{closed_port}",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="sk-0815",
    )
    assert "s3://bucket" in message
    assert f"127.0.0.1:{closed_port}" in message
    assert "sk-0815" not in message


def test_no_cluster_at_the_address(tmp_path: Path, tiny_base: str, closed_port: int) -> None:
    message = run(tmp_path, tiny_base, f"cluster.address=127.0.0.1:{closed_port}")
    assert f"no Ray cluster answers at cluster.address = 127.0.0.1:{closed_port}" in message
