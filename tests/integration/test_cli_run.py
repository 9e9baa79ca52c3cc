"""`ullme-ray run` as a user runs it: the whole line on a tiny model, Ctrl-C in mid-training, and the same command again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
name: docs
model: {{base: {base}, max_tokens: 64}}
train:
  data: [{{path: pairs.jsonl}}]
  objective: cl
  global_batch_size: 4
  max_steps: {steps}
  checkpoint_every_steps: 20
  workers: {{num_workers: 2}}
embed: {{input: {{path: corpus.jsonl, columns: [text]}}}}
serve: {{port: 0, keep_running: false}}
search: {{questions: [who deletes a bucket]}}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_base: str) -> Path:
    texts = [f"operation {number} deletes a bucket and returns value {number}" for number in range(40)]
    pairs = [
        {"query": f"bucket {number}", "positive": text, "negative": texts[number - 1]} for number, text in enumerate(texts)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "job.yaml").write_text(JOB.format(base=tiny_base, steps=200))
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    """As in a terminal: a process group of its own, to which Ctrl-C goes as a whole."""
    return subprocess.Popen(
        [sys.executable, "-m", "ullme_ray", "run", "job.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def processes_of_session(session: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def test_interrupted_run_stops_cleanly_and_the_same_command_goes_on(folder: Path) -> None:
    run = start(folder)
    assert run.stderr is not None
    told = ""
    for line in run.stderr:
        told += line
        if (step := re.search(r"train: (\d+)/200 steps", line)) and int(step[1]) >= 20:
            break
    assert run.poll() is None, told
    os.killpg(run.pid, signal.SIGINT)
    _, rest = run.communicate(timeout=120)
    assert run.returncode == 130, told + rest
    assert "stopped; the same command goes on where this one left off: ullme-ray run job.yaml" in rest
    assert "Traceback" not in rest
    assert processes_of_session(run.pid) == []

    again = start(folder)
    output, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    resumed = re.search(r"train: resumes after step (\d+)", errors)
    assert resumed
    assert 20 <= int(resumed[1]) < 200
    assert "trained: 200 steps" in output
    assert "Q: who deletes a bucket" in output
    parity = dict(re.findall(r"(\w+ = \w+) ([01]\.\d+)", output))
    assert set(parity) == {"export = served", "export = table", "served = table"}
    assert all(float(cosine) >= 0.9999 for cosine in parity.values())
    assert f"embeddings   {folder}/runs/docs/embeddings" in output
    assert processes_of_session(again.pid) == []
