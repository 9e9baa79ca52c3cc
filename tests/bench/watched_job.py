"""Jobs of a tiny model, each run in a process of its own whose memory is watched: what the benches of embedding share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

_WORDS = ["bucket", "object", "policy", "access", "table", "query", "value", "region", "key", "version", "stream", "role"]
_MIB = 2**20


def text_of(row: int) -> str:
    """Five to twenty words after the row's number."""
    choice = random.Random(row)
    return f"{row} " + " ".join(choice.choice(_WORDS) for _ in range(choice.randint(5, 20)))


def make_job(folder: Path, input_section: dict[str, Any], **embed: Any) -> dict[str, Any]:
    """A job of one actor over `folder`/corpus, with a random model of one layer: what is measured is all the rest."""
    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.spec.job import ScratchSpec

    spec = ScratchSpec(hidden_size=32, layers=1, heads=2, vocab_size=512)
    model = str(folder / "model")
    build_scratch([text_of(row) for row in range(500)], spec, max_tokens=64, seed=0, folder=model)
    return {
        "name": "bench",
        "storage": str(folder / "runs"),
        "model": {"base": model, "max_tokens": 64},
        "embed": {
            "input": {"path": str(folder / "corpus"), "id": "id", **input_section},
            "actors": {"min": 1, "max": 1},
            **embed,
        },
    }


class Memory:
    """Watches a process and all below it: the most that each kind held of its own. Ray's object store is left out."""

    def __init__(self, pid: int) -> None:
        self._driver = self._workers = 0
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            own = [_own_bytes(process) for process in processes]
            self._driver = max(self._driver, own[0])
            self._workers = max(self._workers, sum(own[1:]))

    def stop(self) -> dict[str, float]:
        """The most of the driver, and of all other processes together, in MiB."""
        self._stop.set()
        self._thread.join()
        return {"driver_mib": self._driver / _MIB, "workers_mib": self._workers / _MIB}


def _own_bytes(process: psutil.Process) -> int:
    try:
        info = process.memory_info()
        return int(info.rss - info.shared)
    except psutil.NoSuchProcess:
        return 0


def run_watched(arguments: list[str]) -> dict[str, Any]:
    """`python ARGUMENTS`, which starts a Ray of its own: the JSON object on its last line, its memory, and its time.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )
        memory = Memory(process.pid)
        output, _ = process.communicate()
        held = memory.stop()
        if process.returncode:
            told.seek(0)
            raise SystemExit(output + told.read()[-3000:])
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**figures, **held, "process_s": time.monotonic() - started}


def print_row(cells: list[Any]) -> None:
    """A line of a Markdown table; fractions with one digit."""
    shown = [f"{cell:,.1f}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
    print("| " + " | ".join(shown) + " |", flush=True)
