"""A rank that hangs, really stopped: the others give up in the time set, name it, and the run goes on.

pytest tests/faults/hanging_rank.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

STEPS = 40
TIMEOUT_S = 4


def ranks_below(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = [{"query": f"word {n} a", "positive": f"word {n} b", "negatives": [f"other {n}"]} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch = {"hidden_size": 64, "layers": 4, "heads": 4, "vocab_size": 300}
    job = {
        "name": "hangs",
        "storage": str(tmp_path),
        "model": {"base": "scratch", "max_tokens": 32, "scratch": scratch},
        "train": {
            "data": [{"path": str(tmp_path / "pairs.jsonl")}],
            "global_batch_size": 8,
            "chunk_size": 1,
            "max_steps": STEPS,
            "checkpoint_every_steps": 5,
            "max_failures": 1,
            "workers": {"num_workers": 2, "timeout_s": TIMEOUT_S},
            "deepspeed": {"zero_stage": 2},
        },
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_worker_niceness": "0"}
    told, metrics = tmp_path / "told.txt", tmp_path / "hangs" / "metrics" / "train.jsonl"
    with told.open("wb") as stream:
        command = [sys.executable, "-m", "ullme_ray", "train", str(tmp_path / "job.yaml")]
        driver = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 600
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 7:
            assert driver.poll() is None, told.read_text()[-3000:]
            assert time.monotonic() < deadline, told.read_text()[-3000:]
            time.sleep(0.02)
        stopped = ranks_below(psutil.Process(driver.pid))[0]
        stopped.send_signal(signal.SIGSTOP)  # alive for the kernel, its connections open: it just never answers
        assert driver.wait(timeout=600) == 0, told.read_text()[-3000:]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        driver.wait()
    text = told.read_text()
    (line,) = [line for line in text.splitlines() if "no answer from" in line]
    assert f"train.workers.timeout_s = {TIMEOUT_S} s" in line
    assert "last sign of life" in line
    assert "starts again from the last checkpoint (1 of 1 restarts)" in line
    steps = [json.loads(row)["step"] for row in metrics.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))  # none twice, none missing
