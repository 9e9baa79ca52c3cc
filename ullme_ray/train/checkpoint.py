"""Checkpoints that exist whole or not at all: a folder counts only once its checkpoint.json, written last, stands in it.

A checkpoint holds every trained parameter whole, with its float32 master weight and moments, so that any number of ranks under
any ZeRO stage goes on from it. Every rank writes its share of them, with sha256; rank 0 writes the manifest. A crash at any
instant leaves the last good checkpoint as it was. There is no random state to save: order and dropout are functions of seed and
step.
Costs 12 bytes per trained parameter, on storage and, divided by the ranks, in memory while writing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ullme_ray import storage
from ullme_ray.errors import TrainingError
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.spec.secrets import SecretRef
from ullme_ray.train.collectives import gather_objects, world
from ullme_ray.train.engine import Engine, ParameterState

_MANIFEST = "checkpoint.json"
_MAY_CHANGE = {  # fields of `train` that change speed, place or bookkeeping, but no number of the run
    "checkpoint_every_steps",
    "checkpoint_key",
    "chunk_size",
    "deepspeed",
    "gradient_checkpointing",
    "keep_checkpoints",
    "log_every_steps",
    "max_failures",
    "max_rejected_share",
    "trackers",
    "validation",
    "workers",
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
    _check_list(job, checkpoint)
    before, now = checkpoint.manifest["settings"], training_settings(job)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise TrainingError(
            f"{checkpoint.path} was written under other settings ({shown}); put them back to resume, "
            f"or give the job another name"
        )


def _check_list(job: JobSpec, checkpoint: Checkpoint) -> None:
    """A checkpoint's list names files of its own folder only, and is signed with the job's key where it has one.

    Raises:
        TrainingError: it is not so.
    """
    foreign = [name for name in checkpoint.manifest["files"] if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if foreign:
        raise TrainingError(f"{checkpoint.path}/{_MANIFEST} names the file {foreign[0]!r}, which no checkpoint of ours has")
    key = job.train.checkpoint_key if job.train is not None else None
    signature = str(checkpoint.manifest.get("signature"))
    if key is not None and not hmac.compare_digest(_signature(checkpoint.manifest, key), signature):
        raise TrainingError(
            f"{checkpoint.path} is not signed with train.checkpoint_key = {key.reference}: it was written without the key or"
            f" with another, or was changed since; remove it to resume from the one before, or the key to trust it"
        )


def _signature(manifest: dict[str, Any], key: SecretRef) -> str:
    """Over all of the manifest, and so over the hash of every file. The hashes themselves are checked when files are opened."""
    signed = json.dumps({name: value for name, value in manifest.items() if name != "signature"}, sort_keys=True)
    return hmac.new(key.reveal().get_secret_value().encode(), signed.encode(), "sha256").hexdigest()


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


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: what a resumed run needs beside the weights."""

    step: int
    validations: tuple[tuple[int, float], ...] = ()  # (step, nDCG), oldest first
    finished: bool = False
    data: str = ""  # fingerprint of the training rows

    @property
    def best(self) -> tuple[int, float] | None:
        """The validation with the highest nDCG, the earliest of equals."""
        return max(self.validations, key=lambda found: (found[1], -found[0]), default=None)

    @property
    def just_validated(self) -> bool:
        return bool(self.validations) and self.validations[-1][0] == self.step


def save_checkpoint(engine: Engine, job: JobSpec, progress: TrainState) -> None:
    """Writes and publishes a checkpoint, then drops the oldest, but never the best validated; a collective call."""
    assert job.train is not None
    rank, world_size = world()
    target = storage.join(RunFolder.of(job).checkpoints, f"step-{progress.step:08d}")
    owners = _owners(engine.trained_names(), world_size)
    tensors: dict[str, Tensor] = {}
    for name, owner in owners.items():
        state = engine.parameter_state(name)
        if owner == rank:
            tensors |= {f"{name}|{field}": value.to("cpu", copy=True) for field, value in state._asdict().items()}
    files = {}
    if tensors:
        file = f"state-{rank + 1:05d}-of-{world_size:05d}.safetensors"
        local = Path(tempfile.mkdtemp(prefix="ullme-checkpoint-"))
        try:
            save_file(tensors, local / file)
            storage.put_file(local / file, storage.join(target, file))
            files[file] = {"bytes": (local / file).stat().st_size, "sha256": _sha256(local / file)}
        finally:
            shutil.rmtree(local, ignore_errors=True)
    gathered = gather_objects(files)
    if rank == 0:
        manifest = {
            "step": progress.step,
            "world_size": world_size,
            "validations": progress.validations,
            "finished": progress.finished,
            "data": progress.data,
            "settings": training_settings(job),
            "files": {name: facts for part in gathered for name, facts in part.items()},
        }
        if job.train.checkpoint_key is not None:
            manifest = json.loads(json.dumps(manifest))  # as it will be read, for the signature is over that
            manifest["signature"] = _signature(manifest, job.train.checkpoint_key)
        storage.write_text(storage.join(target, _MANIFEST), json.dumps(manifest, indent=1))
        _drop_old(job, progress)
    if world_size > 1:
        dist.barrier()


def _drop_old(job: JobSpec, progress: TrainState) -> None:
    assert job.train is not None
    best = progress.best[0] if progress.best is not None else None
    for old in list_checkpoints(job)[: -job.train.keep_checkpoints]:
        if old.step != best:
            storage.remove(storage.join(old.path, _MANIFEST))  # first, so that no half-removed folder counts
            storage.remove(old.path)


def _owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which parameter: the same on all ranks, about the same number of bytes each."""
    loads = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return {name: owners[name] for name in sizes}


class CheckpointReader:
    """The tensors of a checkpoint, read from local files one by one; opening it checks every file, a collective call.

    Raises:
        TrainingError: a file is missing or damaged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        folder = storage.fetch_folder(checkpoint.path)
        files = sorted(checkpoint.manifest["files"].items())
        # The ranks of one machine read the same files: each hashes its share of them.
        local_rank, local_size = (int(os.environ.get(name, default)) for name, default in _LOCAL.items())
        damaged = [
            name
            for number, (name, facts) in enumerate(files)
            if not _is_whole(Path(folder) / name, facts, hashed=number % local_size == local_rank)
        ]
        found = sorted({name for names in gather_objects(damaged) for name in names})
        if found:
            raise TrainingError(
                f"{checkpoint.path}/{found[0]} is damaged; remove {checkpoint.path} to resume from the one before"
            )
        self._open = [safe_open(Path(folder) / name, framework="pt") for name, _ in files]
        self._place = {key: file for file in self._open for key in file.keys()}  # noqa: SIM118 - not a dict

    def names(self) -> list[str]:
        """Of the parameters."""
        return sorted({key.rpartition("|")[0] for key in self._place})

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 weight) of every parameter."""
        for name in self.names():
            yield name, self._place[f"{name}|weight"].get_tensor(f"{name}|weight")

    def state(self, name: str) -> ParameterState:
        """Master weight and moments of a parameter."""
        return ParameterState(*(self._place[f"{name}|{f}"].get_tensor(f"{name}|{f}") for f in ParameterState._fields))

    @property
    def progress(self) -> TrainState:
        manifest = self.checkpoint.manifest
        return TrainState(
            step=self.checkpoint.step,
            validations=tuple((int(step), float(ndcg)) for step, ndcg in manifest["validations"]),
            finished=bool(manifest["finished"]),
            data=str(manifest["data"]),
        )


_LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def open_checkpoint(job: JobSpec, *, step: int | None = None) -> CheckpointReader | None:
    """The newest complete checkpoint, or the one of a step; None where there is none. A collective call.

    Raises:
        TrainingError: its files are damaged, or it was written under other settings.
    """
    found = [checkpoint for checkpoint in list_checkpoints(job) if step in (None, checkpoint.step)]
    if not found:
        return None
    check_resumable(job, found[-1])
    return CheckpointReader(found[-1])


def restore_weights(module: torch.nn.Module, reader: CheckpointReader) -> None:
    """Puts a checkpoint's weights into a module, in the module's dtype; before an engine is made of it."""
    parameters = dict(module.named_parameters())
    for name, weight in reader.weights():
        parameters[name].data.copy_(weight)


def restore_state(engine: Engine, reader: CheckpointReader) -> None:
    """Gives master weights and moments back to an engine, on any number of ranks; a collective call."""
    names = engine.trained_names()
    assert sorted(names) == reader.names(), sorted(set(names) ^ set(reader.names()))
    for name in names:
        engine.set_parameter_state(name, reader.state(name), steps_done=reader.checkpoint.step)


def _is_whole(path: Path, facts: dict[str, Any], *, hashed: bool) -> bool:
    if not path.is_file() or path.stat().st_size != facts["bytes"]:
        return False
    return not hashed or _sha256(path) == facts["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
