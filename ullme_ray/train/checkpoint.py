"""Checkpoints that exist whole or not at all: a folder counts only once its checkpoint.json, written last, stands in it.

Every rank publishes the files it wrote, with their sha256; rank 0 writes the manifest. A crash at any instant leaves the last
good checkpoint as it was. There is no random state to save: order and dropout are functions of seed and step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ullme_ray import storage
from ullme_ray.errors import TrainingError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.train.collectives import world
from ullme_ray.train.deepspeed import DeepSpeedEngine

_MANIFEST = "checkpoint.json"
_MAY_CHANGE = {  # fields of `train` that change speed or bookkeeping, but no number of the run
    "chunk_size",
    "checkpoint_every_steps",
    "gradient_checkpointing",
    "keep_checkpoints",
    "log_every_steps",
    "max_failures",
    "max_rejected_share",
    "trackers",
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` optimizer steps are done."""

    path: str
    step: int
    manifest: dict[str, Any]


def list_checkpoints(job: JobSpec) -> list[Checkpoint]:
    """Complete checkpoints, oldest first."""
    found = []
    for file in storage.list_files(RunFolder.of(job).checkpoints):
        path, _, name = file.path.rpartition("/")
        if name != _MANIFEST:
            continue
        try:
            manifest = json.loads(storage.read_text(file.path))
            found.append(Checkpoint(path, int(manifest["step"]), manifest))
        except FileNotFoundError:
            continue  # another process is removing this checkpoint
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{file.path} is damaged ({error}); remove {path} to resume from the one before") from error
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def check_resumable(job: JobSpec, checkpoint: Checkpoint) -> None:
    """A run goes on only as it began.

    Raises:
        TrainingError: the job has other settings than the one that wrote the checkpoint; names each.
    """
    assert job.train is not None
    before, now = checkpoint.manifest["settings"], training_settings(job)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise TrainingError(
            f"{checkpoint.path} was written under other settings ({shown}); put them back to resume, "
            f"or give the job another name"
        )


def training_settings(job: JobSpec) -> dict[str, Any]:
    """All that decides a run's numbers, flat: `{"train.learning_rate": 1e-4, ...}`."""
    assert job.train is not None
    tree = {
        "seed": job.seed,
        "model": job.model.model_dump(mode="json", exclude={"hub_token", "attention"}),
        "train": job.train.model_dump(mode="json", exclude=_MAY_CHANGE),
    }
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(f"{prefix}.{key}" if prefix else key, below)
        else:
            flat[prefix] = value

    walk("", tree)
    return flat


def save_checkpoint(engine: DeepSpeedEngine, job: JobSpec, step: int) -> None:
    """Writes and publishes a checkpoint after `step` steps, then drops the oldest; a collective call."""
    assert job.train is not None
    rank, world_size = world()
    target = storage.join(RunFolder.of(job).checkpoints, f"step-{step:08d}")
    local = Path(tempfile.mkdtemp(prefix="ullme-checkpoint-"))
    try:
        engine.save(str(local))
        files = {}
        for file in sorted(path for path in local.rglob("*") if path.is_file()):
            name = file.relative_to(local).as_posix()
            storage.put_file(file, storage.join(target, name))
            with file.open("rb") as stream:
                files[name] = {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    finally:
        shutil.rmtree(local, ignore_errors=True)
    gathered: list[dict[str, Any]] = [files]
    if world_size > 1:
        gathered = [{} for _ in range(world_size)]
        dist.all_gather_object(gathered, files)
    if rank == 0:
        manifest = {
            "step": step,
            "world_size": world_size,
            "settings": training_settings(job),
            "files": {name: facts for part in gathered for name, facts in part.items()},
        }
        storage.write_text(storage.join(target, _MANIFEST), json.dumps(manifest, indent=1))
        for old in list_checkpoints(job)[: -job.train.keep_checkpoints]:
            storage.remove(storage.join(old.path, _MANIFEST))  # first, so that no half-removed folder counts
            storage.remove(old.path)
    if world_size > 1:
        dist.barrier()


def load_checkpoint(engine: DeepSpeedEngine, job: JobSpec) -> int:
    """Brings the engine to the newest complete checkpoint; a collective call.

    Returns:
        Steps done; 0 where there is no checkpoint.

    Raises:
        TrainingError: the checkpoint's files are damaged, or were written by another number of ranks or under other settings.
    """
    _, world_size = world()
    checkpoints = list_checkpoints(job)
    if not checkpoints:
        return 0
    checkpoint = checkpoints[-1]
    check_resumable(job, checkpoint)
    if checkpoint.manifest["world_size"] != world_size:
        raise TrainingError(
            f"{checkpoint.path} was written by {checkpoint.manifest['world_size']} ranks and this run has {world_size}; "
            f"set train.workers.num_workers = {checkpoint.manifest['world_size']}, or give the job another name"
        )
    local = storage.fetch_folder(checkpoint.path)
    for name, facts in checkpoint.manifest["files"].items():
        path = Path(local) / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
            raise TrainingError(f"{checkpoint.path}/{name} is damaged; remove {checkpoint.path} to resume from the one before")
    engine.load(local)
    return checkpoint.step


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
