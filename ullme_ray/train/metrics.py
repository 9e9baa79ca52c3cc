"""What a run tells about itself: one record per logged step, to JSONL, TensorBoard and the driver's progress bar."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from ullme_ray import storage
from ullme_ray.report.curves import step_of


def speed(num_parameters: int, encode_tokens: int, generate_tokens: int, *, seconds: float, peak: float) -> dict[str, float]:
    """tokens_per_s, mfu and step_s of a step over all ranks, whose peak together is `peak` FLOP/s."""
    return {
        "tokens_per_s": (encode_tokens + generate_tokens) / seconds,
        "mfu": step_flops(num_parameters, encode_tokens, generate_tokens) / seconds / peak,
        "step_s": seconds,
    }


def memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_flops(num_parameters: int, encode_tokens: int, generate_tokens: int) -> float:
    """Useful work of a step (METHOD: cost model): 3F(T_e + T_g) with F = 2 x non-embedding parameters.

    What GradCache, activation checkpointing and a reference model compute again is not counted.
    """
    return 3 * 2 * num_parameters * (encode_tokens + generate_tokens)


class MetricsLog:
    """`train.jsonl` and TensorBoard events in the run's metrics folder. On resume, records after the checkpoint are dropped."""

    def __init__(self, folder: str, *, steps_done: int) -> None:
        self.folder = folder
        self.path = storage.join(folder, "train.jsonl")
        self.lines = [line for line in self._existing() if steps_done and step_of(line) <= steps_done]
        remote = storage.is_remote(folder)
        self._events = tempfile.mkdtemp(prefix="ullme-tensorboard-") if remote else os.path.join(folder, "tensorboard")
        if not remote:
            shutil.rmtree(self._events, ignore_errors=True)
        self.flush()
        self._writer = SummaryWriter(self._events)
        for line in self.lines:
            self._to_tensorboard(json.loads(line))

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        self.lines.append(line)
        if not storage.is_remote(self.folder):  # an object store has no append: there the file comes with each flush
            with Path(self.path).open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        self._to_tensorboard(record)

    def flush(self) -> None:
        """Publishes all records; called with every checkpoint."""
        storage.write_text(self.path, "".join(line + "\n" for line in self.lines))
        if storage.is_remote(self.folder) and os.listdir(self._events):
            self._writer.flush()
            storage.put_folder(self._events, storage.join(self.folder, "tensorboard"))

    def close(self) -> None:
        self._writer.flush()
        self.flush()
        self._writer.close()
        if storage.is_remote(self.folder):
            shutil.rmtree(self._events, ignore_errors=True)

    def _existing(self) -> list[str]:
        return storage.read_bytes(self.path).decode(errors="replace").splitlines() if storage.exists(self.path) else []

    def _to_tensorboard(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"train/{name}", value, record["step"])
